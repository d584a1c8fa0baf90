"""Where the time of tracing goes, on Emoji Diffusion: by part, by kind of operation, and in the memory allocator.

Parts and operations are read off torch's profiler during one trace of every U-Net site, and the same trace is timed in
fresh processes with glibc's allocator as it is, and told to keep what is freed.

Run: python -m benchmarks.speed.profiling --output runs/speed/profile        some minutes on two cores
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import resource
import time
from collections.abc import Iterator, Mapping
from unittest import mock

import torch

from benchmarks.speed import measuring, sweeps

_N_STEPS = 10
# glibc's mallopt(3): no block is mapped on its own, and nothing that is freed goes back to the system.
KEEPING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
# kind: how names of torch's operators begin; the first match counts
_KINDS = {
    "convolution": ("aten::mkldnn_convolution", "aten::_convolution", "aten::slow_conv", "aten::thnn_conv"),
    "matrix product": ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "normalisation": ("aten::native_group_norm", "aten::native_layer_norm"),
    "activation": ("aten::silu", "aten::gelu", "aten::sigmoid"),
    "copying and joining": ("aten::copy_", "aten::cat", "aten::index", "aten::clone", "aten::upsample"),
    "arithmetic": ("aten::add", "aten::mul", "aten::sub", "aten::div"),
}


def make_sweep() -> sweeps.Sweep:
    """Every U-Net site of Emoji Diffusion, one case."""
    return sweeps.make_sweep("emoji", None, _N_STEPS)


@contextlib.contextmanager
def labelled(sweep: sweeps.Sweep) -> Iterator[None]:
    """Tells the profiler which part of the pipeline or of the metric is at work."""
    parts = {
        "U-Net": (sweep.pipe.unet, "forward"),
        "text encoder": (sweep.pipe.text_encoder, "forward"),
        "decoder": (sweep.pipe.vae, "decode"),
        "scorer": (sweep.metric.model, "forward"),
        "scheduler": (sweep.pipe.scheduler, "step"),
    }
    with contextlib.ExitStack() as stack:
        for label, (owner, name) in parts.items():
            # of the instance, so that nothing but this object is changed, and for the time of this block
            stack.enter_context(mock.patch.object(owner, name, _recorded(label, getattr(owner, name))))
        yield


def _recorded(label: str, function):
    @functools.wraps(function)
    def wrapper(*arguments, **options):
        with torch.profiler.record_function(f"part: {label}"):
            return function(*arguments, **options)

    return wrapper


def profile(sweep: sweeps.Sweep) -> dict:
    """Seconds of one trace by part, and shares of the time that operators take by their kind."""
    sweeps.traced(sweep)
    with labelled(sweep), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        sweeps.traced(sweep)
        total = time.perf_counter() - started
    events = profiler.key_averages()
    parts = {e.key.removeprefix("part: "): e.cpu_time_total / 1e6 for e in events if e.key.startswith("part: ")}
    parts["everything else"] = total - sum(parts.values())
    return {"seconds": total, "parts": parts, "kinds": by_kind({e.key: e.self_cpu_time_total for e in events})}


def by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """Shares of operators' own time by kind.

    Example:
        >>> by_kind({"aten::mm": 3.0, "aten::silu_": 0.5, "aten::view": 0.5, "part: U-Net": 9.0})
        {'matrix product': 0.75, 'activation': 0.125, 'other operators': 0.125}
    """
    operators = {name: value for name, value in times.items() if name.startswith("aten::")}
    kinds = dict.fromkeys([*_KINDS, "other operators"], 0.0)
    for name, value in operators.items():
        kinds[next((kind for kind, begins in _KINDS.items() if name.startswith(begins)), "other operators")] += value
    total = sum(kinds.values())
    return {kind: value / total for kind, value in kinds.items() if value}


def timed_afresh(settings: Mapping[str, str]) -> dict[str, float]:
    """One trace in a process of its own, whose allocator has these settings: seconds, and pages fetched."""
    context = multiprocessing.get_context("spawn")
    # The allocator reads its environment when a process starts.
    with mock.patch.dict(os.environ):
        for name in KEEPING:
            os.environ.pop(name, None)
        os.environ.update(settings)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as child:
            return child.submit(_time_once, torch.get_num_threads()).result()


def _time_once(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    sweep = make_sweep()
    sweeps.traced(sweep)
    faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    sweeps.traced(sweep)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}


def as_markdown(report: Mapping) -> str:
    """The report as tables."""
    machine, found = report["machine"], report["profile"]
    plain, keeping = ([run["seconds"] for run in report["allocator"][name]] for name in ("plain", "keeping"))
    lines = [
        "# Where the time of tracing goes",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load']:.1f};"
        f" Emoji Diffusion, every U-Net site, {_N_STEPS} steps, {found['seconds']:.1f} s under the profiler.",
        "",
        "| part | share of the time |",
        "|---|---|",
        *(f"| {part} | {value / found['seconds']:.1%} |" for part, value in found["parts"].items()),
        "",
        "| kind of operator | share of operators' own time |",
        "|---|---|",
        *(f"| {kind} | {share:.1%} |" for kind, share in found["kinds"].items()),
        "",
        "| memory allocator | seconds of the trace | pages fetched |",
        "|---|---|---|",
    ]
    for name, runs in report["allocator"].items():
        seconds, pages = (measuring.spread([run[key] for run in runs]) for key in ("seconds", "page_faults"))
        lines.append(f"| {name} | {measuring.in_words(seconds)} | {pages['median']:,.0f} |")
    ratio = measuring.in_words(measuring.ratio(plain, keeping), "×")
    lines += ["", f"Keeping freed memory: {ratio} faster, medians and ranges of {len(plain)} turns, with"]
    lines += ["", "    export " + " ".join(f"{name}={value}" for name, value in KEEPING.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes report.json and report.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed/profile"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {"machine": measuring.machine(), "allocator": {"plain": [], "keeping": []}}
    for _ in range(options.repeats):
        report["allocator"]["plain"].append(timed_afresh({}))
        report["allocator"]["keeping"].append(timed_afresh(KEEPING))
    report["profile"] = profile(make_sweep())
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "report.md").write_text(as_markdown(report))
    print(as_markdown(report), end="")


if __name__ == "__main__":
    main()
