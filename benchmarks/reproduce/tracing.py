"""Where is knowledge? The claims of Basu et al. (ICLR 2024, arXiv:2310.13730), tested by causal tracing.

For every attribute, every site of the U-Net, and every site of the text encoder at four token groups, is restored in
corrupted runs. Each map is saved as soon as it is ready, and found again when the command is called again.

Run: python -m benchmarks.reproduce.tracing --output runs/reproduce/tracing

For real weights, add --model FOLDER --cases cases.csv --scorer CLIP_FOLDER --guidance-scale 7.5 --steps 25, where
cases.csv has the columns prompt, subject, attribute and, if need be, seed. On a GPU, add --device cuda --dtype float16.

Cost: with the defaults, 7 attributes of 24 cases with 2 draws and 5 steps, at most 310,000 row-evaluations of the
U-Net: an hour on two cores that evaluate 90 rows per second. It grows in proportion to cases, draws and steps. The
number is printed before work starts.
"""

import argparse
import pathlib
import time
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

import mediation
from benchmarks.emoji.evaluate import GUIDANCE_SCALE
from benchmarks.reproduce import attributes, maps, report
from benchmarks.reproduce.maps import Task
from benchmarks.reproduce.tracing_claims import all_claims
from mediation import bundled
from mediation.casefiles import read_cases
from mediation.mapfiles import open_map
from mediation.metrics import CLIPScore, named_metric
from mediation.options import DTYPES, load

_N_CASES = 24
_SCOPES = {
    "emoji": (
        "These results are about Emoji Diffusion: a U-Net of 32 sites, a text encoder of six layers, captions of one"
        " small world, a judge as small, and few sampler steps; its card says how well it draws. A claim that is"
        " reproduced here is not peculiar to the size and the data of SD 1.4, but its reasons there may be others. One"
        " that is not reproduced is not refuted for SD 1.4, which has 70 sites and other training: it does not follow"
        " from architecture and method alone. The maps were made with one corruption, Gaussian noise on the"
        " subject's embeddings, and one direction, restoring; necessity was not asked."
    ),
    "other": (
        "These results are about the pipeline and the cases named above, with one corruption, Gaussian noise on the"
        " subject's embeddings, and one direction, restoring; necessity was not asked."
    ),
}


_CLAIM_SCOPES = {
    "one_text_state": (
        "For SD 1.4, this tests whether causal attention and contrastive training, which both text encoders share, are"
        " enough to make that state the only one; it does not say where SD 1.4, whose encoder has twelve layers and"
        " learned from other texts, holds a subject."
    ),
    "distributed": (
        "For SD 1.4, this tests whether layers of the kinds that both U-Nets are made of spread knowledge by"
        " themselves; it does not say how widely SD 1.4, with 70 sites and far more to draw, spreads its own."
    ),
    "differs_by_attribute": (
        "For SD 1.4, this tests whether a U-Net of such layers keeps different attributes at different sites; it does"
        " not say at which sites of SD 1.4 any attribute is, since the layers of the two do not correspond."
    ),
    "cross_attention_not_causal": (
        "For SD 1.4, this tests whether cross-attentions are bound not to be causal, although text enters either U-Net"
        " by them alone; it does not say whether any of the 16 of SD 1.4 is."
    ),
    "first_self_attention_for_style": (
        "For SD 1.4, this tests whether the first self-attention, before which either U-Net reads no text in a step, is"
        " bound to carry style and nothing else; it does not say what it carries in SD 1.4, whose styles are those of"
        " artists and not five of emoji."
    ),
}


def make_tasks(pipe: DiffusionPipeline, options: argparse.Namespace) -> tuple[list[Task], str]:
    """The maps to make, and the fingerprint of what makes them."""
    score = named_metric(pipe, None, options.scorer)
    judges = [score.model] if isinstance(score, CLIPScore) else []
    tasks = []
    for attribute, labels in labelled_cases(options).items():
        metrics = [score]
        if options.cases is None:
            probe = bundled.load_probe()
            judges.append(probe)
            metrics.append(attributes.StatedProbability(probe, attributes.FACTORS[attribute], labels))
        for network in maps.NETWORKS:
            tasks.append(Task(attribute, network, tuple(labels), tuple(metrics), options.steps, options.guidance_scale))
    return tasks, maps.fingerprint(pipe, list(dict.fromkeys(judges)))


