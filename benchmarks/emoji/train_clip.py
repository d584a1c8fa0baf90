"""Trains the CLIP of Emoji Diffusion contrastively: the pipeline's text encoder, and the scorer that judges images.

Matrices are trained with Muon, everything else with AdamW.

Run: python -m benchmarks.emoji.train_clip --output runs/emoji
"""

import numpy
import torch
import torch.nn.functional as F
import transformers

from benchmarks.emoji import training, world
from benchmarks.emoji.muon import Muon
from benchmarks.emoji.tokenizer import N_POSITIONS, encode


def build(tokenizer) -> transformers.CLIPModel:
    """The untrained CLIP: 6-layer text tower and 5-layer vision tower, both 192 wide."""
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=N_POSITIONS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=world.SIZE,
        patch_size=8,
        projection_dim=128,
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    # Plain attention: its backward is faster than the fused one's on CPU.
    return transformers.CLIPModel._from_config(config, attn_implementation="eager")


def contrast(clip: transformers.CLIPModel, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
    """Symmetric cross-entropy over the batch, and the share of images whose own caption scores best."""
    output = clip(input_ids=ids, attention_mask=mask, pixel_values=images)
    logits = output.logits_per_image.float()
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, (logits.argmax(1) == own).float().mean()


def optimizers(model: torch.nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the towers' layers, AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    return {
        "muon": Muon(matrices, lr=lr, weight_decay=0.05),
        "adamw": torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    }


def main() -> None:
    """Trains, then writes `clip/`."""
    options = training.arguments(__doc__.splitlines()[0], steps=310, batch_size=256, lr=1e-3)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(options.output / "tokenizer")
    clip = build(tokenizer).train()
    both = optimizers(clip, options.lr)
    run = training.Run(options.output, "clip", {"clip": clip, **both}, every_seconds=300)
    rng = numpy.random.default_rng((options.seed, run.step))
    while run.step < options.steps:
        images, captions = world.batch(rng, options.batch_size)
        ids, mask = encode(tokenizer, [caption.text for caption in captions])
        # No caption is as long as the window; attention to what follows a caption is causal, so columns can be dropped.
        width = int(mask.sum(1).max())
        with training.fast_arithmetic():
            loss, top1 = contrast(clip, images, ids[:, :width], mask[:, :width])
        lr = options.lr * training.warmup_cosine(run.step, options.steps, n_warmup=40)
        training.descend(loss, clip, both.values(), lr)
        clip.logit_scale.data.clamp_(max=4.6052)
        run.step += 1
        if run.step % 20 == 0:
            run.log(loss=loss, top1=top1)
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
