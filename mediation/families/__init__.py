"""What is known of each diffusion architecture: facts, and no algorithms."""

from mediation.families.unet import StableDiffusion

FAMILIES = (StableDiffusion,)

__all__ = ["FAMILIES", "StableDiffusion"]
