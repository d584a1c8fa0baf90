"""Trains the denoiser of Emoji Diffusion on latents and frozen text states.

Epsilon prediction with a loss weighted by signal-to-noise ratio, 10% empty captions, stratified timesteps, an
exponential moving average; Muon for the matrices, AdamW for the rest. A sixteenth of every batch is rendered and
encoded anew, the rest is drawn from a buffer of earlier latents. The denoiser learns from whitened text states; what is
saved reads the text encoder's own.

Run: python -m benchmarks.emoji.train_unet --output runs/emoji
To go on from the bundled weights: add --initialize mediation/bundled/emoji/pipeline/unet
"""

import copy
import pathlib

import diffusers
import numpy
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor

from benchmarks.emoji import training, world
from benchmarks.emoji.muon import Muon
from benchmarks.emoji.tokenizer import encode

MAX_WEIGHT = 5.0
MIN_SNR = 0.03
EMPTY_CAPTIONS = 0.1
LEARNED_EARLY = 0.35  # of captions that ask for ink, or for no style, this share is kept
UPRIGHT = 0.7  # and of those that ask for no pose, this
TIMESTEP_POWER = 0.8  # below 1: more of the high noise, where the text alone tells what to draw
JITTER = 0.3  # of the artwork's place and size, as a part of what the other models see: fewer pictures to learn
SMALLEST_VARIANCE = 2e-4  # added to the variance of each principal component, as a part of their sum, before whitening


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


def sample(rng: numpy.random.Generator) -> world.Caption:
    """A caption of the world's training split, where those that are learned late are more frequent.

    Ink was drawn right in every picture while other styles were right in half of them, and objects upside down in a
    third. Only captions are drawn more or less often: what a caption shows stays as likely as in the world.
    """
    while True:
        caption = world.sample(rng)
        is_late = "style" in caption.said and caption.scene.style != "ink"
        share = (1.0 if is_late else LEARNED_EARLY) * (1.0 if "pose" in caption.said else UPRIGHT)
        if rng.random() < share:
            return caption


class Latents:
    """Latents and text states of rendered scenes: a ring that is refilled as it is drawn from."""

    def __init__(self, folder: pathlib.Path, size: int = 30_000):
        self.size = size
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").float().eval().requires_grad_(False)
        clip = transformers.CLIPModel.from_pretrained(folder / "clip", attn_implementation="eager")
        self.text_encoder = text_encoder(clip.float()).eval().requires_grad_(False)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        fixed = numpy.random.default_rng(0)
        self.whitening = Whitening(self.states([world.sample(fixed).text for _ in range(2000)]).flatten(0, 1))
        self.empty = self.whitening(self.states([""]))
        self.latents = torch.empty(size, 4, 16, 16)
        self.text = torch.empty(size, *self.empty.shape[1:], dtype=torch.bfloat16)
        self.filled = self.position = 0

    @torch.no_grad()
    def states(self, prompts: list[str]) -> torch.Tensor:
        """What the denoiser reads of `prompts`: (prompt, 32, 192)."""
        ids, _ = encode(self.tokenizer, prompts)
        return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def refill(self, rng: numpy.random.Generator, n: int) -> None:
        """Renders and encodes `n` new scenes over the oldest ones."""
        captions = [sample(rng) for _ in range(n)]
        images = world.render([caption.scene for caption in captions], rng, JITTER)
        with training.fast_arithmetic():
            latents = self.vae.encode(images).latent_dist.sample().float() * self.vae.config.scaling_factor
            text = self.states([caption.text for caption in captions]).float()
        where = (torch.arange(n) + self.position) % self.size
        self.latents[where], self.text[where] = latents, self.whitening(text).bfloat16()
        self.position = (self.position + n) % self.size
        self.filled = min(self.size, self.filled + n)

    def draw(self, rng: numpy.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` latents and their whitened text states, a tenth of these replaced by the empty prompt's."""
        where = torch.from_numpy(rng.integers(0, self.filled, n))
        text = self.text[where].float()
        text[torch.from_numpy(rng.random(n) < EMPTY_CAPTIONS)] = self.empty
        return self.latents[where], text


class Whitening:
    """The affine map x -> (x - mean) @ root that gives text states zero mean, and most directions unit variance.

    A few directions hold most of the states' variance, those that tell objects apart hold little of it, and gradient
    descent learns the latter late. Cross-attention is linear in the states, so that it can be trained on whitened ones
    and then hold the map in its own weights: the mean moves all keys alike, which the softmax ignores, and all values
    alike, which the bias of the output projection takes up.
    """

    def __init__(self, states: torch.Tensor):
        self.mean = states.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(states.T).double())
        spread = (values + SMALLEST_VARIANCE * values.sum()).sqrt()
        self.root = (vectors / spread @ vectors.T).float()
        self.inverse = (vectors * spread @ vectors.T).float()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Whitens states of shape (…, width)."""
        return (states - self.mean) @ self.root

    @torch.no_grad()
    def fold(self, unet: diffusers.UNet2DConditionModel) -> diffusers.UNet2DConditionModel:
        """A copy of `unet`, which reads whitened states, that reads plain ones and predicts the same."""
        unet = copy.deepcopy(unet)
        for attention in _cross_attention(unet):
            for projection in (attention.to_k, attention.to_v):
                projection.weight.copy_(projection.weight @ self.root)
            attention.to_out[0].bias.sub_(attention.to_out[0].weight @ (attention.to_v.weight @ self.mean))
        return unet

    @torch.no_grad()
    def unfold(self, unet: diffusers.UNet2DConditionModel) -> diffusers.UNet2DConditionModel:
        """A copy of `unet`, which reads plain states, that reads whitened ones and predicts the same."""
        unet = copy.deepcopy(unet)
        for attention in _cross_attention(unet):
            attention.to_out[0].bias.add_(attention.to_out[0].weight @ (attention.to_v.weight @ self.mean))
            for projection in (attention.to_k, attention.to_v):
                projection.weight.copy_(projection.weight @ self.inverse)
        return unet


def _cross_attention(unet) -> list:
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


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
    timesteps = (strata**TIMESTEP_POWER * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    with training.fast_arithmetic():
        predicted = unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timesteps, text).sample
    snr = (alpha / (1 - alpha)).flatten()
    weight = (snr + 1).clamp(max=MAX_WEIGHT) / snr.clamp(min=MIN_SNR)
    return (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()


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
        __doc__.splitlines()[0], steps=4800, batch_size=64, lr=1e-3, ema=0.999, fresh=0.0625, initialize=""
    )
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
        for group in (group for optimizer in both.values() for group in optimizer.param_groups):
            group["lr"] = options.lr * training.warmup_cosine(run.step, options.steps)
        pending += options.fresh * options.batch_size
        if pending >= 256:
            data.refill(rng, 256)
            pending -= 256
        loss = weighted_loss(unet, alphas, *data.draw(rng, options.batch_size))
        unet.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for optimizer in both.values():
            optimizer.step()
        average.update_parameters(unet)
        run.step += 1
        losses.append(loss.item())
        if run.step % 50 == 0:
            run.log(loss=numpy.mean(losses), images_per_second=run.step * options.batch_size / run.elapsed())
            losses = []
        if run.due() or run.step == options.steps:
            run.save()
            data.whitening.fold(average.module).save_pretrained(options.output / "unet")


if __name__ == "__main__":
    main()
