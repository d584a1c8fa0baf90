"""Edits: changes of a pipeline's weights, as values."""

import contextlib
import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline

from editing import applying, lora
from editing.updates import LowRank, Update, assemble, describe_extent, merged_extent
from mediation import tensorfiles
from mediation.parameters import canonical, native

_FORMAT = "editing.Edit/1"


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """A change of some of a pipeline's weights, that can be applied, taken back, scaled, added and saved.

    Attributes:
        updates: parameter name, as "text_encoder.encoder.layers.0.self_attn.out_proj.weight", -> its change.
        report: what the edit achieves by its own measure: residual of each pair before and after, interference with
            what is preserved, size and norms of each parameter's change, milliseconds by stage, and seconds in all.
        metadata: what is needed to make it again, and fingerprints of the weights that it was made for ("base").

    Example:
        >>> import editing, mediation
        >>> pipe = mediation.load_pipeline()
        >>> edit = editing.quickfix(pipe, {"ink": "noto"})
        >>> with edit.applied(pipe):
        ...     image = pipe("a cat in the style of ink", num_inference_steps=2).images[0]
    """

    updates: Mapping[str, Update]
    report: Mapping
    metadata: Mapping

    def __post_init__(self):
        if (based := set(self.metadata["base"])) != set(self.updates):
            raise ValueError(
                f"updates and their bases are of different parameters: {sorted(based ^ set(self.updates))}"
            )
        for field in ("updates", "report", "metadata"):
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))

    def __reduce__(self):
        return Edit, (dict(self.updates), dict(self.report), dict(self.metadata))

    def __repr__(self) -> str:
        extent = describe_extent(merged_extent(update.extent for update in self.updates.values()))
        plural = "" if len(self.updates) == 1 else "s"
        return f"<Edit by {self.metadata['method']}: {len(self.updates)} parameter{plural}, {extent}>"

    def apply(self, pipe: DiffusionPipeline, *, force: bool = False) -> None:
        """Adds the change to the pipeline's weights, in place.

        The sum is taken in float64 and cast to the weights' dtype (by way of float32, if that is half precision).
        Single weights that the edit takes away become 0, whatever others did to them before, and also in another dtype
        than it was made in. If it fails, no weight is changed.

        Args:
            pipe: a pipeline with the weights that the edit was made for, in any dtype, edited by others or not.
            force: applies the edit to other weights too.

        Raises:
            RuntimeError: if this edit is already applied to the pipeline, by another copy of it or not.
            ValueError: if the pipeline lacks a parameter, or has it quantized, or does not read it since projections
                were fused or unfused, or has other weights, or the sum overflows its dtype.

        Example:
            >>> import editing, mediation
            >>> pipe = mediation.load_pipeline()
            >>> edit = editing.quickfix(pipe, {"ink": "noto"})
            >>> edit.apply(pipe)
            >>> edit.revert(pipe)
        """
        applying.apply(pipe, self.updates, None if force else self.metadata["base"])

    def revert(self, pipe: DiffusionPipeline) -> None:
        """Puts the weights back that the edit replaced, bit by bit, if it was applied by another copy of it too.

        Edits of the same parameter are taken back in reverse order; edits of different parameters in any order.

        Raises:
            RuntimeError: if the edit is not applied to this pipeline, or another edit of the same parameter was
                applied later, or the weights were changed, fused or moved to another dtype since.

        Example:
            >>> import editing, mediation
            >>> pipe = mediation.load_pipeline()
            >>> edit = editing.quickfix(pipe, {"ink": "noto"})
            >>> edit.revert(pipe)
            Traceback (most recent call last):
            RuntimeError: this edit is not applied to text_encoder...
        """
        applying.revert(pipe, self.updates)

    @contextlib.contextmanager
    def applied(self, pipe: DiffusionPipeline, *, force: bool = False) -> Iterator[DiffusionPipeline]:
        """Applies the edit for the length of a `with` block, whatever happens in it.

        Args:
            pipe: as for `apply`.
            force: as for `apply`.

        Yields:
            The pipeline.

        Raises:
            RuntimeError: as `apply` and `revert` do.
            ValueError: as `apply` does.

        Example:
            >>> import editing, mediation
            >>> pipe = mediation.load_pipeline()
            >>> ink, cat = editing.quickfix(pipe, {"ink": "noto"}), editing.quickfix(pipe, {"cat": "dog"})
            >>> with ink.applied(pipe), cat.applied(pipe):
            ...     image = pipe("a cat in the style of ink", num_inference_steps=2).images[0]
        """
        self.apply(pipe, force=force)
        try:
            yield pipe
        finally:
            self.revert(pipe)

    def scaled(self, factor: float) -> "Edit":
        """The edit with `factor` times its change; its residuals are not known.

        Raises:
            ValueError: if `factor` is not finite.

        Example:
            >>> import editing, mediation
            >>> edit = editing.quickfix(mediation.load_pipeline(), {"ink": "noto"})
            >>> edit.scaled(0.5).metadata["factor"]
            0.5
        """
        if not math.isfinite(factor):
            raise ValueError(f"the factor must be finite, got {factor}")
        base = self.metadata["base"]
        updates = {name: update.scaled(factor) for name, update in self.updates.items()}
        metadata = {"method": "scaled", "factor": float(factor), "of": [self._origin()], "base": base}
        return Edit(updates, {"parameters": measure(updates, base)}, metadata)

    def compress(self, rank: int) -> "Edit":
        """The nearest edit of at most this rank in every parameter; its report tells what is lost.

        Raises:
            TypeError: if `rank` is no integer.
            ValueError: if it is not positive, or a change has no low-rank factors.

        Example:
            >>> import editing, mediation
            >>> edit = editing.quickfix(mediation.load_pipeline(), {"ink": "noto"})
            >>> edit.compress(1)
            <Edit by compressed: 1 parameter, rank 1>
        """
        if not isinstance(rank, numbers.Integral) or isinstance(rank, bool):
            raise TypeError(f"the rank must be an integer, got {rank!r}")
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        for name, update in self.updates.items():
            if not isinstance(update, LowRank):
                raise ValueError(f"the change of {name} has no low-rank factors, and is of nearly full rank")
        base = self.metadata["base"]
        updates = {name: update.compressed(rank) for name, update in self.updates.items()}
        parameters = measure(updates, base)
        for name, update in self.updates.items():
            lost, norm = (update + updates[name].scaled(-1)).norm(), update.norm()
            parameters[name]["relative_error"] = lost / norm if norm else 0.0
        metadata = {"method": "compressed", "rank": int(rank), "of": [self._origin()], "base": base}
        return Edit(updates, {"parameters": parameters}, metadata)

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits at once; they must be made for the same base.

        Single weights that both take away are taken once. Low-rank changes are added to what is left of them.

        Raises:
            ValueError: if they change a common parameter of different bases.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        updates, base = dict(self.updates), self.metadata["base"] | other.metadata["base"]
        for name, update in other.updates.items():
            if name in updates and self.metadata["base"][name] != other.metadata["base"][name]:
                raise ValueError(f"the edits were made for different bases: they disagree on {name}")
            updates[name] = updates[name] + update if name in updates else update
        metadata = {"method": "sum", "of": [self._origin(), other._origin()], "base": base}
        return Edit(updates, {"parameters": measure(updates, base)}, metadata)

    def _origin(self) -> dict:
        return {key: value for key, value in self.metadata.items() if key != "base"}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the edit to one safetensors file, with everything but its changes as JSON in the header.

        A low-rank change is kept as its factors, one of single weights as their indices and values.

        Args:
            path: ends in ".safetensors".

        Raises:
            ValueError: if `path` ends otherwise.

        Example:
            >>> import editing, mediation, tempfile
            >>> edit = editing.quickfix(mediation.load_pipeline(), {"ink": "noto"})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     edit.save(f"{folder}/ink.safetensors")
            ...     editing.load(f"{folder}/ink.safetensors").metadata["pairs"]
            {'ink': 'noto'}
        """
        tensors = {
            f"{canonical(name)}.{part}": tensor
            for name, update in self.updates.items()
            for part, tensor in update.tensors.items()
        }
        header = {"metadata": dict(self.metadata), "report": dict(self.report)}
        tensorfiles.write(path, tensors, _renamed(header, canonical), _FORMAT)

    def export_lora(self, path: str | os.PathLike, *, format: str = "diffusers") -> None:
        """Writes the change to one LoRA file, exactly: loaded at scale 1, it does what the edit does.

        Args:
            path: ends in ".safetensors".
            format: "diffusers" for `pipe.load_lora_weights`, "kohya" for A1111, ComfyUI and others.

        Raises:
            ValueError: if `format` is unknown, `path` ends otherwise, or a change has no low-rank factors.

        Example:
            >>> import editing, mediation, tempfile
            >>> edit = editing.quickfix(mediation.load_pipeline(), {"ink": "noto"})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     edit.export_lora(f"{folder}/ink.safetensors", format="kohya")
        """
        lora.write(path, self.updates, self.metadata, format=format)


def load(path: str | os.PathLike) -> Edit:
    """Reads an edit that `Edit.save` wrote; nothing in the file is ever run.

    Args:
        path: ends in ".safetensors".

    Returns:
        The edit, with parameter names in the layout of the installed transformers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no edit file, or is truncated, or was changed since it was written.

    Example:
        >>> import editing, mediation, tempfile
        >>> pipe = mediation.load_pipeline()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     editing.quickfix(pipe, {"ink": "noto"}).save(f"{folder}/ink.safetensors")
        ...     edit = editing.load(f"{folder}/ink.safetensors")
        >>> with edit.applied(pipe):
        ...     image = pipe("a cat in the style of ink", num_inference_steps=2).images[0]
    """
    tensors, header = tensorfiles.read(path, _FORMAT)
    base = header["metadata"]["base"]
    local = {name: native(name, record["network"]) for name, record in base.items()}
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in local}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        parts[name][part] = tensor
    # Ablations take all of each weight, where their file does not say so.
    share = 1.0 if header["metadata"]["method"] in ("cad_erase", "cad_amplify") else 0.0
    updates = {local[name]: assemble(base[name]["shape"], found, share=share) for name, found in parts.items()}
    return Edit(updates, **_renamed(header, local.__getitem__))


def measure(updates: Mapping[str, Update], base: Mapping[str, Mapping]) -> dict[str, dict]:
    """Rank or number of changed weights of every update, its Frobenius norm, and that relative to the parameter's."""
    measures = {}
    for name, update in updates.items():
        norm, whole = update.norm(), base[name]["norm"]
        measures[name] = update.extent | {"norm": norm, "relative_norm": norm / whole if whole else None}
    return measures


def _renamed(header: Mapping[str, Mapping], rename: Callable[[str], str]) -> dict[str, dict]:
    """The header with other parameter names, wherever it names parameters."""
    tables = {"metadata": "base", "report": "parameters"}
    return {
        section: {
            key: {rename(name): record for name, record in value.items()} if key == tables[section] else value
            for key, value in content.items()
        }
        for section, content in header.items()
    }
