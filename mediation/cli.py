"""The `mediation` command; other packages add commands through the entry-point group "mediation.commands"."""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from typing import Annotated

import matplotlib.pyplot
import PIL.Image
import typer

import mediation
from mediation import casefiles, mapfiles, metrics, reports, tensorfiles
from mediation.autoencoders import cli as autoencoders_cli
from mediation.commands import add_command, new_app

app = new_app()
_command = functools.partial(add_command, app)

_Model = Annotated[str | None, typer.Option(help="Pipeline folder or hub id; without it, Emoji Diffusion.")]
_Map = Annotated[pathlib.Path, typer.Argument(help="A map that `mediation trace` wrote.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Find where a concept lives in a text-to-image model, and change it."""


@_command
def sites(
    model: _Model = None,
    network: Annotated[str | None, typer.Option(help="Only this network, as unet or text_encoder.")] = None,
    component: Annotated[str | None, typer.Option(help="Only this kind, as resnet or block.")] = None,
    name: Annotated[str | None, typer.Option(help="Only names that match this glob.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Single attention heads in place of modules.")] = False,
    as_json: _Json = False,
) -> None:
    """List the sites of a pipeline in the order in which they run.

    Example: mediation sites --network unet --component cross_attention
    """
    found = mediation.sites(
        mediation.load_pipeline(model), network=network, component=component, name=name, heads=heads
    )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(site) for site in found]))
        return
    for site in found:
        typer.echo(f"{site.name:<40} {site.network}.{site.path}")


