"""Contradictions in what a text encoder is asked for: concepts that are one to it, and tokens with two aims.

A causal encoder reads a token with all that stands before it, and nothing else. Tokens that agree in that have the same
key, whatever prompts they are in, and can have one value only.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Use(NamedTuple):
    """A concept, or a whole prompt, as the user wrote it, and whether it is edited or preserved."""

    words: str
    is_edited: bool
    is_prompt: bool


class Aim(NamedTuple):
    """What a token is to be read as: as those with `contexts` in the prompts `targets`, which may be itself."""

    prompt: str
    position: int
    targets: tuple[str, ...]
    contexts: dict[bytes, float]  # to their shares
    is_prompt: bool  # and preserved as a whole


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
    """All that one text encoder is asked for, by what it reads.

    Attributes:
        tokenizer: of the encoder.
        uses: whether something is a whole prompt, and the ids of its tokens -> what it is.
        aims: context of a token -> what it is to be read as.
    """

    tokenizer: PreTrainedTokenizerBase
    uses: Mapping[tuple[bool, tuple[int, ...]], Use] = dataclasses.field(default_factory=dict)
    aims: Mapping[bytes, Aim] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Ledger") -> "Ledger":
        """Both ledgers in one; raises as `enter` does."""
        return self.enter(other.uses.items(), other.aims.items())

    def enter(
        self, uses: Iterable[tuple[tuple[bool, tuple[int, ...]], Use]], aims: Iterable[tuple[bytes, Aim]]
    ) -> "Ledger":
        """A ledger of this and more.

        Raises:
            ValueError: if two sources are one concept to the encoder, or a concept is to be edited and preserved, or
                something is preserved twice, or a token is to be read in two ways.
        """
        return Ledger(self.tokenizer, _entered(self.uses, uses, _clash), _entered(self.aims, aims, self._contradiction))

    def _contradiction(self, a: Aim, b: Aim) -> str | None:
        if a.contexts == b.contexts:
            return None
        ids = self.tokenizer(a.prompt, verbose=False)["input_ids"][: a.position + 1]
        words = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        for kept, other in ((a, b), (b, a)):
            if kept.is_prompt:
                return (
                    f"the prompt {kept.prompt!r} cannot be preserved: up to {words!r} it is read as {other.prompt!r}"
                    " is, whose token there is edited"
                )
        return (
            f"{a.prompt!r} and {b.prompt!r} contradict each other: up to {words!r} the text encoder reads both alike,"
            f" and cannot read on as in {_joined(a.targets)} and as in {_joined(b.targets)}. Leave out one of the"
            " concepts, or take other templates or tokens"
        )


def _joined(prompts: Iterable[str]) -> str:
    return " or ".join(map(repr, prompts))


def contexts(ids: Sequence[int]) -> list[bytes]:
    """For each token, a digest of it and all before it, which takes less room than these tokens would.

    Example:
        >>> a, b = contexts([7, 1, 5]), contexts([7, 1, 6])
        >>> [x == y for x, y in zip(a, b, strict=True)]
        [True, True, False]
    """
    running, found = hashlib.blake2b(digest_size=16), []
    for token in ids:
        running.update(token.to_bytes(4, "big"))
        found.append(running.copy().digest())
    return found


def _entered(known: Mapping, entries: Iterable[tuple], clash: Callable[..., str | None]) -> dict:
    entered = dict(known)
    for key, entry in entries:
        if key not in entered:
            entered[key] = entry
        elif problem := clash(entered[key], entry):
            raise ValueError(problem)
    return entered


def _clash(a: Use, b: Use) -> str:
    if a.is_edited and b.is_edited:
        return f"{a.words!r} and {b.words!r} are one concept to the text encoder: name one target"
    first, second = (b, a) if b.is_edited else (a, b)
    if first.is_edited:
        return f"{second.words!r} would be edited and preserved: to the text encoder it is {first.words!r}"
    what = "the prompt " if a.is_prompt else ""
    return f"{what}{b.words!r} would be preserved twice: to the text encoder it is {a.words!r}; give weights instead"
