"""Measuring: the machine, runs timed in turns, and the peak memory of a run in a process of its own."""

import concurrent.futures
import gc
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import torch
from tqdm import tqdm

_PACKAGES = ("torch", "diffusers", "transformers", "numpy")
# Of glibc: what is freed goes back to the system at once, so that a process is as large as what it holds.
_KEEPS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def machine() -> dict[str, object]:
    """What ran the measurements: processor, memory, threads, versions, and how busy it was at this moment."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` of each, taking turns so that a machine which slows down slows them all.

    Args:
        runs: by name.
        repeats: turns.
        warm: whether every run has gone once before. If not, it does so now, unmeasured.

    Raises:
        ValueError: if there is nothing to repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what was there before is no garbage of a run, and takes half a second to go through
    try:
        for turn in tqdm(range(0 if warm else -1, repeats), desc="turns", disable=None):
            for name, run in runs.items():
                gc.collect()
                started = time.perf_counter()
                run()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        gc.unfreeze()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median and range of repeated measurements.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'low': 1.0, 'high': 3.0, 'n': 3}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float | int]:
    """Spread of the ratios turn by turn.

    Example:
        >>> ratio([4.0, 6.0], [2.0, 2.0])
        {'median': 2.5, 'low': 2.0, 'high': 3.0, 'n': 2}
    """
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def in_words(found: Mapping[str, float], unit: str = "") -> str:
    """A spread as tables show it.

    Example:
        >>> in_words({"median": 2.5, "low": 2.0, "high": 3.0, "n": 2}, "x")
        '2.5x [2, 3]'
    """
    return f"{found['median']:.3g}{unit} [{found['low']:.3g}, {found['high']:.3g}]"


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments) -> float:
    """By how many MiB a run exceeds what its process held before, at the peak; in a fresh process, on Linux.

    By default glibc keeps much of what is freed, in pieces that later requests may not fit: that varies between runs,
    grows with their length, and is not counted here.

    Args:
        prepare: a function of a module, so that the process can find it; it returns the run.
        *arguments: of `prepare`, picklable.
    """
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, _KEEPS_NOTHING), concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(_measure_peak, torch.get_num_threads(), prepare, arguments).result()


def _measure_peak(threads: int, prepare: Callable[..., Callable[[], object]], arguments: tuple) -> float:
    torch.set_num_threads(threads)
    run = prepare(*arguments)
    gc.collect()
    # Forgets the peak so far, which loading may have set: proc(5), clear_refs.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    return int(re.search(rf"{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))
