"""The command `editing evaluate`: a suite of prompts, drawn without and with an edit, and judged."""

import pathlib
from collections.abc import Mapping
from typing import Annotated

import matplotlib.figure
import matplotlib.pyplot
import typer
import xarray

import editing
import mediation
from mediation.metrics import CLIPScore

_LARGEST_SEED = 2**31 - 1


def evaluate(
    edit: Annotated[pathlib.Path, typer.Argument(help="An edit file.")],
    output: Annotated[pathlib.Path, typer.Option(help="Folder for the report and pictures.")] = pathlib.Path("report"),
    suite: Annotated[
        pathlib.Path | None,
        typer.Option(help="CSV or JSON, with roles or with labels of what is edited; without it, for Emoji Diffusion."),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Pipeline folder or hub id; without it, Emoji Diffusion.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Prompts of each role, without a suite; 20 if not given.")] = None,
    seed: Annotated[list[int], typer.Option(help="Seed of the noise; give it as often as needed.")] = (0,),
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    scorer: Annotated[pathlib.Path | None, typer.Option(help="Folder of a CLIP model for CLIPScores.")] = None,
    lpips: Annotated[bool, typer.Option(help="Measure LPIPS too; needs the extra lpips.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw a suite of prompts without and with an edit, and judge the pictures.

    Example: editing evaluate ink.safetensors --n 2 --steps 2 --guidance-scale 4 --output report
    """
    if suite is not None and n is not None:
        raise ValueError("--n is for suites that are made up, and all of a --suite is drawn: leave one of them out")
    if too_large := [one for one in seed if one > _LARGEST_SEED]:
        raise ValueError(f"integers in netCDF end at {_LARGEST_SEED}: no seed can be {too_large[0]}")
    distance = mediation.LPIPS() if lpips else None
    judge = CLIPScore.from_pretrained(scorer) if scorer is not None else None
    loaded = editing.load(edit)
    pairs = _pairs_of(loaded.metadata)
    if suite is None and (pipeline is not None or not pairs):
        raise ValueError("only edits of Emoji Diffusion that tell their pairs have a suite of their own: pass --suite")
    if suite is None:
        trials = editing.emoji_suite(pairs, n=20 if n is None else n)
    else:
        trials = editing.Suite.read(suite, pairs=pairs or None)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "scorer": judge, "lpips": distance}
    pipe = mediation.load_pipeline(pipeline)
    report = editing.evaluate(pipe, loaded, trials, seeds=list(seed), keep_images=True, **options)
    summary = editing.summarize_evaluation(report)
    output.mkdir(parents=True, exist_ok=True)
    trials.save(output / "suite.csv")
    report.drop_vars(["images", "latents"]).to_netcdf(output / "report.nc", engine="scipy")
    summary.to_netcdf(output / "summary.nc", engine="scipy")
    _save(editing.plot_sheet(report), output / "sheet.png")
    if "is_source" in report:
        _save(editing.plot_evaluation(report).figure, output / "accuracies.png")
    if as_json:
        typer.echo(summary.to_dataframe().reset_index().to_json(orient="records"))
        return
    typer.echo(_table(summary))
    typer.echo(f"saved in {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def _pairs_of(metadata: Mapping) -> dict[str, str]:
    """What an edit was made to read as what; of a sum or a scaled edit, what those have that it was made of."""
    pairs = dict(metadata.get("pairs", {}))
    for part in metadata.get("of", ()):
        pairs |= _pairs_of(part)
    return pairs


def _save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=150)
    matplotlib.pyplot.close(figure)


def _table(summary: xarray.Dataset) -> str:
    models = summary.model.values.tolist()
    lines = [f"{'role':<12} {'measure':<16}" + "".join(f"{model:>28}" for model in models)]
    for role in summary.role.values:
        for measure in summary.measure.values:
            cells = summary.sel(role=role, measure=measure)
            if (cells.n == 0).all():
                continue
            by_model = (cells.sel(model=model) for model in models)
            values = (f"{float(cell['mean']):.3g} [{float(cell.low):.3g}, {float(cell.high):.3g}]" for cell in by_model)
            lines.append(f"{role:<12} {measure:<16}" + "".join(f"{value:>28}" for value in values))
    if "h0" in summary:
        lines.append(f"{'all':<12} {'h0':<16}" + "".join(f"{float(value):>28.3g}" for value in summary.h0))
    return "\n".join(lines)
