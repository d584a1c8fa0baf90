"""Stable Diffusion XL: two text encoders read side by side, and a pooled embedding added to the U-Net's time."""

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from mediation.families.unet import StableDiffusion, TextOutput


class StableDiffusionXL(StableDiffusion):
    """Facts about `StableDiffusionXLPipeline`, where they differ from those of Stable Diffusion.

    The U-Net reads both encoders' penultimate states, side by side in the features of each token, and the second
    encoder's pooled embedding. So the last layer of `text_encoder` changes nothing, and that of `text_encoder_2` only
    the pooled embedding. Micro-conditioning (sizes and crops) is the pipeline's default, the same for every row.
    """

    name = "stable-diffusion-xl"
    pipelines = ("StableDiffusionXLPipeline",)
    image_pipelines = ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    text_encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    n_unread_layers: ClassVar = {"text_encoder": 1}
    output_projections: ClassVar = StableDiffusion.output_projections | {
        "text_encoder_2": StableDiffusion.output_projections["text_encoder"]
    }

    @staticmethod
    def text_doors(unet: nn.Module) -> list[str]:
        """Paths of every module of the denoiser that reads text; the pooled embedding enters by the first."""
        return ["add_embedding", *StableDiffusion.text_doors(unet)]

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the denoiser reads of `prompts`, as keyword arguments of the pipeline's call, one row per prompt."""
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    @staticmethod
    def encode_negative(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
        """What the unconditional half reads: zeros, unless `force_zeros_for_empty_prompt` is off."""
        _, states, _, pooled = pipe.encode_prompt("", do_classifier_free_guidance=True)
        return {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}

    @staticmethod
    def denoise(
        pipe: DiffusionPipeline,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the denoiser predicts of scaled latents at timesteps (row,), reading `conditioning` as of `encode`."""
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device, dtype=latents.dtype)
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": sizes.expand(len(latents), -1)}
        states = conditioning["prompt_embeds"]
        return pipe.unet(latents, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample

    @staticmethod
    def text_outputs(pipe: DiffusionPipeline) -> list[TextOutput]:
        """Which text encoder gives which part of what `encode` returns."""
        n_first = pipe.text_encoder.config.hidden_size
        return [
            TextOutput("prompt_embeds", "text_encoder", slice(n_first)),
            TextOutput("prompt_embeds", "text_encoder_2", slice(n_first, None)),
            TextOutput("pooled_prompt_embeds", None, slice(None)),
        ]

    @staticmethod
    def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], (row, 3, height, width), of final latents, without the pipeline's watermark."""
        with _without_overflow(pipe.vae) as vae:
            latents = latents.to(vae.dtype) / vae.config.scaling_factor
            mean, std = _moments(vae, latents)
            images = vae.decode(latents * std + mean, return_dict=False)[0]
        return pipe.image_processor.postprocess(images, output_type="pt")

    @staticmethod
    def encode_images(pipe: DiffusionPipeline, pixels: torch.Tensor) -> torch.Tensor:
        """Latents that `decode` makes images of, from pixels in [-1, 1], (row, 3, height, width)."""
        with _without_overflow(pipe.vae) as vae:
            latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
            mean, std = _moments(vae, latents)
            return (latents - mean) / std * vae.config.scaling_factor


@contextlib.contextmanager
def _without_overflow(vae: nn.Module) -> Iterator[nn.Module]:
    """The VAE, for a while in float32 if half precision is too narrow for it."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            vae.to(torch.float16)


def _moments(vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation by channel of what the VAE calls latents, 0 and 1 where it does not say."""
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    return tuple(torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
