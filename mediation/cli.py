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
from mediation import casefiles, mapfiles, metrics, options, reports, tensorfiles
from mediation.autoencoders import cli as autoencoders_cli
from mediation.commands import add_command, new_app
from mediation.selecting import select as select_labels

app = new_app()
_command = functools.partial(add_command, app)


@app.callback()
def main() -> None:
    """Find where a concept lives in a text-to-image model, and change it."""


@_command
def sites(
    model: options.Model = None,
    network: Annotated[str | None, typer.Option(help="Only this network, as unet or text_encoder.")] = None,
    component: options.Component = None,
    layer: Annotated[int | None, typer.Option(help="Only this layer of each kind, from 0.")] = None,
    block: Annotated[str | None, typer.Option(help="Only this block, as down.0 or mid.")] = None,
    name: Annotated[str | None, typer.Option(help="Only names that match this glob.")] = None,
    heads: options.Heads = False,
    as_json: options.Json = False,
) -> None:
    """List the sites of a pipeline in the order in which they run.

    Example: mediation sites --network unet --component cross_attention
    """
    chosen = {"network": network, "component": component, "layer": layer, "block": block, "name": name}
    found = mediation.sites(options.load(model), **chosen, heads=heads)
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
        pathlib.Path | None,
        typer.Option(help="CSV or JSON with prompt, subject and perhaps attribute, seed; or .txt, a prompt per line."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first case; each further one has one more, or its own.")] = 0,
    corruption: Annotated[str, typer.Option(help="noise, noise:SCALE, zero or replace:TEXT.")] = "noise",
    where: Annotated[
        str, typer.Option(help="Noise and zeros: at the text encoders' input, or their output.")
    ] = "input",
    draws: Annotated[int, typer.Option(help="Independent noises per case.")] = 1,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    sites: Annotated[
        str | None, typer.Option(help="Only sites whose name matches this glob, as unet.up.* or unet.mid.block.")
    ] = None,
    component: options.Component = None,
    heads: options.Heads = False,
    neighbours: Annotated[
        int | None, typer.Option(help="Restore this many neighbouring layers of one kind together.")
    ] = None,
    metric: Annotated[
        list[str],
        typer.Option(
            help="clip_score, latent_distance or image_mse, one or more; without it, what suits the pipeline."
        ),
    ] = (),
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
    as_json: options.Json = False,
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
    pipe = options.load(model, device, dtype)
    chosen = None
    if sites is not None or component is not None or heads or neighbours is not None:
        chosen = mediation.sites(pipe, name=sites, component=component, heads=heads)
    effects = mediation.trace(
        pipe,
        found,
        sites=chosen if neighbours is None else mediation.neighbours(chosen, neighbours),
        metric=metrics.named_metrics(pipe, metric, scorer),
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
    model: options.Model = None,
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
    as_json: options.Json = False,
) -> None:
    """Score single weights by what they contribute to a concept (CAD).

    Example: mediation attribute "ink style" --parameters "unet.mid.*" --steps 4 --output ink-scores.safetensors
    """
    if sums is not None:
        mapfiles.check_path(sums)
    mapfiles.check_folder(tensorfiles.checked_path(output))
    found = mediation.attribute(
        options.load(model),
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
    path: options.Map,
    output: Annotated[pathlib.Path | None, typer.Option(help="The figure; without it, beside the map.")] = None,
    kind: Annotated[str, typer.Option(help="map, bars or images.")] = "map",
    by: Annotated[str | None, typer.Option(help="What bars stand for: component, network, block, layer, site.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Shares of the total effect.")] = False,
    select: options.Select = (),
) -> None:
    """Draw a map as a heat map, as bars with intervals, or as strips of images.

    Example: mediation plot ink.nc --kind bars --by component --output ink.png
    """
    output = output or path.with_suffix(".png")
    (effects,) = select_labels(select, mapfiles.open_map(path))
    figure = reports.draw(effects, kind, by=by, normalize=normalize).figure
    figure.savefig(output, dpi=200)
    matplotlib.pyplot.close(figure)
    typer.echo(f"saved {output}")


@_command
def compare(
    a: options.Map,
    b: options.Map,
    k: Annotated[int, typer.Option("-k", help="How many of the largest effects the overlap looks at.")] = 5,
    select: options.Select = (),
    as_json: options.Json = False,
) -> None:
    """Tell how far two maps rank the same sites alike.

    Example: mediation compare ink.nc cat.nc -k 3
    """
    found = mediation.compare(*select_labels(select, mapfiles.open_map(a), mapfiles.open_map(b)), k)
    typer.echo(reports.comparison_as_json(found) if as_json else reports.describe_comparison(found))


app.add_typer(autoencoders_cli.app, name="sae")

for _entry in importlib.metadata.entry_points(group="mediation.commands"):
    add_command(app, _entry.load())
