"""Trains the critic that the denoiser learns from: on renders and the renderer's labels, never on generated images.

It reads what latents show through a known amount of noise, in which small changes that would mislead a classifier are
lost. It judges nothing that is reported: that is the probe's part, which sees pictures and shares nothing with it.

Run: python -m benchmarks.emoji.train_critic --output runs/emoji
"""

import math

import numpy
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from benchmarks.emoji import training, world
from benchmarks.emoji.latents import Latents, noised, scheduler

HIGHEST_TIMESTEP = 600  # beyond, latents show little of their style
MIXED = 0.7  # of the backgrounds, which would else tell which triples are in training


class Critic(ModelMixin, ConfigMixin):
    """Reads all factors of the world but the background in latents (latent, 4, 16, 16) with noise of `timesteps`."""

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (64, 128, 192)):
        super().__init__()
        stages, previous = [], 4 + 1
        for stage, width in enumerate(widths):
            for stride in (1 if stage == 0 else 2, 1):
                stages += [nn.Conv2d(previous, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
                previous = width
        self.trunk = nn.Sequential(*stages, nn.Flatten())
        factors = {factor: len(values) for factor, values in world.FACTORS.items() if factor != "background"}
        self.heads = nn.ModuleDict({factor: nn.Linear(previous * 16, n) for factor, n in factors.items()})

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by factor, each (latent, class)."""
        level = (timesteps / 1000).view(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:])
        features = self.trunk(torch.cat([latents, level], 1))
        return {factor: head(features) for factor, head in self.heads.items()}


def main() -> None:
    """Trains, and writes `critic/`."""
    options = training.arguments(__doc__.splitlines()[0], steps=1600, batch_size=128, lr=2e-3, fresh=0.25)
    data = Latents(options.output, jitter=1.0, mixed=MIXED)
    critic = Critic().train()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=options.lr, weight_decay=0.05)
    run = training.Run(options.output, "critic", {"critic": critic, "optimizer": optimizer}, every_seconds=300)
    alphas = scheduler().alphas_cumprod
    rng = numpy.random.default_rng((options.seed, run.step))
    while data.filled < 8192:
        data.refill(rng, 256)
    pending = 0.0
    while run.step < options.steps:
        pending += options.fresh * options.batch_size
        if pending >= 256:
            data.refill(rng, 256)
            pending -= 256
        where = data.indices(rng, options.batch_size)
        timesteps = torch.randint(0, HIGHEST_TIMESTEP, (options.batch_size,))
        logits = critic(noised(data.latents[where], alphas[timesteps])[0], timesteps)
        truth = dict(zip(world.FACTORS, data.labels[where].T, strict=True))
        losses = {factor: F.cross_entropy(logits[factor], truth[factor]) for factor in logits}
        lr = options.lr * training.warmup_cosine(run.step, options.steps)
        training.descend(sum(losses.values()), critic, [optimizer], lr, max_norm=math.inf)
        run.step += 1
        if run.step % 50 == 0:
            run.log(**losses)
        if run.due():
            run.save()
    run.save()
    critic.save_pretrained(options.output / "critic")


if __name__ == "__main__":
    main()
