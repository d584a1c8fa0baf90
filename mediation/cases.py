"""Cases: a prompt, the subject in it, and how the subject is corrupted."""

import dataclasses
import numbers
import re
import weakref
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

# torch's generators take 64 bits, and the noise of stochastic samplers has the seed behind a case's
_MAX_SEED = 2**64 - 2

TOKEN_GROUPS = ("bos", "before", "subject", "last_subject", "after", "eos", "padding", "all")


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_text(**texts) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"the {name} must be text, got {text!r}")


def _check_where(where: str) -> None:
    if where not in ("input", "output"):
        raise ValueError(f'where must be "input" or "output", got {where!r}')


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Adds Gaussian noise to the subject's tokens (Basu et al. 2024, arXiv:2310.13730; ROME, arXiv:2202.05262).

    Args:
        scale: standard deviation of the noise, in standard deviations of what it is added to: an encoder's token
            embedding table for `where="input"`, its output for this prompt for `where="output"`.
        draws: independent noises per case.
        where: "input" corrupts the token embeddings of every text encoder, "output" what the denoiser reads: each
            encoder's states at the subject's tokens and, where there is one, the pooled embedding as a whole, since it
            carries the subject too and has no tokens.

    Example:
        >>> GaussianNoise(scale=3.0, draws=2)
        GaussianNoise(scale=3.0, draws=2, where='input')
    """

    scale: float = 3.0
    draws: int = 1
    where: Literal["input", "output"] = "input"

    def __post_init__(self):
        if isinstance(self.scale, str | bool):
            raise TypeError(f"scale must be a number, got {self.scale!r}")
        # numbers of numpy and torch would not go into a map's attributes
        object.__setattr__(self, "scale", float(self.scale))
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not (_is_integer(self.draws) and self.draws >= 1):
            raise ValueError(f"draws must be a positive integer, got {self.draws!r}")
        object.__setattr__(self, "draws", int(self.draws))
        _check_where(self.where)

    def noise(self, shape: tuple[int, ...], seed: int, draw: int, stream: int = 0) -> torch.Tensor:
        """Standard normal noise that depends on the case's seed, the draw and the stream alone, never on the batch."""
        state = int(numpy.random.SeedSequence([seed, draw, stream]).generate_state(1, numpy.uint64)[0])
        return torch.randn(shape, generator=torch.Generator().manual_seed(state % 2**63))


@dataclasses.dataclass(frozen=True)
class ReplaceSubject:
    """Replaces the subject by another text, which may take another number of tokens.

    Tokens are aligned span by span from the end, so that last subject tokens meet; surplus tokens have no partner.

    Example:
        >>> Case("a cat in the style of ink", subject="ink", corruption=ReplaceSubject("noto")).corrupted_prompt
        'a cat in the style of noto'
    """

    text: str
    draws: ClassVar[int] = 1

    def __post_init__(self):
        _check_text(text=self.text)
        if not self.text.strip():
            raise ValueError("the text that replaces the subject is empty")


@dataclasses.dataclass(frozen=True)
class ZeroSubject:
    """Sets the embeddings of the subject's tokens to zero, which is no draw of anything: one per case.

    Args:
        where: "input" or "output", as of `GaussianNoise`: the token embeddings of every text encoder, or what the
            denoiser reads of the subject's tokens and of a pooled embedding.

    Example:
        >>> Case("a cat in the style of ink", subject="ink", corruption=ZeroSubject()).corrupted_prompt
        'a cat in the style of ink'
    """

    where: Literal["input", "output"] = "input"
    draws: ClassVar[int] = 1

    def __post_init__(self):
        _check_where(self.where)


Corruption = GaussianNoise | ReplaceSubject | ZeroSubject


