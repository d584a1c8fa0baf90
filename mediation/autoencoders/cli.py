"""The `mediation sae` command: trains autoencoders, shows them, and names their latents."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

import mediation
from mediation.autoencoders import files, sheets
from mediation.autoencoders.concepts import score_latents
from mediation.autoencoders.dictionary import Labeller
from mediation.commands import add_command, new_app
from mediation.options import Json, Model

app = new_app()
_command = functools.partial(add_command, app)

_Folder = Annotated[pathlib.Path, typer.Argument(help="A folder that `mediation sae train` wrote.")]
_Prompt = Annotated[list[str], typer.Option(help="A prompt; give it as often as needed.")]
_Prompts = Annotated[pathlib.Path | None, typer.Option(help="A text file with one prompt in each line.")]
_Steps = Annotated[int, typer.Option(help="Sampler steps.")]
_Guidance = Annotated[float, typer.Option(help="Classifier-free guidance.")]


@app.callback()
def main() -> None:
    """Find the concepts in what a denoiser computes, with sparse autoencoders."""


@_command
def train(
    output: Annotated[pathlib.Path, typer.Argument(help="The folder to write.")],
    site: Annotated[str, typer.Option(help="A site, as unet.mid.0, the transformer there.")],
    prompt: _Prompt = (),
    prompts: _Prompts = None,
    at: Annotated[list[float], typer.Option(help="What is left of sampling: 1 is the first step, 0 the last.")] = (
        1.0,
    ),
    branch: Annotated[str, typer.Option(help="cond or uncond.")] = "cond",
    latents: Annotated[int | None, typer.Option(help="Latents; without it, four times the site's features.")] = None,
    k: Annotated[int, typer.Option("-k", help="Latents that are active at a position.")] = 10,
    activation: Annotated[str, typer.Option(help="topk or batch_topk.")] = "topk",
    positions: Annotated[int, typer.Option(help="Positions to train on.")] = 1_000_000,
    buffer: Annotated[int, typer.Option(help="Positions in memory at a time.")] = 65_536,
    learning_rate: Annotated[float | None, typer.Option(help="Without it, by the number of latents.")] = None,
    patience: Annotated[int | None, typer.Option(help="Windows without progress after which to stop.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
    model: Model = None,
    steps: _Steps = 25,
    guidance_scale: _Guidance = 7.5,
    as_json: Json = False,
) -> None:
    """Train an autoencoder on what a site computes; called again, it goes on where it was interrupted.

    Example: mediation sae train cat-sae --site unet.up.1.0 --prompt "a cat" --latents 64 -k 4 --positions 256 --steps 2
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, and an autoencoder is kept in a folder: choose another name")
    checkpoint = output / "training.safetensors"
    sae = mediation.train_sae(
        mediation.load_pipeline(model),
        _all_prompts(prompt, prompts),
        site=site,
        steps=tuple(at),
        branch=branch,
        n_latents=latents,
        k=k,
        activation=activation,
        recipe=mediation.Recipe(n_positions=positions, learning_rate=learning_rate, patience=patience),
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        buffer=buffer,
        checkpoint=checkpoint,
    )
    sae.save_pretrained(output)
    checkpoint.unlink()
    _describe(sae, as_json)


@_command
def show(folder: _Folder, as_json: Json = False) -> None:
    """Tell what an autoencoder reads, and how its training went.

    Example: mediation sae show cat-sae
    """
    _describe(mediation.SparseAutoencoder.from_pretrained(folder), as_json)


@_command
def dictionary(
    folder: _Folder,
    prompt: _Prompt = (),
    prompts: _Prompts = None,
    output: Annotated[pathlib.Path, typer.Option(help="The .nc file to write.")] = pathlib.Path("dictionary.nc"),
    sheet: Annotated[pathlib.Path | None, typer.Option(help="An .html file to browse.")] = None,
    labeller: Annotated[
        str,
        typer.Option(
            help="module:function that labels an image, installed or here; by default, one for Emoji Diffusion."
        ),
    ] = "mediation.bundled:label_emoji",
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    model: Model = None,
    steps: _Steps = 25,
    guidance_scale: _Guidance = 7.5,
    as_json: Json = False,
) -> None:
    """Name the latents of an autoencoder by what pictures show where they are active.

    Example: mediation sae dictionary cat-sae --prompt "a cat" --prompt "a dog" --steps 2 --output cat.nc
    --sheet cat.html
    """
    files.check_path(output)
    if sheet is not None:
        sheets.check_path(sheet)
    sae = mediation.SparseAutoencoder.from_pretrained(folder)
    drawn = _all_prompts(prompt, prompts)
    found = mediation.concept_dictionary(
        mediation.load_pipeline(model),
        sae,
        drawn,
        _load(labeller),
        seed=seed,
        n_top=min(9, len(drawn)),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )
    files.save_dictionary(found, output)
    if sheet is not None:
        sheets.write_sheet(found, sheet)
    scores = score_latents(found).to_dataframe().reset_index()
    scores = scores[scores.label != ""].sort_values("iou", ascending=False, kind="stable")
    if as_json:
        typer.echo(scores.to_json(orient="records"))
        return
    shown = ["latent", "label", "iou", "chance_iou", "random_iou", "precision", "recall", "monosemanticity"]
    typer.echo(scores.head(10)[shown].to_string(index=False, float_format="{:.3g}".format))
    typer.echo(f"{len(scores)} of {sae.n_latents} latents have labels; the dictionary is in {output}")


def _all_prompts(given: list[str], path: pathlib.Path | None) -> list[str]:
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    found = [*given, *(line.strip() for line in lines if line.strip())]
    if not found:
        raise ValueError("no prompts were given: pass --prompt, or --prompts with a file")
    return found


def _load(name: str) -> Labeller:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"a labeller is named as module:function, got {name!r}")
    with _importable(os.getcwd()):
        found = getattr(importlib.import_module(module), function, None)
    if found is None:
        raise ValueError(f"{module} has no {function}, which was to label images")
    return found


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules of a folder can be imported, behind all others; an installed command looks at its own folder alone."""
    sys.path.append(folder)
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]  # the last, should it be there twice


def _describe(sae: mediation.SparseAutoencoder, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(sae.config, ensure_ascii=False))
        return
    typer.echo(repr(sae))
    for entry in sae.metadata.get("training", {}).get("history", ()):
        typer.echo(
            f"  {entry['n_positions']:>12,} positions: explains {entry['explained_variance']:.1%},"
            f" {entry['n_dead']} latents dead"
        )
