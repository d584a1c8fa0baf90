"""Trains the CLIP tokenizer of Emoji Diffusion: a byte-pair encoding of the world's captions.

The vocabulary is kept small on purpose: frequent words become one token, and many subjects take several, as names do
in a real text-to-image model.

Run: python -m benchmarks.emoji.tokenizer --output runs/emoji
"""

import argparse
import json
import pathlib

import numpy
import tokenizers
import transformers

from benchmarks.emoji import world

N_POSITIONS = 32
_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def train(folder: pathlib.Path, n_captions: int = 20_000, n_merges: int = 320, seed: int = 0) -> None:
    """Writes a `CLIPTokenizer` folder."""
    rng = numpy.random.default_rng(seed)
    words = (word for _ in range(n_captions) for word in world.sample(rng, "all").text.replace(",", " ,").split())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(vocabulary) + n_merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:n_merges]
    vocabulary += ["".join(pair) for pair in merges] + _SPECIAL
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=N_POSITIONS
    )
    tokenizer.save_pretrained(folder)


def encode(tokenizer, prompts: list[str]):
    """Token ids and attention mask of `prompts`, padded to the window: two int64 tensors of shape (prompt, 32)."""
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=N_POSITIONS, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/emoji"))
    train(parser.parse_args().output / "tokenizer")
