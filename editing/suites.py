"""Suites: the prompts that an edit is judged by, each with its role."""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mediation.cases import find_spans

ROLES = ("efficacy", "generality", "specificity", "quality")
# columns that tell what a picture shows, in files of other projects
_LABELS = ("style", "theme", "artist", "object", "class", "label")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One prompt of a suite.

    Attributes:
        prompt: what is drawn, before and after the edit.
        role: efficacy, a source concept as it was edited; generality, the same in other words and contexts;
            specificity, its neighbours, and prompts without it; quality, unrelated captions.
        target_prompt: what the edited model should draw instead; empty where nothing is to change.
        factor: what a classifier is to look at, as "style"; empty if nothing is classified.
        source: the label that the prompt asks for.
        target: the label that the edited model should show. Left empty, it is the source where nothing is to change,
            and stays empty where the source is to be gone, whatever takes its place.

    Raises:
        ValueError: if the prompt is empty or the role unknown, or labels come without a factor.

    Example:
        >>> Trial("a dog", role="specificity", factor="object", source="dog").target
        'dog'
    """

    prompt: str
    role: str
    target_prompt: str = ""
    factor: str = ""
    source: str = ""
    target: str = ""

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError("a trial's prompt is empty")
        if self.role not in ROLES:
            raise ValueError(f"a trial's role is one of {', '.join(ROLES)}; got {self.role!r}")
        if bool(self.factor) != bool(self.source):
            raise ValueError(f"the trial {self.prompt!r} needs both a factor and a source label, or neither")
        object.__setattr__(self, "target_prompt", self.target_prompt or self.prompt)
        if not self.changes:
            object.__setattr__(self, "target", self.target or self.source)

    @property
    def changes(self) -> bool:
        """Whether the edit is meant to change the picture."""
        return self.role in ("efficacy", "generality")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Trials to judge an edit by.

    Args:
        trials: in any order; no prompt twice in the same role.

    Example:
        >>> suite = Suite([Trial("a cat in the style of ink", "efficacy"), Trial("a cat", "specificity")])
        >>> len(suite)
        2
    """

    trials: tuple[Trial, ...]

    def __post_init__(self):
        object.__setattr__(self, "trials", tuple(self.trials))
        if not self.trials:
            raise ValueError("a suite needs at least one trial")
        if len({(trial.prompt, trial.role, trial.factor) for trial in self.trials}) < len(self.trials):
            raise ValueError(
                "a prompt is twice in the same role of the suite: give several seeds to draw it more often"
            )

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the suite to a ".csv" or ".json" file, with a row or an object for each trial."""
        rows = [dataclasses.asdict(trial) for trial in self.trials]
        if _suffix(path) == ".json":
            pathlib.Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def read(cls, path: str | os.PathLike, *, pairs: Mapping[str, str] | None = None) -> "Suite":
        r"""Reads a suite for any model.

        Args:
            path: a CSV file with a header, or a JSON file with a list of objects. Either its columns are the fields of
                `Trial`, of which prompt and role are needed; or, with `pairs`, it has a prompt and one or more of
                style, theme, artist, object, class and label, as lists of prompts for UnlearnCanvas or Imagenette
                have, and may have others, which are ignored. A prompt that is there for several seeds is one trial.
            pairs: source concept -> target concept, for a file that has no column role. Rows with the label of a source
                are then efficacy trials, and all others specificity trials, judged by the same column. Case does not
                matter, and "_" is a space. The target prompt is that of a column target_prompt, or the prompt with the
                target in the source's place.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a column is missing or unknown, or a row is no trial, or no row is about a source, or there
                is no telling what is to be drawn in its place.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = pathlib.Path(folder, "prompts.csv")
            ...     _ = path.write_text("prompt,class\na photo of a tench,tench\na photo of a horn,horn\n")
            ...     [trial.role for trial in Suite.read(path, pairs={"tench": "horn"})]
            ['efficacy', 'specificity']
        """
        rows = _rows(path)
        if pairs is not None and not any("role" in row for row in rows):
            return cls(_labelled(rows, pairs, path))
        fields = {field.name for field in dataclasses.fields(Trial)}
        for row in rows:
            if unknown := set(row) - fields:
                raise ValueError(
                    f"{path} has unknown columns {sorted(map(str, unknown))}; a trial has {sorted(fields)}"
                )
            if missing := {"prompt", "role"} - set(row):
                raise ValueError(
                    f"{path} has no column {' or '.join(sorted(missing))}: pass pairs to tell roles by labels"
                )
        return cls([Trial(**row) for row in rows])


def check_single(pairs: Mapping[str, object]) -> None:
    """Checks that each source has one target, so that a picture can be judged by it.

    Raises:
        ValueError: if one has several.
    """
    for source, target in pairs.items():
        if not isinstance(target, str):
            raise ValueError(
                f"{source!r} has several targets ({', '.join(target)}), and no picture shows them all: judge it by a"
                " suite with roles of its own"
            )


def _suffix(path: str | os.PathLike) -> str:
    suffix = pathlib.Path(path).suffix
    if suffix not in (".csv", ".json"):
        raise ValueError(f"suites are .csv or .json files, got {pathlib.Path(path).name!r}")
    return suffix


def _rows(path: str | os.PathLike) -> list[dict[str, str]]:
    suffix = _suffix(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = json.load(file) if suffix == ".json" else list(csv.DictReader(file))
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"{path} has no trials: expected a list of objects, or rows below a header")
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def _labelled(rows: Sequence[Mapping[str, str]], pairs: Mapping[str, str], path: str | os.PathLike) -> list[Trial]:
    """Trials of prompts with labels of what they show."""
    labels = [{column: row[column] for column in _LABELS if row.get(column)} for row in rows]
    if not all("prompt" in row and found for row, found in zip(rows, labels, strict=True)):
        raise ValueError(f"{path} needs a column prompt and one of {', '.join(_LABELS)}, filled in every row")
    check_single(pairs)
    known = {(factor, _words(label)): label for found in labels for factor, label in found.items()}
    edited = {_words(source): target for source, target in pairs.items()}
    if strangers := [source for source in pairs if _words(source) not in {words for _, words in known}]:
        some = ", ".join(sorted(set(known.values()))[:10])
        raise ValueError(f"no row of {path} has the label {' or '.join(map(repr, strangers))}; its labels are {some}")
    # What is edited decides on the column to judge by: other columns tell nothing of it.
    factors = [factor for factor in _LABELS if any((factor, source) in known for source in edited)]
    trials = []
    for row, found in zip(rows, labels, strict=True):
        targets = {f: edited[_words(found[f])] for f in factors if f in found and _words(found[f]) in edited}
        after = row.get("target_prompt") or _replaced(row["prompt"], {found[f]: t for f, t in targets.items()}, path)
        for factor, target in targets.items():
            aim = known.get((factor, _words(target)), target)
            trials.append(Trial(row["prompt"], "efficacy", after, factor, found[factor], aim))
        if not targets:
            judged = [factor for factor in factors if factor in found] or list(found)[:1]
            trials += [Trial(row["prompt"], "specificity", "", factor, found[factor]) for factor in judged]
    return list(dict.fromkeys(trials))


def _replaced(prompt: str, targets: Mapping[str, str], path: str | os.PathLike) -> str:
    """The prompt with targets in the place of labels, which may have an underscore where the prompt has a space."""
    for label, target in targets.items():
        spans = find_spans(prompt, label) or find_spans(prompt, label.replace("_", " "))
        if not spans:
            raise ValueError(
                f"{path} has the label {label!r} for the prompt {prompt!r}, which does not say so, and no telling what"
                " to draw instead: add a column target_prompt"
            )
        for start, stop in reversed(spans):
            prompt = prompt[:start] + target + prompt[stop:]
    return " ".join(prompt.split())


def _words(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).casefold()
