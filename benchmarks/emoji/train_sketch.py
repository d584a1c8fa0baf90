"""Goes on training CLIP with a second objective: from text states, what an object looks like in a style can be read.

Contrast alone leaves text states that are nearly a sum of object and style, since that is enough to tell captions
apart. What a cat in ink looks like is then left to the denoiser, which learns it slowly. Here a sketch of the picture,
one linear read-out of what 64 learned queries attend to, is predicted from the states of captions that say both, beside
the contrastive loss. The text encoder stays frozen while the denoiser is trained.

Run, after train_clip: python -m benchmarks.emoji.train_sketch --output runs/emoji
"""

import diffusers
import numpy
import torch
import transformers
from torch import nn

from benchmarks.emoji import training, world
from benchmarks.emoji.tokenizer import encode
from benchmarks.emoji.train_clip import contrast, optimizers

CONTRAST_EVERY = 6  # steps: the vision tower is most of the cost
CONTRAST_BATCH = 256


class Sketch(nn.Module):
    """Reads a picture's 8×8 patches from text states: learned queries, one attention, one linear map."""

    def __init__(self, width: int = 192, n_patches: int = 64, patch: int = 16, n_heads: int = 6):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_patches, width))
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.patch = nn.Linear(width, patch)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States (prompt, token, width) to patches (prompt, 64, 16)."""
        queries = self.queries.expand(len(states), -1, -1)
        return self.patch(self.attention(queries, states, states, need_weights=False)[0])


@torch.no_grad()
def targets(vae: diffusers.AutoencoderKL) -> torch.Tensor:
    """What each object looks like in each style: latents of it alone on white, (object, style, 64, 16).

    The square root of each principal component's size replaces the size, so that the components that tell shading from
    flat colour are learned too, not only those that tell a car from a cat.
    """
    scenes = [world.Scene(name, style) for name in world.OBJECTS for style in world.STYLES]
    images = world.render(scenes, numpy.random.default_rng(0), jitter=0.0)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(50)])
    patches = torch.nn.functional.unfold(latents, 2, stride=2).transpose(1, 2)
    left, sizes, right = torch.linalg.svd(patches.flatten(1) - patches.flatten(1).mean(0), full_matrices=False)
    drawn = left * sizes.sqrt() @ right
    return (drawn / drawn.std()).unflatten(0, (len(world.OBJECTS), len(world.STYLES))).unflatten(2, patches.shape[1:])


def captions_of_both(rng: numpy.random.Generator, n: int) -> list[world.Caption]:
    """`n` captions that say the style, and the object or a fact."""
    captions = []
    while len(captions) < n:
        caption = world.sample(rng)
        if "style" in caption.said and caption.said & {"object", "fact"}:
            captions.append(caption)
    return captions


def main() -> None:
    """Trains, then writes `clip/` again."""
    options = training.arguments(__doc__.splitlines()[0], steps=900, batch_size=192, lr=1e-3)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(options.output / "tokenizer")
    clip = transformers.CLIPModel.from_pretrained(options.output / "clip", attn_implementation="eager").float().train()
    pictures = targets(diffusers.AutoencoderKL.from_pretrained(options.output / "vae").float())
    sketch = Sketch()
    both = optimizers(nn.ModuleDict({"clip": clip, "sketch": sketch}), options.lr)
    run = training.Run(options.output, "sketch", {"clip": clip, "sketch": sketch, **both}, every_seconds=300)
    rng = numpy.random.default_rng((options.seed, run.step))
    while run.step < options.steps:
        for group in (group for optimizer in both.values() for group in optimizer.param_groups):
            group["lr"] = options.lr * training.warmup_cosine(run.step, options.steps)
        captions = captions_of_both(rng, options.batch_size)
        labels = world.labels([caption.scene for caption in captions])
        ids, _ = encode(tokenizer, [caption.text for caption in captions])
        with training.fast_arithmetic():
            predicted = sketch(clip.text_model(input_ids=ids).last_hidden_state)
        missed = (predicted.float() - pictures[labels["object"], labels["style"]]).square().mean()
        missed.backward()
        if run.step % CONTRAST_EVERY == 0:
            images, captions = world.batch(rng, CONTRAST_BATCH)
            ids, mask = encode(tokenizer, [caption.text for caption in captions])
            width = int(mask.sum(1).max())
            with training.fast_arithmetic():
                loss, top1 = contrast(clip, images, ids[:, :width], mask[:, :width])
            loss.backward()
        torch.nn.utils.clip_grad_norm_([*clip.parameters(), *sketch.parameters()], 1.0)
        for optimizer in both.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clip.logit_scale.data.clamp_(max=4.6052)
        run.step += 1
        if run.step % 20 == 0:
            run.log(missed=missed, contrast=loss, top1=top1)
        if run.due():
            run.save()
    run.save()
    clip.eval()
    images, captions = world.batch(numpy.random.default_rng(1), 256, "held_out")
    with torch.no_grad():
        loss, top1 = contrast(clip, images, *encode(tokenizer, [caption.text for caption in captions]))
    run.log(held_out_loss=loss, held_out_top1=top1)
    clip.save_pretrained(options.output / "clip")


if __name__ == "__main__":
    main()
