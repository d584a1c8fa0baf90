"""Speed, memory and accuracy of `editing.quickfix`, beside the released procedure, at the size of CLIP ViT-L/14.

One concept, from prompts to factors; one to a thousand concepts with as many preserved; and the solve against a float64
least-squares solution of another kind. Everything is measured in one run. Writes report.json, report.md, report.png.

Run: python -m benchmarks.speed.editing --output runs/speed/editing          by estimate ten minutes on two free cores
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping

import torch
from diffusers import DiffusionPipeline

import editing
from benchmarks.released import released_weight
from benchmarks.speed import clip
from benchmarks.speed.accuracy import solve_accuracy
from benchmarks.speed.editing_report import draw, markdown
from benchmarks.speed.measuring import machine, peak_memory, ratio, spread, time_in_turns

_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MEMORY_COUNTS = (1, 10, 100, 1000)
# The release takes as long for every further concept; a thousand would need half an hour.
_RELEASED_COUNTS = (1, 2, 5, 10)
_PART = 50  # concepts that a fitter is given at a time


def one_concept(pipe: DiffusionPipeline, repeats: int) -> dict:
    """Times one concept: the whole call of `quickfix`, its part from prompts to factors, and the release.

    What `quickfix` does besides is hashing the weight in three dtypes and measuring residuals.
    """
    pairs, _ = clip.concepts(1, 0)
    reports = []
    runs = {
        "quickfix": lambda: reports.append(editing.quickfix(pipe, pairs).report["milliseconds"]),
        "released": lambda: released_weight(pipe, pairs),
    }
    seconds = time_in_turns(runs, repeats)
    stages = reports[-repeats:]  # the first run was not measured
    factors = [sum(stage[name] for name in ("tokens", "keys", "solve")) / 1000 for stage in stages]
    return {
        "seconds": {name: spread(values) for name, values in (seconds | {"prompts to factors": factors}).items()},
        "stages": {name: spread([stage[name] / 1000 for stage in stages]) for name in stages[0]},
        "speedup": ratio(seconds["released"], seconds["quickfix"]),
        "speedup from prompts to factors": ratio(seconds["released"], factors),
    }


def by_count(pipe: DiffusionPipeline, counts: tuple[int, ...], repeats: int) -> dict[str, dict[int, dict]]:
    """Times edits of many concepts with as many preserved; the release preserves nothing."""
    found: dict[str, dict[int, dict]] = {"quickfix": {}, "fitter": {}, "released": {}}
    for n in counts:
        runs = {"quickfix": quickfix_run(pipe, n), "fitter": fitter_run(pipe, n)}
        if n in _RELEASED_COUNTS:
            pairs, _ = clip.concepts(n, 0)
            runs["released"] = lambda pairs=pairs: released_weight(pipe, pairs)
        for name, values in time_in_turns(runs, repeats).items():
            found[name][n] = spread(values)
    return found


def memory_by_count(counts: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Peak memory in MiB above the loaded pipeline's, each in a process of its own."""
    prepared = {"quickfix": prepare_quickfix, "fitter": prepare_fitter}
    return {name: {n: peak_memory(prepare, n) for n in counts} for name, prepare in prepared.items()}


def quickfix_run(pipe: DiffusionPipeline, n: int) -> Callable[[], object]:
    """Edits `n` concepts and preserves `n` others, at once."""
    pairs, preserve = clip.concepts(n, n)
    return lambda: editing.quickfix(pipe, pairs, preserve=preserve)


def fitter_run(pipe: DiffusionPipeline, n: int) -> Callable[[], object]:
    """The same, a part of the concepts at a time."""
    pairs, preserve = clip.concepts(n, n)

    def run() -> editing.Edit:
        fitter = editing.Fitter(pipe)
        for start in range(0, n, _PART):
            part = slice(start, start + _PART)
            fitter.update(dict(list(pairs.items())[part]), preserve=preserve[part])
        return fitter.fit()

    return run


def prepare_quickfix(n: int) -> Callable[[], object]:
    """`quickfix_run` on a pipeline of its own, warmed up by a single concept."""
    return _prepare(quickfix_run, n)


def prepare_fitter(n: int) -> Callable[[], object]:
    """`fitter_run` likewise."""
    return _prepare(fitter_run, n)


def _prepare(make: Callable[[DiffusionPipeline, int], Callable[[], object]], n: int) -> Callable[[], object]:
    pipe = clip.load()
    make(pipe, 1)()
    return make(pipe, n)


def _report(options: argparse.Namespace) -> Mapping:
    counts, memory_counts = (tuple(n for n in numbers if n <= options.largest) for numbers in (_COUNTS, _MEMORY_COUNTS))
    pipe = clip.load()
    n_parameters = sum(parameter.numel() for parameter in pipe.text_encoder.parameters())
    found = {"machine": machine(), "n_parameters": n_parameters, "one": one_concept(pipe, options.repeats)}
    found["many"] = by_count(pipe, counts, 1)
    found["accuracy"] = solve_accuracy(pipe)
    return found | {"memory": memory_by_count(memory_counts)}


def main() -> None:
    """Measures, and writes results as JSON, as a table and as a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="By estimate ten minutes on two free cores; --largest shortens it."
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed/editing"))
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repeats", type=int, default=9, help="of the edit of one concept, in turns with the release")
    parser.add_argument("--largest", type=int, default=max(_COUNTS), help="number of concepts edited at once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Keys and lists as JSON has them, so that tables and figures can be made again from the file.
    found = json.loads(json.dumps(_report(options)))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    table = markdown(found)
    (options.output / "report.md").write_text(table)
    draw(found).savefig(options.output / "report.png", dpi=200)
    print(table)


if __name__ == "__main__":
    main()
