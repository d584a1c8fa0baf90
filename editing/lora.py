"""LoRA files in the two dialects that others read: diffusers' (PEFT) and kohya's (A1111, ComfyUI).

Factors go into the file as they are, with alpha = rank, so that a loader's scale of 1 gives the edit itself. Within a
network all ranks are filled up with zeros to the largest one: loaders apply one alpha to all of its layers.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import nn

from editing.updates import LowRank
from mediation import tensorfiles
from mediation.families import FAMILIES
from mediation.parameters import canonical
from mediation.pipelines import family_of
from mediation.provenance import pipeline_class

FORMATS = ("diffusers", "kohya")
# (down, up); diffusers does not recognise PEFT's names in a file that changes nothing but MLPs of a text encoder
_PEFT = ("lora_A.weight", "lora_B.weight")
_DIFFUSERS = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
_ATTENTION = ("lora.down.weight", "lora.up.weight")  # diffusers' names in a U-Net
_KOHYA = ("lora_down.weight", "lora_up.weight")


def write(path: str | os.PathLike, updates: Mapping[str, LowRank], metadata: Mapping, *, format: str) -> None:
    """Writes an edit's updates to one LoRA file, with the edit's metadata in its header.

    Raises:
        ValueError: if `format` is unknown, the path does not end in ".safetensors", or an update has no factors.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    path = tensorfiles.checked_path(path)
    for name, update in updates.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"the change of {name} has no low-rank factors: use editing.export_pipeline instead")
    tensors = {}
    for network in dict.fromkeys(name.partition(".")[0] for name in updates):
        inside = {name: update for name, update in updates.items() if name.startswith(f"{network}.")}
        rank = max(update.rank for update in inside.values())
        down, up = _endings(network, inside, format)
        for name, update in inside.items():
            stem = _kohya_stem(name, _n_text_encoders(metadata)) if format == "kohya" else _stem(name)
            missing = rank - update.rank
            tensors[f"{stem}.{down}"] = torch.cat([update.down, torch.zeros(missing, update.shape[1])])
            tensors[f"{stem}.{up}"] = torch.cat([update.up, torch.zeros(update.shape[0], missing)], dim=1)
            if format == "kohya":
                tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    note = {key: value for key, value in metadata.items() if key != "base"}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "edit": json.dumps(note, ensure_ascii=False)})


def read(path: str | os.PathLike, pipe: DiffusionPipeline) -> tuple[dict[str, LowRank], dict]:
    """Reads a LoRA file of either dialect: updates by the pipeline's parameter names, and the note of `write`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no LoRA file, or changes what the pipeline has not, or something else than matrices, or
            its header does not fit its factors.
    """
    tensors, header = tensorfiles.read_tensors(path)
    names = dict(_known_stems(pipe))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part = _split(key, path)
        if stem not in names:
            raise ValueError(f"{path} changes {stem!r}, which is no linear layer of this {type(pipe).__name__}")
        parts.setdefault(names[stem], {})[part] = tensor.to(torch.float32)
    updates, adapters = {}, json.loads(header.get("lora_adapter_metadata", "{}"))
    for name, found in parts.items():
        if not {"down", "up"} <= set(found):
            raise ValueError(f"{path} is incomplete: of {name} it has {' and '.join(sorted(found))} only")
        if found["down"].ndim != 2 or found["up"].ndim != 2:
            raise ValueError(f"{path} changes {name} by a convolution, not by a matrix")
        if not (rank := len(found["down"])):
            raise ValueError(f"{path} changes {name} by factors of rank 0, which is no change")
        scale = float(found["alpha"]) / rank if "alpha" in found else _scale(name, rank, adapters, path)
        updates[name] = LowRank(found["up"] * scale, found["down"])
    if not updates:
        raise ValueError(f"{path} is no LoRA file: it is empty")
    return updates, json.loads(header.get("edit", "{}"))


def _split(key: str, path: str | os.PathLike) -> tuple[str, str]:
    """The layer that a key of a LoRA file is about, and what it holds of it: down, up or alpha."""
    for endings in (_PEFT, _DIFFUSERS, _ATTENTION, _KOHYA):
        for part, ending in zip(("down", "up"), endings, strict=True):
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), part
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    raise ValueError(f"{path} has {key!r}, which is no part of a plain LoRA of the diffusers or kohya format")


def _scale(name: str, rank: int, adapters: Mapping, path: str | os.PathLike) -> float:
    """What PEFT multiplies a layer's factors by: alpha / rank, of the header; 1 where that says nothing of its network.

    Raises:
        ValueError: if the header states another rank than the factors have, or no number for alpha.
    """
    network = name.partition(".")[0]
    said = {key: adapters.get(f"{network}.{key}") for key in ("r", "lora_alpha", "use_rslora")}
    if said["r"] is None and said["lora_alpha"] is None:
        return 1.0
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        said[key] = _by_pattern(adapters.get(f"{network}.{pattern}") or {}, name, said[key])
    if said["r"] != rank or not isinstance(said["lora_alpha"], int | float):
        raise ValueError(
            f"{path} changes {name} by factors of rank {rank}, and says in its header that the rank is {said['r']} and"
            f" lora_alpha {said['lora_alpha']}: how strong the change is meant to be cannot be told"
        )
    return said["lora_alpha"] / (math.sqrt(rank) if said["use_rslora"] else rank)


def _by_pattern(patterns: Mapping[str, object], name: str, default: object) -> object:
    """What the first pattern says that matches the end of a layer's path in its network, as PEFT looks it up."""
    paths = {stem.removesuffix(".weight").partition(".")[2] for stem in (name, canonical(name))}
    matching = (key for key in patterns if any(re.fullmatch(rf"(.*\.)?({key})", path) for path in paths))
    return patterns.get(next(matching, None), default)


def _endings(network: str, updates: Mapping[str, LowRank], format: str) -> tuple[str, str]:
    if format == "kohya":
        return _KOHYA
    only_mlps = network.startswith("text_encoder") and all(".mlp." in name for name in updates)
    return _DIFFUSERS if only_mlps else _PEFT


def _stem(name: str) -> str:
    return canonical(name).removesuffix(".weight")


def _kohya_stem(name: str, n_text_encoders: int) -> str:
    network, _, path = _stem(name).partition(".")
    first = "te" if n_text_encoders == 1 else "te1"
    prefix = {"text_encoder": first, "text_encoder_2": "te2", "text_encoder_3": "te3"}.get(network, network)
    return f"lora_{prefix}_{path.replace('.', '_')}"


def _n_text_encoders(metadata: Mapping) -> int:
    found = pipeline_class(metadata)
    return next((len(family.text_encoders) for family in FAMILIES if found in family.pipelines), 1)


def _known_stems(pipe: DiffusionPipeline) -> Iterator[tuple[str, str]]:
    """How either dialect calls each linear layer, and the parameter that is."""
    family = family_of(pipe)
    for network in (*(encoder for encoder, _ in family.text_encoders), family.denoiser):
        for path, module in getattr(pipe, network).named_modules():
            if isinstance(module, nn.Linear):
                name = f"{network}.{path}.weight"
                yield _stem(name), name
                yield _kohya_stem(name, len(family.text_encoders)), name
