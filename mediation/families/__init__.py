"""What is known of each diffusion architecture: facts, and no algorithms."""

from mediation.families.sdxl import StableDiffusionXL
from mediation.families.unet import StableDiffusion

FAMILIES = (StableDiffusion, StableDiffusionXL)

__all__ = ["FAMILIES", "StableDiffusion", "StableDiffusionXL"]
