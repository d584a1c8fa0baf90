"""Claims as text, as data and as figures."""

import dataclasses
import json
import math
import pathlib
import textwrap
import types
from collections.abc import Mapping, Sequence

import matplotlib.figure
import matplotlib.pyplot
import numpy

from benchmarks.reproduce.claims import INCONCLUSIVE, MARGIN, NOT_REPRODUCED, REPRODUCED, Claim

# Told apart by colour and by shape.
_MARKERS = {REPRODUCED: ("o", "#1b7837"), NOT_REPRODUCED: ("X", "#b35806"), INCONCLUSIVE: ("s", "#7f7f7f")}


def write(
    claims: Sequence[Claim],
    folder: pathlib.Path,
    settings: Mapping[str, object],
    scope: str,
    title: str = "Claims of causal tracing, tested",
    scopes: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes claims.md, claims.json, and a figure for each claim.

    Args:
        claims: the claims, on one metric.
        folder: where to; made if need be.
        settings: what was run, for the reader.
        scope: what the results say and do not say, in words.
        title: of the page.
        scopes: what the results say and do not say of single claims, by their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for claim in claims:
        figure = draw(claim)
        figure.savefig(folder / f"{claim.name}.png", dpi=200)
        matplotlib.pyplot.close(figure)
    records = {
        "settings": dict(settings),
        "scope": scope,
        **({"scopes": dict(scopes)} if scopes else {}),
        "claims": [plain(dataclasses.asdict(one)) for one in claims],
    }
    (folder / "claims.json").write_text(json.dumps(records, indent=1, allow_nan=False) + "\n")
    (folder / "claims.md").write_text(as_markdown(claims, settings, scope, title, scopes))


def as_markdown(
    claims: Sequence[Claim], settings: Mapping[str, object], scope: str, title: str, scopes: Mapping[str, str]
) -> str:
    """The claims as a page: verdicts first, then a table for each."""
    lines = [
        f"# {title}",
        "",
        "; ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "",
        "| claim | verdict |",
        "|---|---|",
        *(f"| {claim.statement} | **{claim.verdict}** |" for claim in claims),
        "",
        scope,
    ]
    for claim in claims:
        lines += [
            "",
            f"## {claim.statement}",
            "",
            f"**{claim.verdict.capitalize()}.** Rule, for each attribute: {claim.rule}.",
            "",
            *([scopes[claim.name], ""] if claim.name in scopes else []),
            f"Estimate: {claim.quantity}. Control: {claim.control}. Brackets: bootstrap intervals over cases.",
            "",
            "| attribute | place | estimate | control | sham | verdict | why |",
            "|---|---|---|---|---|---|---|",
        ]
        for one in claim.findings:
            sham = "" if one.sham is None else f"{one.sham:.1g}"
            cells = [one.attribute, one.place, str(one.estimate), str(one.control), sham, one.verdict, one.reason]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"![{claim.statement}]({claim.name}.png)"]
    return "\n".join(lines) + "\n"


def draw(claim: Claim) -> matplotlib.figure.Figure:
    """Estimates and controls with their intervals, by attribute; within the grey band, a share is negligible.

    Intervals of shares that leave the frame, which is wide enough for every estimate, go on outside.
    """
    figure, ax = matplotlib.pyplot.subplots(
        figsize=(max(5.0, 0.9 * len(claim.findings) + 2), 3.4), layout="constrained"
    )
    x = numpy.arange(len(claim.findings))
    control = [one.control for one in claim.findings]
    _intervals(ax, x + 0.15, control, fmt="D", color="0.35", markerfacecolor="white", label="control")
    for verdict, (marker, color) in _MARKERS.items():
        rows = [i for i, one in enumerate(claim.findings) if one.verdict == verdict]
        estimates = [claim.findings[i].estimate for i in rows]
        _intervals(ax, x[rows] - 0.15, estimates, fmt=marker, color=color, label=verdict)
    if any(one.sham is not None for one in claim.findings):
        ax.axhspan(-MARGIN, MARGIN, color="0.9", zorder=0)
        means = [e.mean for e in (*control, *(one.estimate for one in claim.findings)) if math.isfinite(e.mean)]
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, min([-0.5, *means]) - 0.1), min(high, max([1.5, *means]) + 0.1))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(x, [one.attribute for one in claim.findings])
    ax.set_ylabel(textwrap.fill(claim.quantity, 42), fontsize="small")
    ax.set_title(claim.statement, fontsize="small", wrap=True)
    if claim.findings:
        ax.legend(fontsize="x-small", ncols=4, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    return figure


def _intervals(ax, x, estimates, **style) -> None:
    """Points with intervals; an interval that is not finite is left out."""
    if not estimates:
        return
    mean, low, high = numpy.array([dataclasses.astuple(one) for one in estimates]).T
    reach = numpy.maximum(0, [mean - low, high - mean])
    reach = numpy.where(numpy.isfinite(reach), reach, 0)
    ax.errorbar(x, mean, yerr=reach, linestyle="none", capsize=3, markersize=6, **style)


def plain(value):
    """Without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
