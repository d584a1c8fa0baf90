"""Files of tensors: safetensors, with readable JSON in the header and a checksum over everything."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from mediation.parameters import sha256

_REMEDY = "save it again"


def write(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Mapping], kind: str
) -> None:
    """Writes tensors and a header whose entries are JSON objects, as a file of this kind, such as "editing.Edit/1".

    Tensors may lie in memory in any order (channels_last); files hold them in that of their dimensions.

    Raises:
        ValueError: if the path does not end in ".safetensors", or the header is no JSON.
    """
    path = checked_path(path)
    texts = {key: json.dumps(value, allow_nan=False, ensure_ascii=False) for key, value in header.items()}
    texts["format"] = kind
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(contiguous, metadata=texts | {"sha256": _checksum(tensors, texts)})
    path.write_bytes(content)


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file of this kind, or is truncated, or was changed since it was written.
    """
    tensors, texts = read_tensors(path)
    if texts.get("format") != kind:
        found = texts.get("format", "no format at all")
        what = kind.partition(".")[2].partition("/")[0].lower()
        raise ValueError(f"{path} is no {what} file: its header should name the format {kind!r}, and names {found!r}")
    if texts.pop("sha256", None) != _checksum(tensors, texts):
        raise ValueError(f"{path} was tampered with, or damaged: its checksum does not match; {_REMEDY}")
    return tensors, {key: json.loads(text) for key, text in texts.items() if key != "format"}


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of any safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or is truncated.
    """
    path = checked_path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - file is no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file ({error}): {_REMEDY}") from error
    return tensors, texts


def checked_path(path: str | os.PathLike) -> pathlib.Path:
    """The path, if it ends in ".safetensors".

    Raises:
        ValueError: if it ends otherwise.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"files of tensors end in .safetensors (pickles can run code, and are refused), got {path.name!r}"
        )
    return path


def _checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    described = {name: [str(tensor.dtype), list(tensor.shape), sha256(tensor)] for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([described, dict(texts)], sort_keys=True).encode()).hexdigest()
