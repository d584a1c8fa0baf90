"""Parameters of a pipeline: their names, where they are, and fingerprints that tell one model from another."""

import hashlib

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.models.clip import modeling_clip

_CLIP_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
# transformers < 5.6 wraps CLIPTextModel's layers in a module of this name, later versions do not
_WRAPPED = hasattr(modeling_clip, "CLIPTextTransformer")


def canonical(name: str) -> str:
    """The name of a parameter in checkpoints and LoRA files, whatever the layout in memory.

    Example:
        >>> canonical("text_encoder.encoder.layers.0.self_attn.out_proj.weight")
        'text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight'
        >>> canonical("unet.mid_block.resnets.0.conv1.weight")
        'unet.mid_block.resnets.0.conv1.weight'
    """
    network, path = name.split(".", 1)
    wrap = network.startswith("text_encoder") and path.startswith(_CLIP_PARTS)
    return f"{network}.text_model.{path}" if wrap else name


def native(name: str, network_class: str) -> str:
    """The reverse of `canonical`: the name in a network of this class, in the transformers at hand."""
    network, path = name.split(".", 1)
    unwrap = network_class == "CLIPTextModel" and not _WRAPPED
    return f"{network}.{path.removeprefix('text_model.')}" if unwrap else name


def locate(pipe: DiffusionPipeline, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there; `name` may be of either layout.

    Raises:
        ValueError: if the pipeline has no such parameter, or it is offloaded.
    """
    wrapped = canonical(name)
    for candidate in (wrapped, wrapped.replace(".text_model.", ".", 1)):
        network, _, path = candidate.partition(".")
        owner, _, attribute = path.rpartition(".")
        try:
            module = getattr(pipe, network).get_submodule(owner)
            while hasattr(module, "base_layer"):  # an adapter is wrapped around it
                module = module.base_layer
            parameter = module.get_parameter(attribute)
        except AttributeError:
            continue
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded: edit the pipeline before offloading it")
        return module, attribute
    raise ValueError(f"this {type(pipe).__name__} has no parameter {name}: the edit is for another architecture")


def fingerprint(pipe: DiffusionPipeline, name: str) -> dict:
    """What identifies a weight: its network's class, shape, dtype, Frobenius norm, and SHA-256.

    The hash is taken in every dtype that the weight may be loaded in later.
    """
    module, attribute = locate(pipe, name)
    weight = getattr(module, attribute).detach().cpu()
    own = _dtype(weight)
    # Casting rounds, so that a half-precision weight is known in its own dtype alone.
    dtypes = ("float32", "float16", "bfloat16") if own == "float32" else (own,)
    return {
        "network": type(getattr(pipe, name.partition(".")[0])).__name__,
        "shape": list(weight.shape),
        "dtype": own,
        "norm": float(torch.linalg.vector_norm(weight.double())),
        "sha256": {dtype: sha256(weight.to(getattr(torch, dtype))) for dtype in dtypes},
    }


def mismatch(weight: torch.Tensor, expected: dict) -> str | None:
    """Why a weight is not the one that a fingerprint was taken of, or None if it is, in the coarser of both dtypes."""
    own, other = _dtype(weight), expected["dtype"]
    if own != other and "float32" not in (own, other):
        return f"it is {own} and the edit was made in {other}, between which nothing can be compared"
    coarser = other if own == "float32" else own
    if sha256(weight.detach().to(getattr(torch, coarser))) != expected["sha256"][coarser]:
        return "its values differ from those that the edit was made for"
    return None


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's values in memory, in hexadecimal."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy()).hexdigest()


def _dtype(weight: torch.Tensor) -> str:
    name = str(weight.dtype).removeprefix("torch.")
    return "float32" if name == "float64" else name