def labelled_cases(options: argparse.Namespace) -> dict[str, dict[mediation.Case, object]]:
    """By attribute, its cases, each with the label that its picture should have, or None.

    Raises:
        ValueError: if an attribute is unknown, or has too few cases.
    """
    if options.cases is None:
        n = options.cases_per_attribute or _N_CASES
        wanted = options.attributes or list(attributes.FACTORS)
        return {attribute: dict(attributes.make_cases(attribute, n, options.draws)) for attribute in wanted}
    found, names = read_cases(options.cases, mediation.GaussianNoise(draws=options.draws))
    cases = {}
    for case, attribute in zip(found, names, strict=True):
        cases.setdefault(attribute or "unnamed", {})[case] = None
    wanted = options.attributes or list(cases)
    if unknown := sorted(set(wanted) - set(cases)):
        raise ValueError(f"{options.cases.name} has no cases of {', '.join(unknown)}; it has {', '.join(cases)}")
    n = options.cases_per_attribute
    for attribute in wanted:
        if n and len(cases[attribute]) < n:
            raise ValueError(f"{options.cases.name} has {len(cases[attribute])} cases of {attribute}, not {n}")
    return {attribute: dict(list(cases[attribute].items())[:n]) for attribute in wanted}


def make_maps(pipe: DiffusionPipeline, tasks: Sequence[Task], folder: pathlib.Path, model: str) -> None:
    """Makes the maps that are not in the folder, one after the other."""
    pending = maps.pending(tasks, folder, model)
    costs = [task.row_evaluations(pipe) for task in pending]
    print(f"{len(tasks) - len(pending)} of {len(tasks)} maps are there", flush=True)
    if pending:
        print(f"the others need {sum(costs):,} row-evaluations of the denoiser", flush=True)
    for task, cost in zip(pending, costs, strict=True):
        started = time.monotonic()
        maps.make(task, pipe, folder, model)
        seconds = time.monotonic() - started
        path = maps.map_path(task, folder)
        print(f"{path} {seconds:.0f} s, {cost / seconds:.0f} row-evaluations per second", flush=True)


def write_claims(
    tasks: Sequence[Task], folder: pathlib.Path, settings: dict[str, object], scope: str, scopes: dict[str, str]
) -> None:
    """Puts the claims to the maps, by each metric on its own, and prints the verdicts."""
    found = {(task.network, task.attribute): open_map(maps.map_path(task, folder / "maps")) for task in tasks}
    for metric in next(iter(found.values())).metric.values.tolist():
        chosen = {key: effects.sel(metric=metric, drop=True) for key, effects in found.items()}
        denoiser, text = ({a: one for (n, a), one in chosen.items() if n == network} for network in maps.NETWORKS)
        claims = all_claims(denoiser, text)
        report.write(claims, folder / metric, settings | {"metric": metric}, scope, scopes=scopes)
        for claim in claims:
            print(f"{metric}: {claim.name}: {claim.verdict}")


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reproduce/tracing"))
    parser.add_argument("--model", help="a pipeline's folder or hub id; without it, Emoji Diffusion")
    parser.add_argument("--device", help="where --model runs, as cuda; without it, the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights of --model; without it, float32")
    parser.add_argument("--cases", type=pathlib.Path, help="CSV or JSON; without it, captions of the emoji world")
    parser.add_argument(
        "--scorer", type=pathlib.Path, help="folder of a CLIPModel; for other pipelines than the bundled"
    )
    parser.add_argument("--attributes", nargs="+", help="only these; without it, all")
    parser.add_argument("--cases-per-attribute", type=int, help=f"{_N_CASES}, or all of a file")
    parser.add_argument("--draws", type=int, default=2, help="noises per case")
    parser.add_argument("--steps", type=int, default=5, help="sampler steps")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = parser.parse_args()
    if options.model and not options.cases:
        parser.error("--model needs --cases: the captions of the emoji world mean nothing to another model")
    if (options.device or options.dtype) and not options.model:
        parser.error("--device and --dtype are for --model: Emoji Diffusion and its judges run on the CPU")
    for name in ("cases_per_attribute", "draws", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return options


def main() -> None:
    """Makes the maps, and puts the claims to them."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = load(options.model, options.device, options.dtype)
    tasks, model = make_tasks(pipe, options)
    make_maps(pipe, tasks, options.output / "maps", model)
    sizes = [len(task.cases) for task in tasks]
    settings = {
        "pipeline": options.model or "Emoji Diffusion",
        "fingerprint": model[:12],
        "cases per attribute": f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else sizes[0],
        "draws": options.draws,
        "steps": options.steps,
        "guidance": options.guidance_scale,
    }
    settings |= {"dtype": options.dtype} if options.dtype else {}
    scope, scopes = (_SCOPES["other"], {}) if options.cases else (_SCOPES["emoji"], _CLAIM_SCOPES)
    write_claims(tasks, options.output, settings, scope, scopes)


if __name__ == "__main__":
    main()