@_command
def trace(
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it as often as needed.")] = (),
    subject: Annotated[list[str], typer.Option(help="Words of the prompt to corrupt: one for all, or one each.")] = (),
    cases: Annotated[
        pathlib.Path | None, typer.Option(help="CSV or JSON with prompt, subject and perhaps attribute, seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first case; each further one has one more, or its own.")] = 0,
    corruption: Annotated[str, typer.Option(help="noise, noise:SCALE, zero or replace:TEXT.")] = "noise",
    where: Annotated[
        str, typer.Option(help="Noise and zeros: at the text encoders' input, or their output.")
    ] = "input",
    draws: Annotated[int, typer.Option(help="Independent noises per case.")] = 1,
    model: _Model = None,
    sites: Annotated[str | None, typer.Option(help="Only sites whose name matches this glob.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Single attention heads in place of modules.")] = False,
    metric: Annotated[
        str | None, typer.Option(help="clip_score, latent_distance or image_mse; without it, what suits the pipeline.")
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Folder of a CLIP model for clip_score.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token groups or positions with commas between, as subject,eos; or each.")
    ] = None,
    windows: Annotated[
        str | None, typer.Option(help="Fractions of sampling in which to restore, as 0-0.5,0.5-1; or each step.")
    ] = None,
    branch: Annotated[str, typer.Option(help="Half of the guided batch to restore: cond, uncond or both.")] = "cond",
    mode: Annotated[str, typer.Option(help="restore: is a site sufficient? knock_out: is it necessary?")] = "restore",
    backend: Annotated[
        str, typer.Option(help="restoration (exact), attribution_patching (estimates, each step) or direct_effect.")
    ] = "restoration",
    integrated: Annotated[int, typer.Option(help="Of estimates, points at which the gradient is averaged.")] = 1,
    screen: Annotated[
        float | None, typer.Option(help="Estimate everything, and restore this share of places exactly, the best.")
    ] = None,
    verify: Annotated[
        int | None, typer.Option(help="Check estimates: restore this many, the best, and as many at random.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of one call of the pipeline, two controls included; less takes less memory."),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Keep the image of every run.")] = False,
    output: Annotated[pathlib.Path | None, typer.Option(help="Where the map goes: a .nc file or .zarr folder.")] = None,
    as_json: _Json = False,
) -> None:
    """Measure what each site carries of a prompt's subject.

    Example: mediation trace --prompt "a cat in the style of ink" --subject ink --sites "unet.mid.*" --steps 4
    --output ink.nc
    """
    if output is not None:
        mapfiles.check_path(output)
    elif images:
        raise ValueError("images are kept in the map: name its file as --output")
    corrupted_by = casefiles.parse_corruption(corruption, draws, where)
    found, attributes = casefiles.collect_cases(cases, prompt, subject, corrupted_by, seed)
    pipe = mediation.load_pipeline(model)
    effects = mediation.trace(
        pipe,
        found,
        sites=mediation.sites(pipe, name=sites, heads=heads) if sites is not None or heads else None,
        metric=metrics.named_metric(pipe, metric, scorer),
        tokens=casefiles.parse_tokens(tokens),
        windows=casefiles.parse_windows(windows),
        mode=mode,
        branch=branch,
        backend=backend,
        integrated=integrated,
        screen=screen,
        verify=verify,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        images="all" if images else None,
    )
    if any(attributes):
        effects = effects.assign_coords(attribute=("case", attributes))
    if output is not None:
        mapfiles.save_map(effects, output)
    typer.echo(reports.as_json(effects) if as_json else reports.describe(effects))


@_command
def attribute(
    concept: Annotated[str, typer.Argument(help="A prompt, as 'ink style'.")],
    output: Annotated[pathlib.Path, typer.Option(help="The file of scores to write.")] = pathlib.Path(
        "scores.safetensors"
    ),
    objective: Annotated[str, typer.Option(help="erase or amplify.")] = "erase",
    base: Annotated[str, typer.Option(help="For erasing, the prompt that stands for its absence.")] = "",
    model: _Model = None,
    parameters: Annotated[
        list[str], typer.Option(help="A glob of sites or parameters; without it, the feed-forwards of the denoiser.")
    ] = (),
    image: Annotated[list[pathlib.Path], typer.Option(help="For amplifying, a picture of the concept.")] = (),
    seed: Annotated[list[int], typer.Option(help="Seed of the noise; give it as often as needed.")] = (0,),
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 50,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance of what is drawn; without it, 3.")
    ] = None,
    sums: Annotated[
        pathlib.Path | None, typer.Option("--map", help="Where sums by site go: a .nc file or .zarr folder.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Score single weights by what they contribute to a concept (CAD).

    Example: mediation attribute "ink style" --parameters "unet.mid.*" --steps 4 --output ink-scores.safetensors
    """
    if sums is not None:
        mapfiles.check_path(sums)
    mapfiles.check_folder(tensorfiles.checked_path(output))
    found = mediation.attribute(
        mediation.load_pipeline(model),
        concept,
        base=base,
        objective=objective,
        parameters=list(parameters) or None,
        images=[PIL.Image.open(path).convert("RGB") for path in image] or None,
        seeds=list(seed),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )
    found.save(output)
    effects = found.to_dataset()
    if sums is not None:
        mapfiles.save_map(effects, sums)
    typer.echo(reports.scores_as_json(effects) if as_json else reports.describe_scores(effects))
    if not as_json:
        typer.echo(f"{found!r} is in {output}")


@_command
def plot(
    path: _Map,
    output: Annotated[pathlib.Path | None, typer.Option(help="The figure; without it, beside the map.")] = None,
    kind: Annotated[str, typer.Option(help="map, bars or images.")] = "map",
    by: Annotated[str | None, typer.Option(help="What bars stand for: component, network, block, layer, site.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Shares of the total effect.")] = False,
) -> None:
    """Draw a map as a heat map, as bars with intervals, or as strips of images.

    Example: mediation plot ink.nc --kind bars --by component --output ink.png
    """
    output = output or path.with_suffix(".png")
    figure = reports.draw(mapfiles.open_map(path), kind, by=by, normalize=normalize).figure
    figure.savefig(output, dpi=200)
    matplotlib.pyplot.close(figure)
    typer.echo(f"saved {output}")


@_command
def compare(
    a: _Map,
    b: _Map,
    k: Annotated[int, typer.Option("-k", help="How many of the largest effects the overlap looks at.")] = 5,
    as_json: _Json = False,
) -> None:
    """Tell how far two maps rank the same sites alike.

    Example: mediation compare ink.nc cat.nc -k 3
    """
    found = mediation.compare(mapfiles.open_map(a), mapfiles.open_map(b), k)
    typer.echo(reports.comparison_as_json(found) if as_json else reports.describe_comparison(found))


app.add_typer(autoencoders_cli.app, name="sae")

for _entry in importlib.metadata.entry_points(group="mediation.commands"):
    add_command(app, _entry.load())
