"""Refines the autoencoder's decoder; the encoder stays, and with it the latents that the denoiser draws.

The loss is the distortion that `train_vae` minimises; the optimizer is the denoiser's.

Run: python -m benchmarks.emoji.refine_vae --output runs/emoji
"""

import diffusers
import numpy

from benchmarks.emoji import training, world
from benchmarks.emoji.train_unet import optimizers
from benchmarks.emoji.train_vae import distortion, psnr


def main() -> None:
    """Refines the weights in `vae/`, then writes `vae_refined/`."""
    options = training.arguments(__doc__.splitlines()[0], steps=1200, batch_size=16, lr=1e-3)
    vae = diffusers.AutoencoderKL.from_pretrained(options.output / "vae").float().requires_grad_(False)
    decoder = vae.decoder.train().requires_grad_(True)
    both = optimizers(decoder, options.lr)
    run = training.Run(options.output, "vae_refined", {"decoder": decoder} | both, every_seconds=300)
    rng = numpy.random.default_rng((options.seed, run.step))
    while run.step < options.steps:
        images, _ = world.batch(rng, options.batch_size)
        with training.fast_arithmetic():
            decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample
        loss = distortion(decoded.float(), images)
        training.descend(loss, decoder, both.values(), options.lr * training.warmup_cosine(run.step, options.steps))
        run.step += 1
        if run.step % 50 == 0:
            run.log(distortion=loss)
        if run.due():
            run.save()
    run.save()
    decoder.eval()
    run.log(psnr=psnr(vae))
    vae.save_pretrained(options.output / "vae_refined")


if __name__ == "__main__":
    main()
