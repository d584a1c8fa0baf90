"""A gallery of what autoencoders find in Emoji Diffusion, and change: figures as they are in papers, failures included.

It shows the autoencoder that comes with the model, and those of a folder, as `benchmarks.reproduce.autoencoders` leaves
them in its `autoencoders`: named latents with the pictures in which they are most active, all latents beside chance,
layouts predicted before there is a picture, objects put into quadrants, styles and backgrounds by strength. Each steers
in the stage that it was trained in. Of prompts, noise and targets nothing is chosen by hand.

Run: python -m benchmarks.reproduce.gallery --output docs/gallery
     python -m benchmarks.reproduce.gallery --output docs/gallery --saes runs/reproduce/autoencoders/autoencoders

Cost with the defaults, in row-evaluations of the U-Net: 7,500 for dictionaries, and at most 5,000 for each autoencoder;
five minutes for the one that comes with the model, on a core that evaluates 45 rows per second.
"""

import argparse
import dataclasses
import pathlib

import matplotlib.pyplot
import torch

import mediation
from benchmarks.emoji.train_sae import captions
from benchmarks.reproduce import maps
from benchmarks.reproduce.saes.exhibits import Settings, exhibits, first_seed
from benchmarks.reproduce.saes.preparing import SEEDS, label
from mediation import bundled

_SCOPE = (
    "Emoji Diffusion is a small model of a small world, whose sprites stand in the middle of the picture. Judges are a"
    " rule that tells sprites from ground, and a probe that shares no weights with the model. Of prompts, noise and"
    " targets nothing is chosen by hand; a figure for which an autoencoder has no latents is left out."
)


def run(folder: pathlib.Path, saes: pathlib.Path | None, settings: Settings) -> None:
    """Draws every figure, and writes the page that shows them."""
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    named = autoencoders(saes)
    seed = first_seed("dictionary")
    prompts = captions(settings.labelled, seed=SEEDS["dictionary"])
    options = {"seed": seed, "n_top": min(5, settings.labelled), **settings.sampling}
    found = mediation.concept_dictionaries(pipe, list(named.values()), prompts, label, **options)
    command = f"python -m benchmarks.reproduce.gallery --output {folder}" + (f" --saes {saes}" if saes else "")
    lines = ["# Gallery", "", _SCOPE, "", f"    {command}", ""]
    lines += [f"- {name}: {value}" for name, value in dataclasses.asdict(settings).items()]
    noise = {"labelled": seed, "predicted": first_seed("layout"), "steered": first_seed("steering")}
    lines += [f"- seeds of {name} pictures, from {first}" for name, first in noise.items()]
    lines += [f"- fingerprint of the model and the probe: {maps.fingerprint(pipe, [bundled.load_probe()])[:12]}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    for (name, sae), dictionary in zip(named.items(), found, strict=True):
        lines += [f"## {sae.place}", "", f"The autoencoder {name}, {sae.fingerprint[:12]}: {sae}.", ""]
        for kind, figure, caption in exhibits(pipe, sae, dictionary, settings):
            figure.savefig(folder / f"{name}.{kind}.png", dpi=130)
            matplotlib.pyplot.close(figure)
            lines += [f"![{kind}]({name}.{kind}.png)", "", caption, ""]
            print(f"{name}: {kind}", flush=True)
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def autoencoders(folder: pathlib.Path | None) -> dict[str, mediation.SparseAutoencoder]:
    """The autoencoder that comes with the model, and those of the conditional half in a folder of folders.

    Raises:
        ValueError: if the folder has none.
    """
    found = {"bundled": bundled.load_sae()}
    for path in sorted(folder.glob("*/model.safetensors")) if folder else ():
        sae = mediation.SparseAutoencoder.from_pretrained(path.parent)
        if sae.place is not None and sae.place.branch == "cond":
            found[path.parent.name] = sae
    if folder and len(found) == 1:
        raise ValueError(f"{folder} has no folder with an autoencoder of the conditional half: pass one that has")
    return found


def main() -> None:
    """Reads options and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/gallery"))
    parser.add_argument("--saes", type=pathlib.Path, help="folder of folders with autoencoders of other places")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help=f"default {field.default}")
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = vars(parser.parse_args())
    folder, saes, threads = (options.pop(name) for name in ("output", "saes", "threads"))
    if threads:
        torch.set_num_threads(threads)
    run(folder, saes, Settings(**options))


if __name__ == "__main__":
    main()
