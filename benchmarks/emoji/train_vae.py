"""Trains the autoencoder of Emoji Diffusion.

Loss: `distortion` + 2e-6 KL. Group norms keep several channels per group: with few, they erase colour.

Run: python -m benchmarks.emoji.train_vae --output runs/emoji
"""

import diffusers
import numpy
import torch
import torch.nn.functional as F

from benchmarks.emoji import training, world


def build() -> diffusers.AutoencoderKL:
    """The untrained autoencoder: 64×64 images to 16×16 latents with 4 channels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 distance of horizontal and vertical finite differences."""
    return sum(F.l1_loss(a.diff(dim=dim), b.diff(dim=dim)) for dim in (2, 3))


def distortion(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 distance, twice the squared one, and that of the image gradients."""
    return F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images) + gradient_loss(decoded, images)


@torch.no_grad()
def psnr(vae: diffusers.AutoencoderKL, n: int = 256, seed: int = 1) -> float:
    """Mean PSNR in dB of reconstructions (from the posterior's mode) of `n` held-out renders, peak 1."""
    images, _ = world.batch(numpy.random.default_rng(seed), n, "held_out")
    values = []
    for chunk in images.split(64):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((decoded - chunk) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def main() -> None:
    """Trains, then writes `vae/` with the scaling factor that gives latents unit variance."""
    options = training.arguments(__doc__.splitlines()[0], steps=2300, batch_size=16, lr=2e-3)
    vae = build().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, weight_decay=1e-4)
    run = training.Run(options.output, "vae", {"vae": vae, "optimizer": optimizer}, every_seconds=300)
    rng = numpy.random.default_rng((options.seed, run.step))
    while run.step < options.steps:
        images, _ = world.batch(rng, options.batch_size)
        with training.fast_arithmetic():
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean()
        error = distortion(decoded.float(), images)
        loss = error + 2e-6 * kl
        training.descend(loss, vae, [optimizer], options.lr * training.warmup_cosine(run.step, options.steps))
        run.step += 1
        if run.step % 50 == 0:
            run.log(loss=loss, distortion=error, kl=kl)
        if run.due():
            run.save()
    run.save()
    vae.eval()
    with torch.no_grad():
        images, _ = world.batch(rng, 1024)
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    run.log(psnr=psnr(vae), scaling_factor=vae.config.scaling_factor)
    vae.save_pretrained(options.output / "vae")


if __name__ == "__main__":
    main()
