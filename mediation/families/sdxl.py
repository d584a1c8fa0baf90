"""Stable Diffusion XL: two text encoders read side by side, and a pooled embedding added to the U-Net's time."""

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
        vae = pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # it overflows in half precision
        latents = latents.to(torch.float32 if upcast else vae.dtype) / vae.config.scaling_factor
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
            latents = latents * std + mean
        if upcast:
            vae.to(torch.float32)
        try:
            images = vae.decode(latents, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(torch.float16)
        return pipe.image_processor.postprocess(images, output_type="pt")
