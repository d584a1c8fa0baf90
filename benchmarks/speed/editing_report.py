"""The measurements of `benchmarks.speed.editing` as a table and as a figure."""

from collections.abc import Mapping

import matplotlib.figure
import matplotlib.pyplot

from benchmarks.speed.measuring import in_words

_COLORS = {"quickfix": "#7b6aa6", "fitter": "#3f8f8b", "released": "#d98a29"}
_LABELS = {"quickfix": "quickfix", "fitter": "Fitter, by parts", "released": "the release"}

_ERRORS = {
    "solved": "solved",
    "stored": "stored",
    "released": "release",
    "stored weight": "stored, of W",
    "released weight": "release, of W",
    "truth": "truth",
}


def goals(found: Mapping) -> list[tuple[str, str, bool]]:
    """What was aimed at, what came out, and whether the aim is met; what was not measured is left out."""
    factors, speedup = found["one"]["seconds"]["prompts to factors"], found["one"]["speedup from prompts to factors"]
    milliseconds = {name: 1000 * value for name, value in factors.items()}
    worst = max(max(row["solved"], row["stored"]) for row in found["accuracy"])
    aims = [
        ("one concept, times as fast as the release: at least 50", in_words(speedup), speedup["median"] >= 50),
        ("one concept, prompts to factors: under 50 ms", in_words(milliseconds, " ms"), milliseconds["median"] < 50),
        ("relative error of the change: at most 1e-6", f"{worst:.1e}", worst <= 1e-6),
    ]
    if (many := found["many"]["quickfix"].get("1000")) is not None:
        seconds = many["median"]
        aims.append(("1,000 concepts and 1,000 preserved: under 30 s", f"{seconds:.3g} s", seconds < 30))
    return aims


def markdown(found: Mapping) -> str:
    """All measurements as Markdown."""
    machine, one = found["machine"], found["one"]
    lines = [
        "# Speed of editing",
        "",
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load']:.1f} at the start,"
        f" torch {machine['versions']['torch']}; text encoder with {found['n_parameters']:,} random weights.",
        "Medians, with the range over runs.",
        "",
        *_table(["goal", "found", "met"], [(goal, value, "yes" if met else "no") for goal, value, met in goals(found)]),
        "",
        "## One concept",
        "",
        *_table(["", "seconds"], [(name, in_words(values)) for name, values in one["seconds"].items()]),
        "",
        *_table(["stage of quickfix", "seconds"], [(name, in_words(values)) for name, values in one["stages"].items()]),
        "",
        f"Times as fast as the release: {in_words(one['speedup'])} for the whole call,"
        f" {in_words(one['speedup from prompts to factors'])} from prompts to factors.",
        "",
        "## Many concepts, and as many preserved",
        "",
        "The release preserves nothing. Memory is the peak above the loaded pipeline's.",
        "",
        *_table(
            ["concepts", *(f"{label}, s" for label in _LABELS.values()), "quickfix, MiB", "Fitter, by parts, MiB"],
            [_many(found, n) for n in found["many"]["quickfix"]],
        ),
        "",
        "## Accuracy of the solve",
        "",
        "Relative errors in Frobenius norm against float64 least squares by QR; the last column is how far singular",
        "values come out from QR. Stored factors are float32.",
        "",
        *_table(
            ["tokens", "concepts", "keys", "lambda", *_ERRORS.values()],
            [_accuracy(row) for row in found["accuracy"]],
        ),
    ]
    return "\n".join(lines) + "\n"


def draw(found: Mapping) -> matplotlib.figure.Figure:
    """Time and memory by the number of concepts, and error by lambda."""
    figure, (time, memory, error) = matplotlib.pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, by_count in found["many"].items():
        seconds = [values["median"] for values in by_count.values()]
        time.plot(list(map(int, by_count)), seconds, "o-", color=_COLORS[name], label=_LABELS[name])
    for name, by_count in found["memory"].items():
        memory.plot(list(map(int, by_count)), list(by_count.values()), "o-", color=_COLORS[name], label=_LABELS[name])
    kinds = list(dict.fromkeys((row["tokens"], row["n_concepts"]) for row in found["accuracy"]))
    for marker, (tokens, n) in zip("os^v", kinds, strict=True):
        rows = [row for row in found["accuracy"] if (row["tokens"], row["n_concepts"]) == (tokens, n)]
        for name, column in (("quickfix", "stored"), ("released", "released")):
            style = {"color": _COLORS[name], "label": f"{_LABELS[name]}, {tokens}, {n} concept{'s' if n > 1 else ''}"}
            error.plot([row["lambda"] for row in rows], [row[column] for row in rows], f"{marker}-", **style)
    for ax, labels in (
        (time, ("concepts edited at once", "seconds")),
        (memory, ("concepts edited at once", "peak memory, MiB")),
        (error, ("lambda", "relative error of the change")),
    ):
        ax.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=6, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _many(found: Mapping, n: str) -> list[str]:
    seconds = [found["many"][name].get(n) for name in _LABELS]
    memory = [found["memory"][name].get(n) for name in ("quickfix", "fitter")]
    cells = [f"{values['median']:.3g}" if values else "" for values in seconds]
    return [n, *cells, *("" if value is None else f"{value:.0f}" for value in memory)]


def _accuracy(row: Mapping) -> list[str]:
    counts = (str(row["n_concepts"]), str(row["n_keys"]))
    return [row["tokens"], *counts, f"{row['lambda']:g}", *(f"{row[column]:.1e}" for column in _ERRORS)]


def _table(header: list[str], rows: list) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
