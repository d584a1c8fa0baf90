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
    """A `StableDiffusionPipeline` with the block types of SD 1.x, half as deep: 16x16 images, 8x8 latents.

    Args:
        seed: of the weights; the global random state is left as it was.
        **overrides: for `unet`, `vae`, a text encoder or `scheduler`, a dict of configuration entries to change; for
            these, a tokenizer or any other part of the pipeline, the part itself.
    """
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _build(diffusers.StableDiffusionPipeline, seed, overrides, **parts)


def stable_diffusion_2(seed: int = 0, **overrides) -> diffusers.StableDiffusionPipeline:
    """As SD 2.x differs: linear projections, heads by block, "!" for padding, one text layer less, v-prediction."""
    return stable_diffusion(
        seed,
        tokenizer=overrides.pop("tokenizer", None) or tokenizer(padding="!"),
        text_encoder=_merged({"num_hidden_layers": 2, "hidden_act": "gelu"}, overrides, "text_encoder"),
        unet=_merged({"attention_head_dim": (2, 4, 4, 8), "use_linear_projection": True}, overrides, "unet"),
        scheduler=_merged({"prediction_type": "v_prediction"}, overrides, "scheduler"),
        **overrides,
    )


def stable_diffusion_xl(seed: int = 0, **overrides) -> diffusers.StableDiffusionXLPipeline:
    """A `StableDiffusionXLPipeline`: two text encoders of different width, and several layers per transformer.

    Its blocks are as deep as those of the real U-Nets: two layers, and three on the way up.
    """
    text_encoder_2 = {"hidden_size": 48, "projection_dim": 40, "hidden_act": "gelu"}
    unet = {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 32 + 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    }
    overrides["unet"] = _merged(unet, overrides, "unet")
    overrides["text_encoder_2"] = _merged(text_encoder_2, overrides, "text_encoder_2")
    overrides["vae"] = _merged({"force_upcast": True}, overrides, "vae")
    overrides.setdefault("tokenizer_2", tokenizer(padding="!"))
    return _build(diffusers.StableDiffusionXLPipeline, seed, overrides, add_watermarker=False)


FAMILIES = {"sd1": stable_diffusion, "sd2": stable_diffusion_2, "sdxl": stable_diffusion_xl}


def shallow(family: str = "sd1", seed: int = 0, **overrides) -> diffusers.DiffusionPipeline:
    """A pipeline of a family with two levels, one of them with attention: every kind of site, for half the time."""
    attention, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    unet = {"block_out_channels": (8, 16)}
    if family == "sdxl":
        attention, plain = plain, attention
        unet |= {"layers_per_block": 1, "transformer_layers_per_block": (1, 2), "attention_head_dim": (1, 2)}
    if family == "sd2":
        unet["attention_head_dim"] = (2, 4)
    unet |= {"down_block_types": (attention[0], plain[0]), "up_block_types": (plain[1], attention[1])}
    return FAMILIES[family](seed, unet=_merged(unet, overrides, "unet"), **overrides)


def tokenizer(
    words: tuple[str, ...] = WORDS, window: int = 77, padding: str = "<|endoftext|>"
) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that knows `words` as one token each, and spells all others."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys(merge for word in words for merge in _merges(word)))
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *special]
    config = {"model_max_length": window, "tokenizer_class": "CLIPTokenizer", "pad_token": padding}
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(vocabulary)}),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(config),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (pathlib.Path(folder) / name).write_text(text)
        return transformers.CLIPTokenizer.from_pretrained(folder)


def _build(pipeline: type, seed: int, overrides: dict, **parts) -> diffusers.DiffusionPipeline:
    """A pipeline of parts in their default configuration, but for what is overridden."""

    def part(name: str, build, **config):
        given = overrides.pop(name, {})
        return build(**(config | given)) if isinstance(given, dict) else given

    encoders = {"text_encoder": transformers.CLIPTextModel}
    if "tokenizer_2" in overrides:
        encoders["text_encoder_2"] = transformers.CLIPTextModelWithProjection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, network in encoders.items():
            key = name.replace("text_encoder", "tokenizer")
            words = parts[key] = overrides.pop(key, None) or tokenizer()
            parts[name] = part(
                name,
                lambda network=network, **config: network(transformers.CLIPTextConfig(**config)),
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
        parts["unet"] = part(
            "unet",
            diffusers.UNet2DConditionModel,
            sample_size=8,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
        parts["vae"] = part(
            "vae",
            diffusers.AutoencoderKL,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
    parts["scheduler"] = part(
        "scheduler",
        diffusers.DDIMScheduler,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    for network in (*encoders, "unet", "vae"):
        parts[network].eval()
    pipe = pipeline(**(parts | overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _merged(defaults: dict, overrides: dict, name: str):
    """What a family's defaults and a test's overrides say of a part."""
    given = overrides.pop(name, {})
    return defaults | given if isinstance(given, dict) else given


def _merges(word: str) -> list[tuple[str, str]]:
    symbols = [*word[:-1], word[-1] + "</w>"]
    merges = []
    while len(symbols) > 1:
        merges.append((symbols[0], symbols[1]))
        symbols[:2] = ["".join(symbols[:2])]
    return merges
