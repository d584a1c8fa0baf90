"""A pipeline with a text encoder of the size of CLIP ViT-L/14, with random weights, and concepts for it."""

import itertools

import diffusers
import transformers

from tests import tiny

# The configuration of openai/clip-vit-large-patch14, where it differs from the defaults of `tests.tiny`.
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}

# 10,000 words of one token each; "m" would take part in "im", which "image" brings along
_CONSONANTS, _VOWELS = "bcdfghjklnpqrstvwxyz", "aeiou"
_WORDS = tuple(map("".join, itertools.product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS)))
_TEMPLATE_WORDS = ("a", "an", "of", "photo", "image", "picture")


def load() -> diffusers.StableDiffusionPipeline:
    """A pipeline whose text encoder is as large as that of SD 1.x; its denoiser and autoencoder are tiny.

    The encoder embeds 49,408 tokens, of which the tokenizer uses about a quarter.
    """
    return tiny.stable_diffusion(
        tokenizer=tokenizer(), text_encoder=dict(TEXT_ENCODER), unet={"cross_attention_dim": 768}
    )


def tokenizer() -> transformers.CLIPTokenizer:
    """A tokenizer whose vocabulary is made up on the spot: the words of templates and of concepts, and all letters."""
    return tiny.tokenizer((*_TEMPLATE_WORDS, *_WORDS))


def concepts(n: int, n_preserved: int) -> tuple[dict[str, str], list[str]]:
    """`n` pairs of different concepts, and others to preserve, each of two words and of two tokens.

    Example:
        >>> concepts(1, 1)
        ({'baba bace': 'babe baci'}, ['babi baco'])
    """
    names = [" ".join(words) for words in zip(_WORDS, _WORDS[6:], strict=False)][: 2 * n + n_preserved]
    return dict(zip(names[: 2 * n : 2], names[1 : 2 * n : 2], strict=True)), names[2 * n :]
