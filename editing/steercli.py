"""The command `editing steer`: one prompt, drawn without and with a concept steered."""

import json
import pathlib
from typing import Annotated

import PIL.Image
import torch
import typer
from diffusers import DiffusionPipeline

import editing
import mediation
from mediation.autoencoders.files import open_dictionary
from mediation.mapfiles import check_folder
from mediation.pipelines import quiet


def steer(
    folder: Annotated[pathlib.Path, typer.Argument(help="A folder that `mediation sae train` wrote.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    concept: Annotated[str, typer.Option(help="A latent's number, several with commas between, or a label.")],
    strength: Annotated[float, typer.Option(help="Size of the change, relative to what is there; below 0: away.")],
    dictionary: Annotated[
        pathlib.Path | None, typer.Option(help="For labels, what `mediation sae dictionary` wrote.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="As left or bottom-right; without it, everywhere.")] = None,
    stage: Annotated[tuple[float, float], typer.Option(help="Start and stop; 1 is the first step, 0 the last.")] = (
        0,
        1,
    ),
    branch: Annotated[str, typer.Option(help="cond, uncond or both.")] = "cond",
    output: Annotated[pathlib.Path, typer.Option(help="The picture: without steering, and with it.")] = pathlib.Path(
        "steered.png"
    ),
    pipeline: Annotated[
        str | None, typer.Option(help="Pipeline folder or hub id; without it, Emoji Diffusion.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw a prompt with more, or less, of a concept, everywhere or in a region.

    Example: editing steer cat-sae "a red dog" --concept 5 --strength 0.5 --region left --stage 0.6 1 --steps 2
    """
    if output.suffix != ".png":
        raise ValueError(f"the picture is a .png file, got {output.name!r}")
    check_folder(output)
    sae = mediation.SparseAutoencoder.from_pretrained(folder)
    known = None if dictionary is None else open_dictionary(dictionary)
    pipe = mediation.load_pipeline(pipeline)
    options = {"strength": strength, "region": region, "stage": stage, "branch": branch, "dictionary": known}
    with editing.steer(pipe, sae, _concept(concept), **options):
        changed = _draw(pipe, prompt, seed, steps, guidance_scale)
    plain = _draw(pipe, prompt, seed, steps, guidance_scale)
    pixels = (torch.cat([plain, changed], dim=2) * 255).round().byte().permute(1, 2, 0).numpy()
    PIL.Image.fromarray(pixels).save(output)
    moved = float((changed - plain).square().mean().sqrt())
    if as_json:
        typer.echo(json.dumps({"output": str(output), "rms_change": moved}))
    else:
        typer.echo(f"saved {output}: without steering, and with it; pixels change by {moved:.3f} of their range (rms)")


def _concept(text: str) -> str | list[int]:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else text


def _draw(pipe: DiffusionPipeline, prompt: str, seed: int, steps: int, guidance_scale: float) -> torch.Tensor:
    """The picture (3, height, width) in [0, 1]."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    with quiet(pipe):
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0].float().cpu()
