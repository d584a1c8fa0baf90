"""Trains the denoiser of Emoji Diffusion on latents and frozen text states.

Epsilon prediction with a loss weighted by signal-to-noise ratio, 10% empty captions, stratified timesteps, an
exponential moving average; Muon for the matrices, AdamW for the rest. A sixteenth of every batch is rendered and
encoded anew, the rest is drawn from a buffer of earlier latents. The denoiser learns from whitened text states; what is
saved reads the text encoder's own.

With `--critic 0.1`, a critic should also read in predicted latents what the captions say. What tells styles apart is a
small part of the squared error, and learned late. (A classifier's loss on predictions is known as reward feedback: Xu
et al., ImageReward, arXiv:2304.05977; here predictions are made of real latents, not of samples.)

Run: python -m benchmarks.emoji.train_unet --output runs/emoji
To go on from the bundled weights: add --initialize mediation/bundled/emoji/pipeline/unet
"""

import diffusers
import numpy
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor

from benchmarks.emoji import training, world
from benchmarks.emoji.latents import Latents, noised, scheduler
from benchmarks.emoji.muon import Muon
from benchmarks.emoji.train_critic import Critic

HIGHEST_READ = 800  # the timestep up to which predicted latents show what the critic may read
HIGHEST_NOISE = 400  # and up to which they get new noise before
MAX_WEIGHT = 5.0
MIN_SNR = 0.03
TIMESTEP_POWER = 0.8  # below 1: more of the high noise, where the text alone tells what to draw


def build() -> diffusers.UNet2DConditionModel:
    """The untrained denoiser: SD 1.x blocks on three levels."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        attention_head_dim=2,  # as in SD 1.x, this is the number of heads
        cross_attention_dim=192,
        norm_num_groups=16,
    )


def denoise(
    unet, alphas: torch.Tensor, latents: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicts the noise that is added at stratified random timesteps, (latent,).

    In terms of the picture's error, noise/signal times the noise's, the weight is that of v-prediction, SNR + 1, at
    most 5. An unweighted error of the noise hardly counts what is wrong at high noise, where only the text tells what
    to draw.

    Returns:
        the weighted mean squared error, the latents without the predicted noise, and the timesteps.
    """
    n = len(latents)
    strata = (torch.randperm(n) + torch.rand(n)) / n
    timesteps = (strata**TIMESTEP_POWER * len(alphas)).long().clamp(max=len(alphas) - 1)
    noisy, noise = noised(latents, alphas[timesteps])
    with training.fast_arithmetic():
        predicted = unet(noisy, timesteps, text).sample.float()
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    weight = (snr + 1).clamp(max=MAX_WEIGHT) / snr.clamp(min=MIN_SNR)
    loss = (weight * (predicted - noise).square().mean((1, 2, 3))).mean()
    alpha = alphas[timesteps][:, None, None, None]
    return loss, (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt(), timesteps


def misread(critic: Critic, alphas: torch.Tensor, latents: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed over factors and latents, of what `critic` reads in `latents` and what captions said.

    Latents get new noise before they are read, so that no small change of them makes the critic read what it should.
    """
    timesteps = torch.randint(0, HIGHEST_NOISE, (len(latents),))
    logits = critic(noised(latents, alphas[timesteps])[0], timesteps)
    said = dict(zip(world.FACTORS, said.T, strict=True))
    return sum(F.cross_entropy(logits[factor], said[factor], reduction="sum") for factor in logits)


def optimizers(unet: torch.nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices and kernels between the first and the last convolution, AdamW for all else."""
    outer = {unet.conv_in.weight, unet.conv_out.weight}
    kernels = [weight for weight in unet.parameters() if weight.ndim > 1 and weight not in outer]
    rest = [weight for weight in unet.parameters() if weight.ndim == 1 or weight in outer]
    return {
        "muon": Muon(kernels, lr=lr, weight_decay=0.01),
        "adamw": torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True),
    }


def warm_average(decay: float):
    """An exponential moving average whose memory grows with training, up to `decay`, so the start is forgotten."""

    @torch.no_grad()
    def update(averages, values, n_averaged):
        torch._foreach_lerp_(averages, values, float(1 - min(decay, (1 + n_averaged) / (10 + n_averaged))))

    return update


def main() -> None:
    """Trains, and writes the averaged weights as `unet/` at every checkpoint."""
    options = training.arguments(
        __doc__.splitlines()[0], steps=4800, batch_size=64, lr=1e-3, ema=0.999, fresh=0.0625, critic=0.0, initialize=""
    )
    if options.critic:
        critic = Critic.from_pretrained(options.output / "critic").eval().requires_grad_(False)
    data = Latents(options.output)
    unet = build()
    if options.initialize:
        plain = diffusers.UNet2DConditionModel.from_pretrained(options.initialize).float()
        unet.load_state_dict(data.whitening.unfold(plain).state_dict())
    unet.train()
    unet.set_attn_processor(AttnProcessor())  # plain attention: its backward is faster than the fused one's on CPU
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=warm_average(options.ema))
    both = optimizers(unet, options.lr)
    run = training.Run(options.output, "unet", {"reads_whitened": unet, "average": average} | both)
    rng = numpy.random.default_rng((options.seed, run.step))
    while data.filled < 4096:
        data.refill(rng, 256)
    if training.BFLOAT16_IS_FAST:  # in float32 it gains nothing
        unet.compile()  # takes minutes before the first step
    alphas = scheduler().alphas_cumprod
    pending, losses = 0.0, []
    while run.step < options.steps:
        pending += options.fresh * options.batch_size
        if pending >= 256:
            data.refill(rng, 256)
            pending -= 256
        latents, text, said = data.draw(rng, options.batch_size)
        loss, clean, timesteps = denoise(unet, alphas, latents, text)
        losses.append([loss.item()])
        if options.critic:
            readable = timesteps < HIGHEST_READ
            error = misread(critic, alphas, clean[readable], said[readable]) / options.batch_size
            losses[-1].append(error.item())
            loss = loss + options.critic * error
        training.descend(loss, unet, both.values(), options.lr * training.warmup_cosine(run.step, options.steps))
        average.update_parameters(unet)
        run.step += 1
        if run.step % 50 == 0:
            means = dict(zip(("loss", "misread"), numpy.mean(losses, 0), strict=False))
            run.log(**means, images_per_second=run.step * options.batch_size / run.elapsed())
            losses = []
        if run.due() or run.step == options.steps:
            run.save()
            data.whitening.fold(average.module).save_pretrained(options.output / "unet")


if __name__ == "__main__":
    main()
