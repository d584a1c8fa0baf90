"""How far can gradients be trusted? Attribution patching and CAD (Nguyen et al., arXiv:2412.02542) on Emoji Diffusion.

Four parts, each of which saves what it makes as soon as it is ready, and finds it again when called again:

- maps: estimates of every site and step, and of every site of the text encoder at token groups, against exact
  restoration;
- predictions: the change of CAD's objective that scores predict, against the true one, over random ablations, single
  layers and the best weights;
- ablations: CAD-Erase and CAD-Amplify by ratio, judged by the probe, beside controls and Diff-QuickFix;
- places: where positive and negative scores lie, against causal maps.

Writes report.json, report.md and figures, of all parts that ran with the same --output, at once or one by one.

Run: python -m benchmarks.reproduce.attribution --output runs/reproduce/attribution --maps runs/reproduce/tracing/maps

The maps are those of benchmarks.reproduce.tracing, of the same number of steps; without them, estimates are compared by
step of the U-Net only, and scores with nothing.

Cost in row-evaluations of the U-Net: maps 29,000, predictions 29,000 (a thousand random ablations of each of four
questions, J being one batch of five latents), ablations 24,000 and places 1,300; by that, 30 minutes on one core that
evaluates 45 per second, and some more since estimates run in small batches, for decoding and for judging. With 4 steps,
it is 69,000 in all. For all attributes, which with 4 steps is another 4,300 for each that is not there yet:
--attributes object style color count viewpoint pose fact

Four cases of each attribute leave intervals wide: --cases-per-attribute 24, as many as tracing takes, is six times the
cost of the maps.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence

import matplotlib.pyplot
import torch
from diffusers import DiffusionPipeline

import mediation
from benchmarks.emoji.evaluate import GUIDANCE_SCALE
from benchmarks.reproduce import maps, report
from benchmarks.reproduce.attributes import FACTORS
from benchmarks.reproduce.attributions import (
    composing,
    correlations,
    fidelity,
    figures,
    pages,
    predictions,
    recipes,
    selectivity,
    variants,
    whereabouts,
)
from benchmarks.reproduce.attributions.figures import Figures
from benchmarks.reproduce.attributions.results import Ablations, Maps, Predictions, Whereabouts
from benchmarks.reproduce.edits.running import Runner
from benchmarks.reproduce.edits.scoring import pooled, score
from benchmarks.reproduce.storing import stored

_TITLE = "Attribution, of activations and of weights, against what it estimates"
_SCOPE = (
    "These results are about Emoji Diffusion, a small model of one small world that draws it imperfectly (its card says"
    " how well), with few sampler steps and a judge as small. How far a gradient reaches depends on the model: a larger"
    " one may be more or less linear. Maps are of {attributes}. Cases are corrupted by Gaussian noise on the subject's"
    " embeddings, and restored; necessity was not asked. The verdicts on CAD are about two concepts each, and scores of"
    " one seed each."
)


def compare_maps(pipe: DiffusionPipeline, model: str, options: argparse.Namespace) -> tuple[Maps, Figures]:
    """Estimates against exact maps."""
    tasks = make_tasks(pipe, options, options.attributes)[0]
    compared = variants.collect(pipe, tasks, model, options.output / "maps", options.maps)
    fidelities, parts, misses = [], [], []
    for kind in dict.fromkeys(one.places for one in compared):
        group = [one for one in compared if one.places == kind]
        exact, estimates = ({one.attribute: getattr(one, name) for one in group} for name in ("exact", "estimates"))
        fidelities += fidelity.fidelities(kind, exact, estimates)
        for one in group:
            own_parts, own_misses = fidelity.failures(kind, one.attribute, one.exact, one.estimates)
            parts += own_parts
            misses += own_misses
    return Maps(fidelities, parts, misses), figures.of_maps(fidelities, compared)


def predict(pipe: DiffusionPipeline, model: str, options: argparse.Namespace) -> tuple[Predictions, Figures]:
    """Predicted against true changes of J."""
    reports = {}
    for question in predictions.questions(options.random_ablations):
        path = options.output / "predictions" / f"{question.name.replace(' ', '_')}.nc"
        arguments = question.describe() | {"model": model}
        reports[question.name] = stored(path, arguments, functools.partial(question.run, pipe))
        print(path, flush=True)
    rows = {name: correlations.summarize(one) for name, one in reports.items()}
    chosen = [choice for one in reports.values() for choice in correlations.choices(one)]
    found = Predictions([row for group in rows.values() for row in group], chosen, [correlations.predicts(rows)])
    return found, figures.of_predictions(list(reports.values()))


def ablate(pipe: DiffusionPipeline, model: str, options: argparse.Namespace) -> tuple[Ablations, Figures]:
    """Ablations judged by the probe."""
    runner = Runner(pipe, options.output / "units", model, options.steps, options.guidance_scale)
    rows, selective = {}, {}
    for objective, units in recipes.ablation_units().items():
        judged = []
        for unit in units:
            judged.append(runner.run(unit))
            print(runner.path(unit), flush=True)
        whole = pooled(judged)
        rows[objective] = score(whole)
        selective[objective] = selectivity.measure(whole, objective)
    claims = [selectivity.is_selective(found, objective) for objective, found in selective.items()]
    return Ablations(rows, selective, claims), figures.of_ablations(rows)


def locate(pipe: DiffusionPipeline, model: str, options: argparse.Namespace) -> tuple[Whereabouts, Figures]:
    """Sums of scores by site against causal maps."""
    tasks = [task for task in make_tasks(pipe, options, list(whereabouts.PROMPTS))[0] if task.network == "denoiser"]
    causal = {task.attribute: variants.traced(pipe, task, options.maps) for task in tasks}
    causal = {attribute: effects for attribute, effects in causal.items() if effects is not None}
    sums = {}
    for attribute, prompts in whereabouts.PROMPTS.items():
        path = options.output / "places" / f"{attribute}.nc"
        arguments = whereabouts.describe(attribute) | {"model": model}
        sums[attribute] = stored(path, arguments, functools.partial(whereabouts.run, pipe, prompts))
        print(path, flush=True)
    shares = [share for attribute, found in sums.items() for share in whereabouts.shares(attribute, found)]
    layers = [share for attribute, found in sums.items() for share in whereabouts.layer_shares(attribute, found)]
    claim, negatives = whereabouts.positive_where_causal(sums, causal)
    return Whereabouts(shares, layers, [claim] if causal else [], negatives), figures.of_places(shares, sums, causal)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the experiments.

    Attributes:
        run: from the pipeline, its fingerprint and the options, to results and figures.
        options: names of those that decide on the results.
    """

    run: Callable
    options: tuple[str, ...] = ()


