"""What do edits do? Diff-QuickFix as released and as here, UCE, LocoEdit and TIME on Emoji Diffusion, by the probe.

Every unit of an experiment (a concept, and all edits of it) is saved as soon as it is ready, and found again when the
command is called again; pictures of the unedited model are drawn once for the same prompts and seeds. Recipes are
chosen on training concepts, prompts and seeds, and reported on others. Writes report.json, report.md and figures.

Run: python -m benchmarks.reproduce.editing --output runs/reproduce/editing
Maps to compare places with: --maps runs/reproduce/tracing/maps, of benchmarks.reproduce.tracing.

Cost: all experiments with 10 steps draw about 17,400 pictures, 350,000 row-evaluations of the U-Net: 65 minutes on two
cores that evaluate 90 rows per second, and some more for decoding and judging. It grows in proportion to the steps.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import matplotlib.pyplot
import torch
import xarray

import mediation
from benchmarks.emoji.evaluate import GUIDANCE_SCALE
from benchmarks.reproduce import maps
from benchmarks.reproduce.edits import causal, figures, pages
from benchmarks.reproduce.edits.causal import Agreement
from benchmarks.reproduce.edits.experiments import EXPERIMENTS, with_needs
from benchmarks.reproduce.edits.pages import Result
from benchmarks.reproduce.edits.running import Runner
from benchmarks.reproduce.edits.scoring import pooled, score
from benchmarks.reproduce.edits.units import Unit
from mediation import bundled


def run(runner: Runner, names: Sequence[str]) -> list[Result]:
    """Runs experiments in this order, each with the reports of those before it."""
    reports, results = {}, []
    for name in names:
        groups: dict[str, list[tuple[Unit, xarray.Dataset]]] = {}
        for unit in EXPERIMENTS[name].units(runner.pipe, reports):
            started = time.monotonic()
            groups.setdefault(unit.group, []).append((unit, runner.run(unit)))
            print(f"{runner.path(unit)} {time.monotonic() - started:.0f} s", flush=True)
        reports[name] = {group: pooled([report for _, report in ran]) for group, ran in groups.items()}
        for group, report in reports[name].items():
            unit, _ = groups[group][0]
            results.append(Result(name, group, unit.recipes, score(report)))
    return results


def compare(results: Sequence[Result], folder: pathlib.Path | None) -> dict[str, list[Agreement]]:
    """Edits of single places against the causal maps that are there."""
    found = {}
    for result in results:
        if result.experiment == "layers" and (effects := causal.load_map(folder, result.group)) is not None:
            tokens = dict.fromkeys(recipe.tokens for recipe in result.recipes.values())
            found[result.group] = [causal.agreement(result.rows, result.recipes, effects, kind) for kind in tokens]
    return found


def write(
    results: Sequence[Result], agreements: Mapping[str, Sequence[Agreement]], settings: Mapping, folder: pathlib.Path
) -> None:
    """Writes report.json, report.md and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    record = pages.as_json(results, agreements, settings)
    (folder / "report.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    (folder / "report.md").write_text(pages.as_markdown(results, agreements, settings))
    for name, figure in figures.draw(results, agreements):
        figure.savefig(folder / f"{name}.png", dpi=200)
        matplotlib.pyplot.close(figure)


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reproduce/editing"))
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=list(EXPERIMENTS),
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"only these, and what they need: {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument(
        "--maps", type=pathlib.Path, help="folder of causal maps; without it, nothing is set against them"
    )
    parser.add_argument("--steps", type=int, default=10, help="sampler steps")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = parser.parse_args()
    for name in ("steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.maps and not options.maps.is_dir():
        parser.error(f"there is no folder {options.maps}: make maps with benchmarks.reproduce.tracing")
    return options


def main() -> None:
    """Runs the experiments, and writes what they come to."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = maps.fingerprint(pipe, [bundled.load_probe(), bundled.load_scorer().model])
    runner = Runner(pipe, options.output / "units", model, options.steps, options.guidance_scale)
    results = run(runner, with_needs(options.experiments))
    settings = {
        "pipeline": "Emoji Diffusion",
        "fingerprint": model[:12],
        "steps": options.steps,
        "guidance": options.guidance_scale,
    }
    write(results, compare(results, options.maps), settings, options.output)
    print(f"{options.output / 'report.md'} has the tables")


if __name__ == "__main__":
    main()
