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
    n_heads: int = 0


class TextOutput(NamedTuple):
    """A part of what `encode` returns: its keyword and features, and the text encoder whose tokens are its positions.

    A pooled embedding has no positions and no encoder here.
    """

    keyword: str
    encoder: str | None
    features: slice


class StableDiffusion:
    """Facts about `StableDiffusionPipeline`."""

    name = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline",)
    # pipelines of the same networks that start from an image
    image_pipelines = ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    denoiser = "unet"
    # (text encoder, its tokenizer), in the order in which they run
    text_encoders = (("text_encoder", "tokenizer"),)
    # classes of text encoders in which no token reads a later one
    causal_text_encoders = ("CLIPTextModel", "CLIPTextModelWithProjection")
    # of each text encoder, how many of its last layers change nothing that the denoiser reads; 0 where absent
    n_unread_layers: ClassVar[dict[str, int]] = {}
    # the halves of the denoiser's batch under classifier-free guidance, in their order
    guidance_halves = ("uncond", "cond")
    # where a component's output is projected, below its path: what an edit rewrites, and what reads its heads
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
        """Attention and MLP of every layer of a CLIP text encoder, then the layer itself, in execution order."""
        # transformers < 5.6 nests the transformer in `text_model`; later versions flattened CLIPTextModel only.
        prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
        for layer in range(text_encoder.config.num_hidden_layers):
            path = f"{prefix}encoder.layers.{layer}"
            n_heads = text_encoder.config.num_attention_heads
            yield Spot("self_attention", str(layer), str(layer), f"{path}.self_attn", n_heads)
            yield Spot("mlp", str(layer), str(layer), f"{path}.mlp")
            yield Spot("block", str(layer), str(layer), path)

    @staticmethod
    def denoiser_spots(unet: nn.Module) -> Iterator[Spot]:
        """Whatever computes in each block, then the block, in execution order: down, mid, up.

        These are ResNets, attentions, feed-forwards and the transformers that hold the last two.
        """
        for i, block in enumerate(unet.down_blocks):
            yield from _block_spots(block, f"down.{i}", f"down_blocks.{i}")
        if unet.mid_block is not None:
            yield from _block_spots(unet.mid_block, "mid", "mid_block")
        for i, block in enumerate(unet.up_blocks):
            yield from _block_spots(block, f"up.{i}", f"up_blocks.{i}")

    @staticmethod
    def text_doors(unet: nn.Module) -> list[str]:
        """Paths of every module of the denoiser that reads text."""
        doors = []
        for path, module in unet.named_modules():
            if path.endswith("attn2"):
                doors += [f"{path}.to_kv"] if _is_fused(module) else [f"{path}.to_k", f"{path}.to_v"]
        return doors

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the denoiser reads of `prompts`, as keyword arguments of the pipeline's call, one row per prompt."""
        embeddings, _ = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
        return {"prompt_embeds": embeddings}

    @staticmethod
    def encode_negative(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
        """What the unconditional half reads where the user gave no negative prompt, likewise, in one row."""
        _, embeddings = pipe.encode_prompt("", pipe._execution_device, 1, True)
        return {"negative_prompt_embeds": embeddings}

    @staticmethod
    def text_outputs(_pipe: DiffusionPipeline) -> list[TextOutput]:
        """Which text encoder gives which part of what `encode` returns."""
        return [TextOutput("prompt_embeds", "text_encoder", slice(None))]

    @staticmethod
    def denoise(
        pipe: DiffusionPipeline,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the denoiser predicts of scaled latents at timesteps (row,), reading `conditioning` as of `encode`."""
        return pipe.unet(latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"]).sample

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
    def encode_images(pipe: DiffusionPipeline, pixels: torch.Tensor) -> torch.Tensor:
        """Latents that `decode` makes images of, from pixels in [-1, 1], (row, 3, height, width)."""
        return pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode() * pipe.vae.config.scaling_factor

    @classmethod
    def problem(cls, pipe: DiffusionPipeline) -> str | None:
        """Why nothing can be done with this pipeline of the right class, if so."""
        parts = ("unet", "vae", *(name for pair in cls.text_encoders for name in pair))
        missing = [name for name in parts if getattr(pipe, name) is None]
        if missing:
            return f"it has no {', '.join(missing)}"
        return None

    @staticmethod
    def sampling_problem(pipe: DiffusionPipeline) -> str | None:
        """Why this pipeline cannot sample images from text alone, guided in two halves, if so."""
        n_inputs, n_latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if n_inputs != n_latents:
            return (
                f"its U-Net reads {n_inputs} channels and latents have {n_latents}: it needs an image beside the text"
            )
        if pipe.unet.config.time_cond_proj_dim is not None:
            return "its U-Net takes the guidance scale as an input, and has no unconditional half"
        if pipe.unet.config.encoder_hid_dim_type == "ip_image_proj":
            return "it has an IP-Adapter, whose image is no part of a case: unload it first"
        return None


def unread_projections(attention: nn.Module) -> tuple[str, ...]:
    """Which of its projections an attention does not read: fused ones, or those that were fused."""
    if not _is_fused(attention):
        return "to_qkv", "to_kv"
    return ("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v")


def _is_fused(attention: nn.Module) -> bool:
    # Only the processor says whether fused projections are in use: unfusing leaves them in place.
    return "Fused" in type(getattr(attention, "processor", None)).__name__


def _block_spots(block: nn.Module, position: str, path: str) -> Iterator[Spot]:
    attentions = getattr(block, "attentions", None) or ()
    for i in range(len(block.resnets)):
        yield Spot("resnet", f"{position}.{i}", position, f"{path}.resnets.{i}")
        if i < len(attentions):  # the mid block ends in a ResNet, and some blocks have no attention
            yield from _transformer_spots(attentions[i], f"{position}.{i}", position, f"{path}.attentions.{i}")
            yield Spot("transformer", f"{position}.{i}", position, f"{path}.attentions.{i}")
    yield Spot("block", position, position, path)


def _transformer_spots(transformer: nn.Module, position: str, block: str, path: str) -> Iterator[Spot]:
    layers = transformer.transformer_blocks
    for i, layer in enumerate(layers):
        where = position if len(layers) == 1 else f"{position}.{i}"
        below = f"{path}.transformer_blocks.{i}"
        yield Spot("self_attention", where, block, f"{below}.attn1", layer.attn1.heads)
        yield Spot("cross_attention", where, block, f"{below}.attn2", layer.attn2.heads)
        yield Spot("feed_forward", where, block, f"{below}.ff")
