"""Speed and memory of causal tracing, against the reference procedure, nnsight, and the limit.

All run the same sweep in turns, one case and one draw with every site restored once, and must give the same map:

- traced: `mediation.trace`.
- triples: the reference procedure, for each site a batch of three rows: clean, corrupted, restored.
- nnsight, if it is installed, in the two ways that its documentation shows: a trace per site, and the clean run cached.
- limit: as many row-evaluations of the bare U-Net, at its best batch size, and the same text encoding, decoding and
  scoring.

emoji is Emoji Diffusion, all sites of its U-Net, with CLIPScore. sd14 has the networks of SD 1.4 with random weights,
16×16 latents, 8 sites and two steps, with the distance of latents, which needs no decoding. Peak memory is measured on
Emoji Diffusion, in a process of its own for each number of steps and sites.

Run: python -m benchmarks.speed.tracing --output runs/speed/tracing
By their row-evaluations, emoji needs about six minutes on two cores, and sd14 twice as long.
"""

import argparse
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy
import torch

from benchmarks.speed import measuring, nnsight_sweeps, sweeps


class _Size(NamedTuple):
    """How large a sweep is.

    Attributes:
        steps: of sampling.
        n_sites: how many sites; None is all.
        batch_sizes: to try the bare U-Net at.
        warms_up: whether every way goes once, unmeasured, before it is timed: nothing of minutes needs that.
    """

    steps: int
    n_sites: int | None
    batch_sizes: tuple[int, ...]
    warms_up: bool


_SIZES = {
    "emoji": _Size(10, None, (2, 4, 8, 16, 32, 64), warms_up=True),
    "sd14": _Size(2, 8, (2, 4, 8, 16, 32), warms_up=False),
}
_MEMORY = ((10, 10), (25, 10), (50, 10), (10, 40))  # steps, sites
_AIMS = {"triples": "≥ 2.5", "nnsight_per_site": "> 1", "nnsight_cached": "> 1", "limit": "≥ 0.85"}
_NAMES = {
    "traced": "`mediation.trace`",
    "triples": "three rows per site",
    "nnsight_per_site": "nnsight, a trace per site",
    "nnsight_cached": "nnsight, clean run cached",
    "limit": "limit: bare U-Net, text, decoding, scoring",
}


def measure(name: str, repeats: int, folder: pathlib.Path) -> dict:
    """Times every way to do the sweep, and counts row-evaluations.

    Args:
        name: the model.
        repeats: turns.
        folder: where nnsight may find a copy of the pipeline.

    Raises:
        RuntimeError: if two ways give different maps, so that comparing their speed would mean nothing.
    """
    size = _SIZES[name]
    sweep = sweeps.make_sweep(name, size.n_sites, size.steps)
    counts = sweeps.count_evaluations(sweep)
    runs = {
        "traced": functools.partial(sweeps.traced, sweep),
        "triples": functools.partial(sweeps.triples, sweep),
    }
    if nnsight_sweeps.is_installed():
        model = nnsight_sweeps.wrap(sweep.pipe, folder)
        runs["nnsight_per_site"] = functools.partial(nnsight_sweeps.one_trace_per_site, sweep, model)
        runs["nnsight_cached"] = functools.partial(nnsight_sweeps.cached, sweep, model, counts["rows_per_call"])
    maps = {}
    runs = {way: functools.partial(_keep, maps, way, run) for way, run in runs.items()}
    best = sweeps.best_batch_size(sweep, size.batch_sizes)
    runs["limit"] = functools.partial(
        sweeps.limit, sweep, counts["evaluations"], counts["rows"], best, counts["rows_per_call"]
    )
    seconds = measuring.time_in_turns(runs, repeats, warm=not size.warms_up)
    return {
        "steps": size.steps,
        "sites": len(sweep.sites),
        "metric": sweep.metric.name,
        "row_evaluations": counts,
        "best_batch_size_of_unet": best,
        "seconds": seconds,
        # how many times faster than the others tracing is
        "ratios": {way: measuring.ratio(values, seconds["traced"]) for way, values in seconds.items()},
        "largest_difference_of_maps": check_agreement(maps),
    }


def _keep(maps: dict[str, numpy.ndarray], way: str, run: Callable[[], numpy.ndarray]) -> None:
    maps[way] = run()


def check_agreement(maps: Mapping[str, numpy.ndarray]) -> dict[str, float]:
    """The largest difference of each map from the one of "traced".

    Raises:
        RuntimeError: if it exceeds a thousandth of the range of that map, and rounding.
    """
    differences = {way: float(abs(found - maps["traced"]).max()) for way, found in maps.items() if way != "traced"}
    # the second term for random weights, which may hardly tell sites apart: latents of order one in float32
    tolerance = 1e-3 * float(numpy.ptp(maps["traced"])) + 1e-5
    if far := [way for way, difference in differences.items() if not difference <= tolerance]:
        raise RuntimeError(f"{', '.join(far)} give other maps: differences {differences}, tolerance {tolerance:.2g}")
    return differences


def as_markdown(report: Mapping) -> str:
    """The report as tables."""
    machine = report["machine"]
    lines = [
        "# Speed and memory of tracing",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load']:.1f};"
        f" medians and ranges of {report['repeats']} turns.",
    ]
    for name, found in report["models"].items():
        lines += ["", *_speed_table(name, found)]
    lines += [
        "",
        "| steps | sites | peak memory above the pipeline's own, MiB |",
        "|---|---|---|",
        *(f"| {row['steps']} | {row['sites']} | {row['mib']:.0f} |" for row in report["memory"]),
    ]
    if not report["nnsight"]:
        lines += ["", "nnsight is not installed, and therefore left out."]
    return "\n".join(lines) + "\n"


def _speed_table(name: str, found: Mapping) -> list[str]:
    counts = found["row_evaluations"]
    lines = [
        f"{name}: {found['sites']} sites, {found['steps']} steps, {found['metric']}; {counts['rows']} rows in chunks of"
        f" {counts['chunk']}, at most {counts['rows_at_most']} allowed; {counts['evaluations']} row-evaluations of the"
        f" U-Net counted; its best batch size is {found['best_batch_size_of_unet']}.",
        "",
        "| | seconds | time, relative to tracing | aim |",
        "|---|---|---|---|",
    ]
    for way, values in found["seconds"].items():
        seconds = measuring.in_words(measuring.spread(values))
        cells = [_NAMES[way], seconds, measuring.in_words(found["ratios"][way], "×"), _AIMS.get(way, "")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures, and writes report.json and report.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed/tracing"))
    parser.add_argument("--models", nargs="+", choices=list(_SIZES), default=list(_SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": measuring.machine(),
        "repeats": options.repeats,
        "nnsight": nnsight_sweeps.is_installed(),
        "memory": [
            {"steps": steps, "sites": n_sites, "mib": measuring.peak_memory(sweeps.make_long_run, steps, n_sites)}
            for steps, n_sites in _MEMORY
        ],
        "models": {},
    }
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            report["models"][name] = measure(name, options.repeats, pathlib.Path(folder))
        # after each model, since the last one takes longest
        (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / "report.md").write_text(as_markdown(report))
    print(as_markdown(report), end="")


if __name__ == "__main__":
    main()
