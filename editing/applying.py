"""Writing edits into a pipeline and taking them out again, bit by bit.

Every change keeps a copy of what it replaced, in a stack per parameter. The stacks hang on the module that holds the
parameter, so they end with it, and pipelines that share a network share them.
"""

import contextlib
import dataclasses
import hashlib
import weakref
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import nn

from editing.updates import Update
from mediation.parameters import canonical, check_precision, is_read, locate, mismatch, sha256


@dataclasses.dataclass(frozen=True, eq=False)
class _Change:
    edit: str
    before: torch.Tensor
    result: str  # SHA-256 of what was written

    def intact(self, weight: torch.Tensor) -> bool:
        return weight.dtype == self.before.dtype and sha256(weight) == self.result


_CHANGES: weakref.WeakKeyDictionary[nn.Module, dict[str, list[_Change]]] = weakref.WeakKeyDictionary()


def apply(pipe: DiffusionPipeline, updates: Mapping[str, Update], base: Mapping | None) -> None:
    """Adds an edit's updates to a pipeline's weights: all of them, or none if anything goes wrong.

    Args:
        pipe: the pipeline.
        updates: by parameter name; equal ones take them back.
        base: fingerprints by parameter name; None skips the comparison.

    Raises:
        RuntimeError: if this edit is already applied to the pipeline.
        ValueError: if the pipeline lacks a parameter, or has it quantized, or does not read it, or has another base, or
            the sum overflows its dtype.
    """
    edit, places = _digest(updates), {name: locate(pipe, name) for name in updates}
    for name, place in places.items():
        if any(change.edit == edit for change in _stack(*place)):
            raise RuntimeError(f"this edit is already applied to {name}: revert it first, or apply edit.scaled(2)")
        if not is_read(pipe, name):
            raise ValueError(
                f"nothing reads {name} as the pipeline is: its attention's projections were fused, or unfused, since"
                " the edit was made. Call pipe.unfuse_qkv_projections() or pipe.fuse_qkv_projections() first"
            )
        _check(name, place, updates[name], base)
    with contextlib.ExitStack() as undo:
        for name, place in places.items():
            result = _sum(name, _parameter(*place), updates[name])
            change = _Change(edit, _parameter(*place).detach().clone(), sha256(result))
            undo.callback(_write, *place, change.before)
            _write(*place, result)
            _stack(*place).append(change)
            undo.callback(_stack(*place).remove, change)
        undo.pop_all()


def revert(pipe: DiffusionPipeline, updates: Mapping[str, Update]) -> None:
    """Puts back the weights that an edit replaced, bit by bit: all of them, or none.

    Raises:
        RuntimeError: if the edit is not applied to the pipeline, or the weights were changed or fused since.
    """
    edit, places = _digest(updates), {name: locate(pipe, name) for name in updates}
    for name, place in places.items():
        stack, weight = _stack(*place), _parameter(*place)
        if not any(change.edit == edit for change in stack):
            raise RuntimeError(f"this edit is not applied to {name} of this pipeline")
        if stack[-1].edit != edit:
            raise RuntimeError(f"another edit was applied to {name} later, and is still there: revert that one first")
        # What was fused later keeps the change; what was fused when it was edited is gone once that is undone.
        if not is_read(pipe, name) and not name.endswith(("to_kv.weight", "to_qkv.weight")):
            raise RuntimeError(
                f"{name} was fused with others since the edit was applied, and reverting would not be seen: call"
                " pipe.unfuse_qkv_projections() first"
            )
        if weight.dtype != stack[-1].before.dtype:
            raise RuntimeError(
                f"{name} was {stack[-1].before.dtype} when the edit was applied and is {weight.dtype} now: what was"
                " replaced is gone in this dtype. Load the pipeline again; next time revert before moving it"
            )
        if not stack[-1].intact(weight):
            raise RuntimeError(
                f"{name} was changed by something else since the edit was applied, and reverting would lose that:"
                " undo it, or load the pipeline again"
            )
    for place in places.values():
        _write(*place, _stack(*place)[-1].before)
        _stack(*place).pop()


def _digest(updates: Mapping[str, Update]) -> str:
    """Tells edits apart by what they change: one that was loaded again is the same."""
    tensors = {(canonical(name), part): x for name, update in updates.items() for part, x in update.tensors.items()}
    return hashlib.sha256(repr({key: (x.shape, sha256(x)) for key, x in sorted(tensors.items())}).encode()).hexdigest()


def _check(name: str, place: tuple[nn.Module, str], update: Update, base: Mapping | None) -> None:
    weight, stack = _parameter(*place), _stack(*place)
    check_precision(name, weight)
    if tuple(weight.shape) != tuple(update.shape):
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, the edit is for {tuple(update.shape)}")
    if base is None:
        return
    if (problem := mismatch(weight, base[name])) is None:
        return
    # Edits made for the same base may lie on top of each other.
    under = [change.before for change in stack] if stack and stack[-1].intact(weight) else []
    if all(mismatch(before, base[name]) for before in under):
        raise ValueError(
            f"this edit was made for another base model: of {name}, {problem}. Pass force=True to apply it all the same"
        )


def _sum(name: str, weight: torch.Tensor, update: Update) -> torch.Tensor:
    result = update.changed(weight.detach().cpu()).to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(f"the edited {name} is not finite in {weight.dtype}: scale the edit down, or use float32")
    return result


@torch.no_grad()
def _write(module: nn.Module, attribute: str, values: torch.Tensor) -> None:
    # In place: optimizers, compiled graphs and tied modules keep seeing the same parameter.
    _parameter(module, attribute).copy_(values)


def _parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    return getattr(module, attribute)


def _stack(module: nn.Module, attribute: str) -> list[_Change]:
    return _CHANGES.setdefault(module, {}).setdefault(attribute, [])
