"""Cases as the command line and files spell them."""

import csv
import io
import json
import pathlib
from collections.abc import Sequence

from mediation.cases import Case, Corruption, GaussianNoise, ReplaceSubject, ZeroSubject
from mediation.plans import checked_integer

_COLUMNS = ("prompt", "subject", "attribute", "seed")


def parse_corruption(text: str, draws: int = 1, where: str = "input") -> Corruption:
    """The corruption that "noise", "noise:SCALE", "zero" or "replace:TEXT" stands for.

    Args:
        text: which one.
        draws: independent noises per case; of anything else, 1.
        where: "input" or "output", for noise and zeros.

    Example:
        >>> parse_corruption("noise:2.5", draws=4)
        GaussianNoise(scale=2.5, draws=4, where='input')
    """
    kind, _, value = text.partition(":")
    if kind in ("replace", "zero") and draws != 1:
        raise ValueError(f"a subject that is replaced or zero has nothing random, so one draw; got {draws} draws")
    if kind == "replace":
        if where != "input":
            raise ValueError(f'a subject is replaced in the prompt: where must be "input", got {where!r}')
        return ReplaceSubject(value)
    if text == "zero":
        return ZeroSubject(where)
    try:
        if kind == "noise":
            return GaussianNoise(float(value or GaussianNoise.scale), draws, where)
    except ValueError as error:
        raise ValueError(f"cannot make noise of {text!r}, {draws} draws: {error}") from error
    raise ValueError(f'a corruption is "noise", "noise:SCALE", "zero" or "replace:TEXT", got {text!r}')


def parse_tokens(text: str | None) -> str | list[str | int] | None:
    """The tokens that names and positions with commas between, or "each", stand for.

    Example:
        >>> parse_tokens("last_subject, eos, 3")
        ['last_subject', 'eos', 3]
    """
    if text is None or text == "each":
        return text
    return [int(token) if token.strip().isdigit() else token.strip() for token in text.split(",")]


def parse_windows(text: str | None) -> str | list[tuple[float, float]] | None:
    """The windows that fractions of sampling with commas between, or "each", stand for.

    Example:
        >>> parse_windows("0-0.5, 0.5-1")
        [(0.0, 0.5), (0.5, 1.0)]
    """
    if text is None or text == "each":
        return text
    try:
        # results write a dash between the fractions
        pairs = [tuple(map(float, window.replace("–", "-").split("-"))) for window in text.split(",")]
    except ValueError as error:
        raise ValueError(f'windows are fractions of sampling, as 0-0.5,0.5-1, or "each"; got {text!r}') from error
    return pairs


def collect_cases(
    path: pathlib.Path | None,
    prompts: Sequence[str],
    subjects: Sequence[str],
    corruption: Corruption,
    seed: int = 0,
) -> tuple[list[Case], list[str]]:
    """Cases of a file, or of prompts and subjects, and the attribute of each; a .txt file holds a prompt per line."""
    if (path is None) == (not prompts):
        raise ValueError("give either prompts with subjects, or a file of cases")
    if path is not None and path.suffix == ".txt":
        lines = map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())
        prompts = [line for line in lines if line]
        if not prompts:
            raise ValueError(f"{path.name} holds no prompt")
    elif path is not None:
        if subjects:
            raise ValueError("a file of cases has its own subjects; only prompts, one per line of a .txt, have none")
        return read_cases(path, corruption, seed)
    return pair_cases(prompts, subjects, corruption, seed), [""] * len(prompts)


def pair_cases(prompts: Sequence[str], subjects: Sequence[str], corruption: Corruption, seed: int = 0) -> list[Case]:
    """One case per prompt, with a subject of its own or the only one.

    The seed of the first is `seed`, and of each further one it is one more: cases that start from the same noise would
    not be independent, as intervals take them to be.

    Example:
        >>> found = pair_cases(["a cat", "two cats"], ["cat", "cats"], GaussianNoise(), seed=3)
        >>> [(case.subject, case.seed) for case in found]
        [('cat', 3), ('cats', 4)]
    """
    if len(subjects) not in (1, len(prompts)):
        raise ValueError(f"give one subject for all prompts, or one for each of {len(prompts)}; got {len(subjects)}")
    subjects = list(subjects) * (len(prompts) if len(subjects) == 1 else 1)
    pairs = zip(prompts, subjects, strict=True)
    return [Case(*pair, corruption, number) for number, pair in enumerate(pairs, start=seed)]


def read_cases(path: str | pathlib.Path, corruption: Corruption, seed: int = 0) -> tuple[list[Case], list[str]]:
    """Cases from a CSV file with a header, or a JSON list of objects: prompt, subject and, if need be, attribute, seed.

    Args:
        path: a file that ends in .csv or .json.
        corruption: of every case.
        seed: of the first case; of each further one it is one more, but for those that have a seed of their own.

    Returns:
        The cases, and the attribute of each, "" where there is none.

    Raises:
        ValueError: if a row is no case, with its number.
    """
    path = pathlib.Path(path)
    readers = {".csv": lambda text: list(csv.DictReader(io.StringIO(text))), ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"cases are read from .csv and .json files, got {path.name!r}")
    rows = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path.name} holds no list of cases")
    cases = []
    for number, row in enumerate(rows, start=1):
        try:
            cases.append(_case(row, corruption, seed + number - 1))
        except (TypeError, ValueError) as error:
            raise ValueError(f"case {number} of {path.name}: {error}") from error
    return cases, [str(row.get("attribute") or "") for row in rows]


def _case(row: dict, corruption: Corruption, seed: int) -> Case:
    if not isinstance(row, dict) or not {"prompt", "subject"} <= set(row) <= set(_COLUMNS):
        found = list(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"its columns are {found}; expected prompt, subject and perhaps attribute, seed")
    prompt, subject = ("" if row[name] is None else row[name] for name in ("prompt", "subject"))
    return Case(prompt, subject, corruption, _seed(row.get("seed"), seed))


def _seed(own: str | int | None, default: int) -> int:
    if own in (None, ""):
        return default
    try:
        return int(own) if isinstance(own, str) else checked_integer("a seed", own)
    except ValueError as error:
        raise ValueError(f"a seed is a whole number, got {own!r}") from error