@dataclasses.dataclass(frozen=True)
class Case:
    """One causal experiment: a prompt, its subject, a corruption and a seed.

    The subject is matched as whole words, whatever their case; where it occurs several times, every occurrence is
    corrupted, since any of them could give the concept away.

    Args:
        prompt: the caption.
        subject: words of the prompt that carry the attribute under study.
        corruption: `GaussianNoise(...)`, `ReplaceSubject(...)` or `ZeroSubject(...)`.
        seed: of the starting latent and of the noise, from 0 to 2⁶⁴ − 2.

    Raises:
        ValueError: if the subject is not in the prompt, or a generator cannot have the seed.

    Example:
        >>> Case("a cat in the style of ink", subject="ink").spans
        ((22, 25),)
    """

    prompt: str
    subject: str
    corruption: Corruption = GaussianNoise()
    seed: int = 0

    def __post_init__(self):
        _check_text(prompt=self.prompt, subject=self.subject)
        if not self.subject.strip():
            raise ValueError("the subject is empty: name the words of the prompt to corrupt")
        if not self.spans:
            inside = self.subject.lower() in self.prompt.lower()
            hint = "it occurs only inside a longer word" if inside else "it must occur word for word"
            raise ValueError(f"the subject {self.subject!r} is not in the prompt {self.prompt!r}: {hint}")
        if not isinstance(self.corruption, Corruption):
            raise TypeError(
                "corruption must be a GaussianNoise, ReplaceSubject or ZeroSubject, got"
                f" {type(self.corruption).__name__}"
            )
        if not _is_integer(self.seed) or not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 2, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Character spans (start, stop) of the subject in the prompt."""
        return find_spans(self.prompt, self.subject)

    @property
    def corrupted_prompt(self) -> str:
        """The text of the corrupted run."""
        return self._corrupted()[0]

    @property
    def corrupted_spans(self) -> tuple[tuple[int, int], ...]:
        """Character spans of what stands for the subject in the corrupted run's text."""
        return self._corrupted()[1]

    def _corrupted(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        if not isinstance(self.corruption, ReplaceSubject):
            return self.prompt, self.spans
        text, spans, position = "", [], 0
        for start, stop in self.spans:
            text += self.prompt[position:start]
            spans.append((len(text), len(text) + len(self.corruption.text)))
            text += self.corruption.text
            position = stop
        return text + self.prompt[position:], tuple(spans)


def find_spans(prompt: str, subject: str) -> tuple[tuple[int, int], ...]:
    """Character spans of every occurrence of `subject` as whole words in `prompt`, whatever their case."""
    pattern = rf"(?<!\w){re.escape(subject.strip())}(?!\w)"
    return tuple(match.span() for match in re.finditer(pattern, prompt, flags=re.IGNORECASE))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive token positions of one kind: bos, before, subject, after, eos or padding."""

    kind: str
    positions: tuple[int, ...]


def segments(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    spans: tuple[tuple[int, int], ...],
    *,
    offsets: Sequence[tuple[int, int]] | None = None,
) -> list[Segment]:
    """Splits a prompt's tokens at the subject's character spans.

    Args:
        tokenizer: any tokenizer with a beginning and an end token; its `model_max_length` is the window.
        prompt: the text.
        spans: character spans of the subject.
        offsets: of its tokens, if `located_tokens` has told them already.

    Returns:
        bos, before, then (subject, after) for every span, eos, padding; positions may be empty but for the subject.

    Raises:
        ValueError: if a subject token falls outside the window.
    """
    if offsets is None:
        (located,) = located_tokens(tokenizer, [prompt])
        offsets = located.offsets
    window = tokenizer.model_max_length
    parts: list[list[int]] = [[] for _ in range(2 * len(spans) + 1)]  # gap, span, gap, span, …, gap
    part = 0
    for position, (start, stop) in enumerate(offsets[1:-1], start=1):
        while part // 2 < len(spans) and start >= spans[part // 2][part % 2]:
            part += 1
        overlaps = part % 2 == 0 and part // 2 < len(spans) and stop > spans[part // 2][0]
        parts[part + overlaps].append(position)
    n_tokens = len(offsets)
    for i, span in enumerate(spans):
        words = prompt[slice(*span)]
        if not parts[2 * i + 1]:
            raise ValueError(f"{words!r} has no token of its own in {prompt!r}")
        if parts[2 * i + 1][-1] > window - 2:
            raise ValueError(
                f"the subject {words!r} is truncated: its last token is number {parts[2 * i + 1][-1]} of {prompt!r},"
                f" and the text encoder's window of {window} holds {window - 2}; shorten the prompt"
            )
    eos = min(n_tokens, window) - 1
    kinds = ["before", *(("subject", "after") * len(spans))]
    middle = [Segment(k, tuple(p for p in part if p < eos)) for k, part in zip(kinds, parts, strict=True)]
    return [Segment("bos", (0,)), *middle, Segment("eos", (eos,)), Segment("padding", tuple(range(eos + 1, window)))]


def group_positions(layout: list[Segment]) -> dict[str, tuple[int, ...]]:
    """Token positions by group name, for every name in `TOKEN_GROUPS`."""
    groups = {kind: tuple(p for s in layout if s.kind == kind for p in s.positions) for kind in TOKEN_GROUPS}
    groups["last_subject"] = groups["subject"][-1:]
    groups["all"] = tuple(p for segment in layout for p in segment.positions)
    return groups


def align(clean: list[Segment], corrupted: list[Segment]) -> dict[int, int]:
    """Maps token positions of the clean prompt to those of the corrupted one, segment by segment from the end."""
    return {
        position: partner
        for a, b in zip(clean, corrupted, strict=True)
        for position, partner in zip(reversed(a.positions), reversed(b.positions), strict=False)
    }


class LocatedTokens(NamedTuple):
    """Ids of an untruncated prompt's tokens, bos and eos included, and the characters (start, stop) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def located_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[LocatedTokens]:
    """The tokens of many prompts, by one call of the tokenizer, whose own cost is that of many prompts.

    Raises:
        ValueError: if the tokenizer is a slow one, and its tokens cannot be located.
    """
    options = {"padding": False, "truncation": False, "verbose": False, "return_attention_mask": False}
    if tokenizer.is_fast:
        encoded = tokenizer(list(prompts), return_offsets_mapping=True, **options)
        return list(map(LocatedTokens, encoded["input_ids"], encoded["offset_mapping"]))
    known, fast = _FAST.get(tokenizer, (None, None))
    if known != len(tokenizer):  # a conversion leaves out tokens that were added, and more can be added later
        fast = convert_slow_tokenizer(tokenizer)
        fast.add_tokens(list(tokenizer.added_tokens_decoder.values()))
        _FAST[tokenizer] = len(tokenizer), fast
    found = []
    for prompt, ids in zip(prompts, tokenizer(list(prompts), **options)["input_ids"], strict=True):
        offsets = list(fast.encode(prompt).offsets)
        if len(offsets) != len(ids):
            raise ValueError(
                f"the tokens of {prompt!r} cannot be located with this {type(tokenizer).__name__}: use a fast one"
            )
        found.append(LocatedTokens(ids, offsets))
    return found


# by slow tokenizer: its size when it was converted, and its conversion
_FAST: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
