"""Trains the attribute probe on renders and the renderer's labels, never on generated images.

Blur, noise and tint are augmented, so that the probe reads what a picture shows and not how it was drawn.

Run: python -m benchmarks.emoji.train_probe --output runs/emoji
"""

import math

import numpy
import torch
import torch.nn.functional as F

from benchmarks.emoji import training, world
from benchmarks.emoji.judging import on_renders
from mediation.bundled.probe import AttributeProbe


def augment(images: torch.Tensor) -> torch.Tensor:
    """Degrades two thirds of the images in [0, 1], at random: resolution, tint, noise."""
    n = len(images)
    clean = images
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.lerp(images, blurred, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.4))
    images = images * (1 + 0.06 * torch.randn(n, 3, 1, 1).clamp(-1, 1))
    images = images + torch.rand(n, 1, 1, 1) * 0.05 * torch.randn_like(images)
    return torch.where(torch.rand(n, 1, 1, 1) < 1 / 3, clean, images)


def main() -> None:
    """Trains, then writes `probe/`."""
    options = training.arguments(__doc__.splitlines()[0], steps=2700, batch_size=128, lr=2e-3)
    probe = AttributeProbe({factor: list(values) for factor, values in world.FACTORS.items()}).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=options.lr, weight_decay=0.05)
    run = training.Run(options.output, "probe", {"probe": probe, "optimizer": optimizer}, every_seconds=300)
    rng = numpy.random.default_rng((options.seed, run.step))
    while run.step < options.steps:
        images, captions = world.batch(rng, options.batch_size)
        truth = world.labels([caption.scene for caption in captions])
        with training.fast_arithmetic():
            logits = probe(augment((images + 1) / 2))
        losses = {factor: F.cross_entropy(logits[factor].float(), truth[factor]) for factor in truth}
        lr = options.lr * training.warmup_cosine(run.step, options.steps)
        training.descend(sum(losses.values()), probe, [optimizer], lr, max_norm=math.inf)
        run.step += 1
        if run.step % 50 == 0:
            run.log(**losses)
        if run.due():
            run.save()
    run.save()
    probe.eval()
    run.log(**{factor: found["accuracy"] for factor, found in on_renders(probe).items()})
    probe.save_pretrained(options.output / "probe")


if __name__ == "__main__":
    main()
