"""Whether ablations change pictures of their concept, more than all others, and more than controls do.

With s the share of pictures that show what their prompt says, before and after the edit, and a sign that is −1 for
erasing and 1 for amplifying,

    target     = sign · (s_after − s_before)     of prompts that name the concept
    bystanders = s_after − s_before              of prompts that do not
    selective  = target + bystanders

so that an edit which ruins every picture is not selective. There must be room for a change: a concept that all pictures
show cannot be brought out further, nor one that none shows be removed, and nothing follows from that.

Intervals are percentiles over resampled prompts, the same for all models, and hold together over the ratios that are
tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy
import xarray

from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim, Estimate, Finding
from editing.ablation import CONTROLS
from editing.evaluation import UNEDITED

_CONFIDENCE = 1 - 0.05 / len(RATIOS)
_N_RESAMPLES = 4000
_SIGNS = {"erase": -1, "amplify": 1}
_SHOWN = {"erase": "missing", "amplify": "shown"}
_NAMING = ("efficacy", "generality")


@dataclasses.dataclass(frozen=True)
class Selectivity:
    """What an ablation at one ratio does.

    Attributes:
        ratio: share of the weights.
        room: the largest change of target pictures that there could be.
        target: change of pictures that should change, positive if as wanted.
        bystanders: change of those that should not, negative if they are harmed.
        selective: the sum of both.
        controls: control -> its own `selective`.
        advantages: control -> how much more selective the ablation is.
    """

    ratio: float
    room: Estimate
    target: Estimate
    bystanders: Estimate
    selective: Estimate
    controls: Mapping[str, Estimate]
    advantages: Mapping[str, Estimate]


def measure(report: xarray.Dataset, objective: str) -> list[Selectivity]:
    """What CAD does at every ratio, beside controls.

    Args:
        report: of `editing.evaluate`, with the models that `recipes.ablation_recipes` names.
        objective: erase or amplify.
    """
    target, bystanders, room = _resampled(report, objective)
    found = []
    for ratio in RATIOS:
        cad, *others = (named(scores, ratio) for scores in ("cad", *CONTROLS))
        selective = {name: target[name] + bystanders[name] for name in (cad, *others)}
        found.append(
            Selectivity(
                ratio,
                _estimate(room),
                _estimate(target[cad]),
                _estimate(bystanders[cad]),
                _estimate(selective[cad]),
                {control: _estimate(selective[name]) for control, name in zip(CONTROLS, others, strict=True)},
                {
                    control: _estimate(selective[cad] - selective[name])
                    for control, name in zip(CONTROLS, others, strict=True)
                },
            )
        )
    return found


def is_selective(found: Sequence[Selectivity], objective: str) -> Claim:
    """That ablating the best weights changes the concept, and little else, as no control does."""
    findings = []
    for one in found:
        verdict, reason = judge(one.room, one.target, one.selective, list(one.advantages.values()))
        if one.room.low <= 0:
            share = "all" if one.room.mean == 0 else f"all but {one.room.mean:.0%} of"
            reason += f": {_SHOWN[objective]} in {share} unedited pictures"
        strongest = max(one.controls, key=lambda control: one.controls[control].mean)
        reason += f"; target {one.target}, bystanders {one.bystanders}; the strongest control is {strongest}"
        findings.append(
            Finding(f"ratio {one.ratio:g}", "all", one.selective, one.controls[strongest], None, verdict, reason)
        )
    what = {"erase": "CAD-Erase removes a concept", "amplify": "CAD-Amplify brings a concept out"}[objective]
    return Claim(
        name=f"{objective}_is_selective",
        statement=f"{what} and keeps bystanders, at some ratio.",
        quantity="selectivity, change of target pictures as wanted + change of bystanders",
        control="the same of the best of random weights, large weights and scores of the other sign",
        rule="the intervals of the change of targets, of selectivity, and of the advantage over every control lie above"
        " 0; not reproduced if one of them does not reach above 0; inconclusive where the largest change of targets"
        " that there could be does not lie above 0",
        findings=tuple(findings),
        verdict=at_best([one.verdict for one in findings]),
    )


def judge(room: Estimate, target: Estimate, selective: Estimate, advantages: Sequence[Estimate]) -> tuple[str, str]:
    """The verdict on an ablation, and why.

    Example:
        >>> target, selective, advantage = Estimate(0.3, 0.2, 0.4), Estimate(0.2, 0.1, 0.3), Estimate(0.0, -0.1, 0.1)
        >>> judge(Estimate(0.7, 0.6, 0.8), target, selective, [advantage])
        ('inconclusive', 'it may be selective, or may not')
        >>> judge(Estimate(0.0, 0.0, 0.0), target, selective, [advantage])
        ('inconclusive', 'no room')
    """
    if room.low <= 0:
        return INCONCLUSIVE, "no room"
    if target.high <= 0:
        return NOT_REPRODUCED, "targets do not change as wanted"
    if selective.high <= 0:
        return NOT_REPRODUCED, "bystanders suffer as much"
    if any(one.high <= 0 for one in advantages):
        return NOT_REPRODUCED, "a control is as selective"
    if all(one.low > 0 for one in (target, selective, *advantages)):
        return REPRODUCED, "selective, as no control is"
    return INCONCLUSIVE, "it may be selective, or may not"


def at_best(verdicts: Sequence[str]) -> str:
    """The verdict on what is claimed of some ratio.

    Example:
        >>> at_best([NOT_REPRODUCED, REPRODUCED]), at_best([NOT_REPRODUCED, INCONCLUSIVE])
        ('reproduced', 'inconclusive')
    """
    return next((verdict for verdict in (REPRODUCED, INCONCLUSIVE) if verdict in verdicts), NOT_REPRODUCED)


def _resampled(
    report: xarray.Dataset, objective: str
) -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray], numpy.ndarray]:
    """By model, changes of targets and of bystanders, and the room for the former: the estimate, then each resample."""
    models = report.model.values.tolist()
    shown = report.is_source.mean("seed").transpose("model", "trial").values
    plain = shown[models.index(UNEDITED)]
    change = numpy.vstack([shown - plain, plain if objective == "erase" else 1 - plain])
    change[-1] *= _SIGNS[objective]  # as of targets, which it is the largest of
    rng, found = numpy.random.default_rng(0), []
    for roles, sign in ((_NAMING, _SIGNS[objective]), (("specificity",), 1)):
        values = sign * change[:, numpy.isin(report.role.values, roles)]
        n = values.shape[1]
        rows = numpy.vstack([numpy.arange(n), rng.integers(n, size=(_N_RESAMPLES, n))])
        found.append(values[:, rows].mean(-1))
    target, bystanders = (dict(zip(models, values[:-1], strict=True)) for values in found)
    return target, bystanders, found[0][-1]


def _estimate(values: numpy.ndarray) -> Estimate:
    low, high = numpy.quantile(values[1:], (0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2))
    return Estimate(float(values[0]), float(low), float(high))
