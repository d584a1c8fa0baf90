"""Tiny random pipelines of the real architectures, built without any download."""

import json
import pathlib
import tempfile

import diffusers
import tokenizers
import torch
import transformers

# These become one token each; every other word takes a token per letter.
WORDS = ("a", "an", "photo", "of", "image", "picture", "the", "in", "style", "cat", "dog", "bird", "ink", "red")


def stable_diffusion(seed: int = 0, **overrides) -> diffusers.StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with the block types of SD 1.x: 70 U-Net sites, 16x16 images, 8x8 latents.

    Args:
        seed: of the weights; the global random state is left as it was.
        **overrides: for `unet`, `vae`, `text_encoder` or `scheduler`, a dict of configuration entries to change; for
            these, `tokenizer` or any other part of the pipeline, the part itself.
    """

    def part(name: str, build, **config):
        given = overrides.pop(name, {})
        return build(**(config | given)) if isinstance(given, dict) else given

    words = overrides.pop("tokenizer", None) or tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = part(
            "text_encoder",
            lambda **config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        unet = part(
            "unet",
            diffusers.UNet2DConditionModel,
            sample_size=8,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
        vae = part(
            "vae",
            diffusers.AutoencoderKL,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
    scheduler = part(
        "scheduler",
        diffusers.DDIMScheduler,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} | overrides
    for network in (text_encoder, unet, vae):
        network.eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(words: tuple[str, ...] = WORDS, window: int = 77) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that knows `words` as one token each, and spells all others."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys(merge for word in words for merge in _merges(word)))
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *special]
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(vocabulary)}),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps({"model_max_length": window, "tokenizer_class": "CLIPTokenizer"}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (pathlib.Path(folder) / name).write_text(text)
        return transformers.CLIPTokenizer.from_pretrained(folder)


def _merges(word: str) -> list[tuple[str, str]]:
    symbols = [*word[:-1], word[-1] + "</w>"]
    merges = []
    while len(symbols) > 1:
        merges.append((symbols[0], symbols[1]))
        symbols[:2] = ["".join(symbols[:2])]
    return merges
