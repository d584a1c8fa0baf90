"""Speed of attribution on Emoji Diffusion: of activations, against sampling; of weights (CAD), against its release.

Attribution patching estimates all sites at all steps of one case; beside it stand the same case's one picture, and the
exact map, of which some sites are measured at all steps: a row that is restored late costs less, since it is computed
from there on only.

CAD scores every latent of one trajectory; its release draws a new trajectory for each t. Both score the feed-forwards
of the U-Net for erasing one concept, in turns, with one seed per turn. The scores of all turns are then correlated: of
one procedure between seeds, and between the procedures, each averaged over its seeds.

Writes report.json and report.md.

Run: python -m benchmarks.speed.attribution --output runs/speed/attribution   by estimate 20 minutes on two free cores
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy
import torch
from diffusers import DiffusionPipeline
from scipy import stats

import mediation
from benchmarks.speed.measuring import in_words, machine, ratio, spread, time_in_turns
from benchmarks.speed.releasedcad import released_scores
from mediation.parameters import choose
from mediation.pipelines import quiet

GUIDANCE_SCALE = 3.0
CASE = mediation.Case("a cat in the style of ink", subject="ink")
_AIMS = {"sampling runs": "at most 6", "speedup": "at least 10", "pearson": "above 0.9"}


def activation_attribution(pipe: DiffusionPipeline, steps: int, repeats: int, n_sites: int = 3) -> dict:
    """Times attribution patching of all sites at all steps, one picture, and a part of the exact map.

    Args:
        pipe: the pipeline.
        steps: of sampling.
        repeats: turns that are timed.
        n_sites: sites that are restored exactly, at each step.
    """
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    n_all = len(mediation.sites(pipe, network="unet"))
    measured = part_of_exact(pipe, n_sites)

    def picture() -> None:
        with quiet(pipe):
            pipe(CASE.prompt, generator=torch.Generator().manual_seed(CASE.seed), output_type="pt", **options)

    def estimates() -> None:
        mediation.trace(pipe, CASE, backend="attribution_patching", progress=False, **options)

    def exact() -> None:
        mediation.trace(pipe, CASE, progress=False, **measured, **options)

    seconds = time_in_turns({"one picture": picture, "estimates": estimates, "some exact": exact}, repeats)
    whole = [value * n_all / n_sites for value in seconds["some exact"]]
    return {
        "case": CASE.prompt,
        "steps": steps,
        "n_places": n_all * steps,
        "n_exact": n_sites * steps,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "sampling_runs": ratio(seconds["estimates"], seconds["one picture"]),
        "exact_over_estimates": ratio(whole, seconds["estimates"]),  # by extrapolation from the measured places
    }


def part_of_exact(pipe: DiffusionPipeline, n_sites: int) -> dict:
    """The options of `mediation.trace` for the first sites of the exact map of all sites at all steps.

    It takes as long for each place as the whole map does, or somewhat longer if its last batch is less full.
    """
    return {"sites": mediation.sites(pipe, network="unet")[:n_sites], "windows": "each"}


def component_attribution(pipe: DiffusionPipeline, concept: str, steps: int, repeats: int) -> dict:
    """Times both procedures in turns, and correlates what they find.

    Args:
        pipe: the pipeline.
        concept: a prompt.
        steps: of sampling.
        repeats: turns that are timed; the one before them gives scores too.
    """
    names = list(choose(pipe, None))
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    found = {"one trajectory": [], "released": []}

    def one_trajectory() -> None:
        seed = len(found["one trajectory"])
        attribution = mediation.attribute(pipe, concept, seeds=seed, progress=False, **options)
        found["one trajectory"].append(_flat(attribution.scores, names))

    def released() -> None:
        scores = released_scores(pipe, concept, names, seed=len(found["released"]), **options)
        found["released"].append(_flat(scores, names))

    seconds = time_in_turns({"one trajectory": one_trajectory, "released": released}, repeats)
    return {
        "concept": concept,
        "steps": steps,
        "guidance_scale": GUIDANCE_SCALE,
        "n_weights": len(found["released"][0]),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": ratio(seconds["released"], seconds["one trajectory"]),
        "agreement": agreement(found),
    }


def agreement(scores: Mapping[str, Sequence[numpy.ndarray]]) -> dict:
    """Correlations of scores (weight,) that two procedures gave, one array per seed.

    Returns:
        For Pearson's and Spearman's correlation: the mean over pairs of seeds within each procedure, the mean over
        seeds between them, and that of their means over seeds.

    Raises:
        ValueError: if there are fewer than two seeds.
    """
    if min(map(len, scores.values())) < 2:
        raise ValueError("seeds of one procedure are compared too: give at least two of each")
    (first, second) = scores.values()
    found = {}
    for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        within = {
            procedure: [float(correlate(a, b).statistic) for a, b in itertools.combinations(arrays, 2)]
            for procedure, arrays in scores.items()
        }
        between = [float(correlate(a, b).statistic) for a, b in itertools.product(first, second)]
        found[name] = {
            **{f"{procedure}, between seeds": float(numpy.mean(values)) for procedure, values in within.items()},
            "between procedures, one seed each": float(numpy.mean(between)),
            "between procedures, over seeds": float(correlate(*(numpy.mean(x, 0) for x in (first, second))).statistic),
            "n_seeds": len(first),
        }
    return found


def markdown(report: Mapping) -> str:
    """The report as tables."""
    ran = report["machine"]
    head = f"{ran['processor']}, {ran['cores']} cores, {ran['threads']} threads, load {ran['load']:.1f}."
    parts = [_describe_activations(report["activations"]), _describe_components(report["components"])]
    return "\n".join(["# Speed of attribution", "", head, "Medians and ranges.", "", *parts, ""])


def _describe_activations(found: Mapping) -> str:
    times = {name: in_words(values) for name, values in found["seconds"].items()}
    return "\n".join(
        [
            "## Attribution patching",
            "",
            f"{found['case']!r}, {found['steps']} steps, {found['sampling_runs']['n']} turns. All {found['n_places']:,}"
            f" places (sites of the U-Net × steps) take {times['estimates']} s, one picture",
            f"{times['one picture']} s. That is {in_words(found['sampling_runs'])} sampling runs; the aim is"
            f" {_AIMS['sampling runs']}. By the time of",
            f"{found['n_exact']} places, some sites at every step, the exact map takes"
            f" {in_words(found['exact_over_estimates'], 'x')} as long.",
            "",
        ]
    )


def _describe_components(found: Mapping) -> str:
    return "\n".join(
        [
            "## CAD",
            "",
            f"{found['concept']!r}, {found['steps']} steps, guidance {found['guidance_scale']}, {found['n_weights']:,}"
            f" weights, {found['speedup']['n']} turns.",
            "",
            "| procedure | seconds |",
            "|---|---|",
            *(f"| {name} | {in_words(values)} |" for name, values in found["seconds"].items()),
            "",
            f"One trajectory is {in_words(found['speedup'], 'x')} as fast; the aim is {_AIMS['speedup']}.",
            "",
            f"| correlation of scores, {found['agreement']['pearson']['n_seeds']} seeds | Pearson | Spearman |",
            "|---|---|---|",
            *(
                f"| {name} | {value:.3f} | {found['agreement']['spearman'][name]:.3f} |"
                for name, value in found["agreement"]["pearson"].items()
                if name != "n_seeds"
            ),
            "",
            f"The aim for Pearson's correlation between the procedures, over seeds, is {_AIMS['pearson']}.",
        ]
    )


def main() -> None:
    """Measures, and writes results as JSON and as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed/attribution"))
    parser.add_argument("--concept", default="ink style")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = mediation.load_pipeline()
    components = component_attribution(pipe, options.concept, options.steps, options.repeats)
    report = {
        "machine": machine(),
        "activations": activation_attribution(pipe, options.steps, options.repeats),
        "components": components,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "report.md").write_text(markdown(report))
    print(markdown(report))


def _flat(scores: Mapping[str, torch.Tensor], names: Sequence[str]) -> numpy.ndarray:
    return torch.cat([scores[name].flatten() for name in names]).numpy()


if __name__ == "__main__":
    main()
