"""Stable Diffusion 1.x and 2.x: a U-Net that reads one CLIP text encoder through cross-attention."""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn


class Spot(NamedTuple):
    """One module that computes something: its kind, its position in words, its block, and its path in the network."""

    component: str
    position: str
    block: str
    path: str


class StableDiffusion:
    """Facts about `StableDiffusionPipeline`."""

    name = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    # (text encoder, its tokenizer), in the order in which they run
    text_encoders = (("text_encoder", "tokenizer"),)
    # the halves of the denoiser's batch under classifier-free guidance, in their order
    guidance_halves = ("uncond", "cond")
    # where a component's output is projected, below its path: what an edit rewrites
    output_projections: ClassVar = {
        "text_encoder": {"self_attention": "out_proj", "mlp": "fc2"},
        "unet": {
            "self_attention": "to_out.0",
            "cross_attention": "to_out.0",
            "feed_forward": "net.2",
            "resnet": "conv2",
        },
    }

    @staticmethod
    def text_spots(text_encoder: nn.Module) -> Iterator[Spot]:
        """Attention and MLP of every layer of a CLIP text encoder, in execution order."""
        # transformers < 5.6 nests the transformer in `text_model`; later versions flattened CLIPTextModel only.
        prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
        for layer in range(text_encoder.config.num_hidden_layers):
            below = f"{prefix}encoder.layers.{layer}"
            yield Spot("self_attention", str(layer), str(layer), f"{below}.self_attn")
            yield Spot("mlp", str(layer), str(layer), f"{below}.mlp")

    @staticmethod
    def denoiser_spots(unet: nn.Module) -> Iterator[Spot]:
        """ResNets, attentions and feed-forwards of the U-Net, in execution order: down, mid, up."""
        for i, block in enumerate(unet.down_blocks):
            yield from _block_spots(block, f"down.{i}", f"down_blocks.{i}")
        yield from _block_spots(unet.mid_block, "mid", "mid_block")
        for i, block in enumerate(unet.up_blocks):
            yield from _block_spots(block, f"up.{i}", f"up_blocks.{i}")

    @staticmethod
    def text_doors(unet: nn.Module) -> list[str]:
        """Paths of every module of the denoiser that reads text."""
        return [
            f"{path}.{name}"
            for path, module in unet.named_modules()
            if path.endswith("attn2")
            for name in ("to_k", "to_v")
        ]

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the denoiser reads of `prompts`, as keyword arguments of the pipeline's call, one row per prompt."""
        embeddings, _ = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
        return {"prompt_embeds": embeddings}

    @staticmethod
    def latent_shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
        """Shape of one starting latent: (channel, height, width)."""
        side = pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return pipe.unet.config.in_channels, height, width

    @staticmethod
    def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], (row, 3, height, width), of final latents."""
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return pipe.image_processor.postprocess(images, output_type="pt")

    @staticmethod
    def problem(pipe: DiffusionPipeline) -> str | None:
        """Why this pipeline of the right class cannot be traced, if so."""
        missing = [name for name in ("unet", "vae", "text_encoder", "tokenizer") if getattr(pipe, name) is None]
        if missing:
            return f"it has no {', '.join(missing)}"
        return None


def _block_spots(block: nn.Module, position: str, path: str) -> Iterator[Spot]:
    attentions = getattr(block, "attentions", None) or ()
    for i in range(len(block.resnets)):
        yield Spot("resnet", f"{position}.{i}", position, f"{path}.resnets.{i}")
        if i < len(attentions):  # the mid block ends in a ResNet, and some blocks have no attention
            yield from _transformer_spots(attentions[i], f"{position}.{i}", position, f"{path}.attentions.{i}")


def _transformer_spots(transformer: nn.Module, position: str, block: str, path: str) -> Iterator[Spot]:
    inner = transformer.transformer_blocks
    for i in range(len(inner)):
        where = position if len(inner) == 1 else f"{position}.{i}"
        for component, name in (("self_attention", "attn1"), ("cross_attention", "attn2"), ("feed_forward", "ff")):
            yield Spot(component, where, block, f"{path}.transformer_blocks.{i}.{name}")
