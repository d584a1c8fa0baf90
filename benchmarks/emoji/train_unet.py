"""Trains the denoiser of Emoji Diffusion on latents and frozen text states.

Epsilon prediction with a loss weighted by signal-to-noise ratio, 10% empty captions, stratified timesteps, an
exponential moving average. An eighth of every batch is rendered and encoded anew, the rest is drawn from a buffer of
earlier latents.

Run: python -m benchmarks.emoji.train_unet --output runs/emoji
To go on from the bundled weights: add --initialize mediation/bundled/emoji/pipeline/unet
"""

import pathlib

import diffusers
import numpy
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor

from benchmarks.emoji import training, world
from benchmarks.emoji.tokenizer import encode

MAX_WEIGHT = 5.0
MIN_SNR = 0.03
EMPTY_CAPTIONS = 0.1


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


def scheduler() -> diffusers.DDIMScheduler:
    """The noise schedule of SD 1.x."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Latents:
    """Latents and text states of rendered scenes: a ring that is refilled as it is drawn from."""

    def __init__(self, folder: pathlib.Path, rng: numpy.random.Generator, size: int = 30_000):
        self.rng, self.size = rng, size
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").float().eval().requires_grad_(False)
        clip = transformers.CLIPModel.from_pretrained(folder / "clip", attn_implementation="eager")
        self.text_encoder = text_encoder(clip.float()).eval().requires_grad_(False)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.empty = self.states([""])
        self.latents = torch.empty(size, 4, 16, 16)
        self.text = torch.empty(size, *self.empty.shape[1:], dtype=torch.bfloat16)
        self.filled = self.position = 0

    @torch.no_grad()
    def states(self, prompts: list[str]) -> torch.Tensor:
        """What the denoiser reads of `prompts`: (prompt, 32, 192)."""
        ids, _ = encode(self.tokenizer, prompts)
        return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def refill(self, n: int) -> None:
        """Renders and encodes `n` new scenes over the oldest ones."""
        images, captions = world.batch(self.rng, n)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.vae.encode(images).latent_dist.sample().float() * self.vae.config.scaling_factor
            text = self.states([caption.text for caption in captions])
        where = (torch.arange(n) + self.position) % self.size
        self.latents[where], self.text[where] = latents, text.bfloat16()
        self.position = (self.position + n) % self.size
        self.filled = min(self.size, self.filled + n)

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` latents and their text states, a tenth of these replaced by the empty prompt's."""
        where = torch.from_numpy(self.rng.integers(0, self.filled, n))
        text = self.text[where].float()
        text[torch.from_numpy(self.rng.random(n) < EMPTY_CAPTIONS)] = self.empty
        return self.latents[where], text


def text_encoder(clip: transformers.CLIPModel) -> transformers.CLIPTextModel:
    """The text tower of `clip` as the pipeline's text encoder, sharing its weights' values."""
    model = transformers.CLIPTextModel(clip.config.text_config)
    state = clip.text_model.state_dict()
    wanted = model.state_dict()
    prefix = "text_model." if any(key.startswith("text_model.") for key in wanted) else ""
    model.load_state_dict({prefix + key: value for key, value in state.items() if prefix + key in wanted})
    return model


def weighted_loss(unet, alphas_cumprod: torch.Tensor, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error of the predicted noise at stratified random timesteps.

    In terms of the picture's error, noise/signal times the noise's, the weight is that of v-prediction, SNR + 1, at
    most 5. An unweighted error of the noise hardly counts what is wrong at high noise, where only the text tells what
    to draw.
    """
    n = len(latents)
    strata = (torch.randperm(n) + torch.rand(n)) / n
    timesteps = (strata * len(alphas_cumprod)).long()
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timesteps, text).sample
    snr = (alpha / (1 - alpha)).flatten()
    weight = (snr + 1).clamp(max=MAX_WEIGHT) / snr.clamp(min=MIN_SNR)
    return (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()


def warm_average(decay: float):
    """An exponential moving average whose memory grows with training, up to `decay`, so the start is forgotten."""

    @torch.no_grad()
    def update(averages, values, n_averaged):
        torch._foreach_lerp_(averages, values, float(1 - min(decay, (1 + n_averaged) / (10 + n_averaged))))

    return update


def main() -> None:
    """Trains, and writes the averaged weights as `unet/` at every checkpoint."""
    options = training.arguments(
        __doc__.splitlines()[0], steps=4800, batch_size=64, lr=1e-3, ema=0.998, fresh=0.125, initialize=""
    )
    unet = build().train()
    if options.initialize:
        unet.load_state_dict(diffusers.UNet2DConditionModel.from_pretrained(options.initialize).state_dict())
    unet.set_attn_processor(AttnProcessor())  # plain attention: its backward is faster than the fused one's on CPU
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=warm_average(options.ema))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    run = training.Run(options.output, "unet", {"unet": unet, "average": average, "adamw": optimizer})
    rng = numpy.random.default_rng((options.seed, run.step))
    torch.manual_seed(options.seed + run.step)
    data = Latents(options.output, rng)
    while data.filled < 4096:
        data.refill(256)
    unet.compile()  # takes minutes before the first step
    alphas = scheduler().alphas_cumprod
    pending, losses = 0.0, []
    while run.step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * training.warmup_cosine(run.step, options.steps)
        pending += options.fresh * options.batch_size
        if pending >= 256:
            data.refill(256)
            pending -= 256
        loss = weighted_loss(unet, alphas, *data.draw(options.batch_size))
        unet.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        run.step += 1
        losses.append(loss.item())
        if run.step % 50 == 0:
            run.log(loss=numpy.mean(losses), images_per_second=run.step * options.batch_size / run.elapsed())
            losses = []
        if run.due() or run.step == options.steps:
            run.save()
            average.module.save_pretrained(options.output / "unet")


if __name__ == "__main__":
    main()