PARTS = {
    "maps": Part(compare_maps, ("cases_per_attribute", "steps", "guidance_scale")),
    "predictions": Part(predict, ("random_ablations",)),
    "ablations": Part(ablate, ("steps", "guidance_scale")),
    "places": Part(locate),
}


def make_tasks(
    pipe: DiffusionPipeline, options: argparse.Namespace, attributes: Sequence[str]
) -> tuple[list[maps.Task], str]:
    """The cases of some attributes as tasks, and the fingerprint of what makes their maps."""
    return variants.make_tasks(
        pipe,
        attributes,
        n_cases=options.cases_per_attribute,
        draws=1,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )


def keep(part: str, found: pages.Found, drawn: Figures, model: str, options: argparse.Namespace) -> None:
    """Saves what a part came to, and its figures, those of the claims among them."""
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    names = _save(drawn, folder)
    _save(((claim.name, report.draw(claim)) for claim in found.claims), folder)
    settings = {name.replace("_", " "): getattr(options, name) for name in PARTS[part].options}
    settings = {"fingerprint": model[:12]} | settings
    record, section = pages.as_json(found, model, settings), pages.as_markdown(found, settings, names)
    composing.keep(folder, part, record, section)


def scope(folder: pathlib.Path) -> str:
    """What the results that are there say and do not say: which attributes the maps are of, among others."""
    found = composing.read(folder, "maps")
    tested = list(dict.fromkeys(one["attribute"] for one in found["found"]["fidelities"])) if found else []
    named = " and ".join(filter(None, [", ".join(tested[:-1]), *tested[-1:]])) or "no attribute"
    left_out = [name for name in FACTORS if name not in tested]
    return _SCOPE.format(attributes=f"{named}, not of {', '.join(left_out)}" if tested and left_out else named)


def _save(drawn: Figures, folder: pathlib.Path) -> list[str]:
    """Saves and closes figures one after the other, and tells their names."""
    names = []
    for name, figure in drawn:
        figure.savefig(folder / f"{name}.png", dpi=150)
        matplotlib.pyplot.close(figure)
        names.append(name)
    return names


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reproduce/attribution"))
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        metavar="PART",
        help=f"only these: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--maps", type=pathlib.Path, help="folder of causal maps; without it, little is set against them"
    )
    parser.add_argument(
        "--attributes",
        nargs="+",
        choices=list(FACTORS),
        default=list(whereabouts.PROMPTS),
        metavar="NAME",
        help=f"maps of these; by default, {', '.join(whereabouts.PROMPTS)}",
    )
    parser.add_argument("--cases-per-attribute", type=int, default=4, help="of maps; the first that tracing takes")
    parser.add_argument(
        "--random-ablations",
        type=int,
        default=1000,
        help=f"of {predictions.MAIN:.0%}% of the weights, for each question",  # argparse reads % itself
    )
    parser.add_argument("--steps", type=int, default=5, help="sampler steps, of maps as of those in --maps")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = parser.parse_args()
    for name in ("cases_per_attribute", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.random_ablations < 10:
        parser.error(f"--random-ablations must be at least 10, to correlate them, got {options.random_ablations}")
    if options.maps and not options.maps.is_dir():
        parser.error(f"there is no folder {options.maps}: make maps with benchmarks.reproduce.tracing")
    return options


def main() -> None:
    """Runs the parts, and writes what all that ran so far come to."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = mediation.load_pipeline()
    model = make_tasks(pipe, options, ["style"])[1]
    composing.check(options.output, model)
    for part in PARTS:
        if part in options.parts:
            started = time.monotonic()
            keep(part, *PARTS[part].run(pipe, model, options), model, options)
            print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
    for statement, verdict in composing.compose(options.output, list(PARTS), _TITLE, scope(options.output)).items():
        print(f"{statement} {verdict}")
    print(f"{options.output / 'report.md'} has the tables")


if __name__ == "__main__":
    main()
