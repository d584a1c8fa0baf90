"""Trains the autoencoder that comes with Emoji Diffusion, on captions of its world, and packs it into the package.

It reads the transformer "unet.up.1.0" at the first step: 128 features, 512 latents, 8 of them active; 0.5 MB.

Run: python -m benchmarks.emoji.train_sae --output runs/emoji/sae        goes on where it was interrupted
Cost: 600,000 positions are ten windows of 1,024 pictures, of which one step is run: 2 minutes on two cores that
evaluate 90 rows per second, and then training; it took 7 minutes on one core that had other work, too.
"""

import argparse
import pathlib

import numpy
import torch

import mediation
from benchmarks.emoji import world
from benchmarks.emoji.package import BUNDLE

N_CAPTIONS = 4000
N_POSITIONS = 600_000
_SETTINGS = {"site": "unet.up.1.0", "steps": (1.0,), "n_latents": 512, "k": 8, "seed": 0}


def captions(n: int, *, seed: int) -> list[str]:
    """Captions of scenes that training of the denoiser may have shown."""
    rng = numpy.random.default_rng(seed)
    return [world.sample(rng).text for _ in range(n)]


def main() -> None:
    """Trains, and writes the autoencoder into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("runs/emoji/sae"), help="for the checkpoint"
    )
    parser.add_argument("--positions", type=int, default=N_POSITIONS)
    parser.add_argument("--steps", type=int, default=25, help="sampler steps, of which only the first is run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = mediation.load_pipeline()
    pipe.register_to_config(_name_or_path="Emoji Diffusion")  # in what is recorded: not a folder of this machine
    sae = mediation.train_sae(
        pipe,
        captions(N_CAPTIONS, seed=0),
        **_SETTINGS,
        recipe=mediation.Recipe(n_positions=options.positions),
        num_inference_steps=options.steps,
        guidance_scale=1.0,  # which has changed nothing yet at the first step, and halves the cost
        checkpoint=options.output / "training.safetensors",
    )
    sae.save_pretrained(BUNDLE / "sae")
    print(sae, sae.metadata["training"]["history"][-1])


if __name__ == "__main__":
    main()
