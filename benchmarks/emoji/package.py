"""Packs a training run into the package: the pipeline folder, the CLIP scorer and the probe, as float16 safetensors.

Run: python -m benchmarks.emoji.package --run runs/emoji
"""

import argparse
import json
import pathlib
import shutil

import diffusers
import safetensors.torch
import torch
import transformers

from benchmarks.emoji import latents
from mediation.bundled import AttributeProbe

BUNDLE = pathlib.Path(__file__).parents[2] / "mediation" / "bundled" / "emoji"


def package(run: pathlib.Path, bundle: pathlib.Path = BUNDLE) -> None:
    """Writes `bundle`, replacing the pipeline, the scorer and the probe in it."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip = transformers.CLIPModel.from_pretrained(run / "clip")
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(run / "vae_refined"),
        text_encoder=latents.text_encoder(clip),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel.from_pretrained(run / "unet"),
        scheduler=latents.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folders = [bundle / name for name in ("pipeline", "clip", "probe")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(bundle / "pipeline")
    _add_prefix(bundle / "pipeline" / "text_encoder" / "model.safetensors")
    clip.half().save_pretrained(bundle / "clip")
    tokenizer.save_pretrained(bundle / "clip")
    # CLIP sees images in [-1, 1].
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (bundle / "clip" / "preprocessor_config.json").write_text(json.dumps(normalisation))
    AttributeProbe.from_pretrained(run / "probe").half().save_pretrained(bundle / "probe")
    for name in ("vocab.json", "merges.txt"):  # what tokenizers of transformers 4.x read
        for folder in ("pipeline/tokenizer", "clip"):
            shutil.copy(run / "tokenizer" / name, bundle / folder / name)
    for file in (file for folder in folders for file in folder.rglob("config.json")):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a folder of the machine that trained
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _add_prefix(file: pathlib.Path) -> None:
    """Names the text encoder's weights as transformers 4.x and all published files do: below `text_model.`."""
    tensors = safetensors.torch.load_file(file)
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, file, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/emoji"))
    package(parser.parse_args().run)
