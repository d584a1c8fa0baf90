"""Parameters of a pipeline: their names, where they are, and fingerprints that tell one model from another."""

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.models.clip import modeling_clip

from mediation.families.unet import unread_projections
from mediation.pipelines import family_of, tokenizers_of
from mediation.sites import Site, resolve, sites

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_kv", "to_qkv")
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


def is_read(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether the pipeline reads a parameter: an attention reads its projections one by one, or fused, not both."""
    layer, _, _ = name.rpartition(".")
    owner, _, projection = layer.rpartition(".")
    if projection not in _PROJECTIONS:
        return True
    network, _, path = owner.partition(".")
    return projection not in unread_projections(getattr(pipe, network).get_submodule(path))


def choose(pipe: DiffusionPipeline, chosen: Site | str | Sequence[Site | str] | None) -> dict[str, Site]:
    """Names of parameters of the denoiser and the text encoders, each with the site that it is part of.

    LoRA layers that are loaded are no part of the model: what they are wrapped around has the name that it has without
    them.

    Args:
        pipe: the pipeline.
        chosen: sites, which stand for all their weights, biases and norms left out; globs that match names of sites;
            or, where no site has such a name, globs that match names of parameters. None is the feed-forwards of the
            denoiser.

    Returns:
        Name -> site, in execution order. What is in no site comes last, each module as a site of component "other",
        with layer -1.

    Raises:
        KeyError: if an entry matches nothing.
        TypeError: if one is neither a site nor a name.
        ValueError: if a site is a single head, or there are no entries, or a parameter is quantized.

    Example:
        >>> import mediation
        >>> list(choose(mediation.load_pipeline(), "unet.mid.0.feed_forward"))  # doctest: +NORMALIZE_WHITESPACE
        ['unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight',
         'unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight']
    """
    family = family_of(pipe)
    every = {
        f"{network}.{path}": parameter
        for network in (*tokenizers_of(pipe), family.denoiser)
        for path, parameter in _own_parameters(getattr(pipe, network))
    }
    if chosen is None:
        chosen = sites(pipe, network=family.denoiser, component="feed_forward")
    entries = [chosen] if isinstance(chosen, Site | str) else list(chosen)
    if not entries:
        raise ValueError("no parameters were given: pass None for the feed-forwards, or sites, or names")
    wanted = {name for entry in entries for name in _matching(pipe, entry, every)}
    for name in wanted:
        check_precision(name, every[name])
    named = [name for name in every if name in wanted]
    inside = {name: site for site in sites(pipe) for name in named if name.startswith(f"{site.network}.{site.path}.")}
    return inside | {name: _elsewhere(name) for name in named if name not in inside}


def _own_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, parameter in network.named_parameters():
        if ".lora_" not in path:
            yield path.replace(".base_layer.", "."), parameter


def _matching(pipe: DiffusionPipeline, entry: Site | str, every: dict[str, nn.Parameter]) -> list[str]:
    if isinstance(entry, str):
        found = [site for site in sites(pipe) if fnmatch.fnmatchcase(site.name, entry)]
        if not found and (names := fnmatch.filter(every, entry)):
            return names
        if not found:
            names = ", ".join(list(every)[:2])
            raise KeyError(f"{entry!r} matches no site and no parameter of a network; parameters look like {names}")
    else:
        ((entry,),) = resolve(pipe, [entry])
        if entry.head is not None:
            raise ValueError(f"{entry.name} is a single head, which has no weights of its own: name its attention")
        found = [entry]
    paths = [f"{site.network}.{site.path}." for site in found]
    return [name for name in every if every[name].ndim > 1 and name.startswith(tuple(paths))]


def _elsewhere(name: str) -> Site:
    network, _, path = name.rpartition(".")[0].partition(".")
    return Site(f"{network}.{path}.other", network, "other", -1, "", path)


def check_precision(name: str, weight: torch.Tensor) -> None:
    """Checks that a weight is stored in a dtype that can be computed with.

    Raises:
        ValueError: if it is in 8 bits or fewer, or in integers.
    """
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}: load the pipeline in float32, float16 or"
            " bfloat16, without quantization and without layerwise casting"
        )


def fingerprint(pipe: DiffusionPipeline, name: str) -> dict:
    """What identifies a weight: its network's class, shape, dtype, Frobenius norm, and SHA-256.

    The hash is taken in every dtype that the weight may be loaded in later.

    Raises:
        ValueError: if the pipeline has no such weight, or it is offloaded or quantized.
    """
    module, attribute = locate(pipe, name)
    weight = getattr(module, attribute).detach().cpu()
    check_precision(name, weight)
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


def digest(pipe: DiffusionPipeline) -> str:
    """A name for all weights of a pipeline together, in hexadecimal: what they are called, their dtypes, sums of bits.

    The sums take one pass over the weights, where they are: much less than a step of sampling. They tell of any weight
    that changes, however little; but weights that trade places in one parameter go unnoticed.
    """
    return digest_of({part: network for part, network in pipe.components.items() if isinstance(network, nn.Module)})


def digest_of(networks: Mapping[str, nn.Module]) -> str:
    """The same of networks by name."""
    running, integers = hashlib.sha256(), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for part, network in sorted(networks.items()):
        for name, tensor in network.state_dict().items():
            flat = tensor.detach().reshape(-1)
            # What is offloaded layer by layer has a name and a shape only.
            total = "" if tensor.is_meta else int(flat.view(integers[flat.element_size()]).sum())
            running.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)} {total}\n".encode())
    return running.hexdigest()


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's values in memory, in hexadecimal."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy()).hexdigest()


def _dtype(weight: torch.Tensor) -> str:
    name = str(weight.dtype).removeprefix("torch.")
    return "float32" if name == "float64" else name
