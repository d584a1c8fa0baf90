"""What the denoiser and its critic learn from: latents of rendered scenes, their captions' text states, their labels.

Captions that the denoiser learns late are drawn more often, and text states are whitened.
"""

import copy
import pathlib

import diffusers
import numpy
import torch
import transformers

from benchmarks.emoji import training, world
from benchmarks.emoji.tokenizer import encode

EMPTY_CAPTIONS = 0.1
LEARNED_EARLY = 0.35  # of captions that ask for ink, or for no style, this share is kept
UPRIGHT = 0.7  # and of those that ask for no pose, this
JITTER = 0.3  # of the artwork's place and size, as a part of what the other models see: fewer pictures to learn
UNSAID = -100  # the label of what a caption does not tell, which torch's cross-entropy ignores
SMALLEST_VARIANCE = 2e-4  # added to the variance of each principal component, as a part of their sum, before whitening


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


def tells(caption: world.Caption, factor: str) -> bool:
    """Whether `caption` determines a factor: an unnamed object or style may be any, all else has a default."""
    if factor == "object":
        return bool({"object", "fact"} & caption.said)
    return factor != "style" or "style" in caption.said


class Latents:
    """Latents, text states and labels of rendered scenes: a ring that is refilled as it is drawn from.

    `labels` (latent, factor) are those of `world.labels`; `said` are the same where the caption tells them, and
    elsewhere -100. `jitter` and `mixed` are those of `world.render`.
    """

    def __init__(self, folder: pathlib.Path, jitter: float = JITTER, mixed: float = 0.0, size: int = 30_000):
        self.size, self.jitter, self.mixed = size, jitter, mixed
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").float().eval().requires_grad_(False)
        clip = transformers.CLIPModel.from_pretrained(folder / "clip", attn_implementation="eager")
        self.text_encoder = text_encoder(clip.float()).eval().requires_grad_(False)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        fixed = numpy.random.default_rng(0)
        self.whitening = Whitening(self.states([world.sample(fixed).text for _ in range(2000)]).flatten(0, 1))
        self.empty = self.whitening(self.states([""]))
        self.latents = torch.empty(size, 4, 16, 16)
        self.text = torch.empty(size, *self.empty.shape[1:], dtype=torch.bfloat16)
        self.labels = torch.empty(size, len(world.FACTORS), dtype=torch.long)
        self.said = torch.empty_like(self.labels)
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
        images = world.render([caption.scene for caption in captions], rng, self.jitter, self.mixed)
        with training.fast_arithmetic():
            latents = self.vae.encode(images).latent_dist.sample().float() * self.vae.config.scaling_factor
            text = self.states([caption.text for caption in captions]).float()
        where = (torch.arange(n) + self.position) % self.size
        self.latents[where], self.text[where] = latents, self.whitening(text).bfloat16()
        labels = torch.stack([*world.labels([caption.scene for caption in captions]).values()], 1)
        told = torch.tensor([[tells(caption, factor) for factor in world.FACTORS] for caption in captions])
        self.labels[where], self.said[where] = labels, torch.where(told, labels, UNSAID)
        self.position = (self.position + n) % self.size
        self.filled = min(self.size, self.filled + n)

    def indices(self, rng: numpy.random.Generator, n: int) -> torch.Tensor:
        """Where `n` scenes are, drawn at random."""
        return torch.from_numpy(rng.integers(0, self.filled, n))

    def draw(self, rng: numpy.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`n` latents, their whitened text states, and what is said; a tenth is drawn without its caption."""
        where = self.indices(rng, n)
        text, said = self.text[where].float(), self.said[where]
        empty = torch.from_numpy(rng.random(n) < EMPTY_CAPTIONS)
        text[empty], said[empty] = self.empty, UNSAID
        return self.latents[where], text, said


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


def noised(latents: torch.Tensor, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`latents` with as much noise as leaves the shares `alphas`, (latent,), of their variance; and the noise."""
    alphas = alphas[:, None, None, None]
    noise = torch.randn_like(latents)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise, noise
