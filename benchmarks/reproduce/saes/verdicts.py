"""The claims of the paper's abstract, and what the experiments make of them.

Differences between arms are taken picture by picture. By their intervals they are judged as everywhere in these
reproductions: an effect counts if all of its interval lies above `claims.MARGIN`, and is negligible if all of it lies
within. Intervals are studentised, over pictures. Those of all the differences that one claim rests on, of every block
and control, hold with 95% together; and so do those of the successes that are shown beside them.
"""

from collections.abc import Mapping, Sequence

import numpy
import xarray

from benchmarks.reproduce.claims import INCONCLUSIVE, MARGIN, REPRODUCED, Claim, Estimate, Finding, judge, together
from benchmarks.reproduce.saes.preparing import BLOCKS, STAGES, Key
from benchmarks.reproduce.saes.trials import TUNED_AT
from benchmarks.reproduce.simultaneous import ratio_intervals
from mediation.intervals import nanmean

_CONTROLS = ("random latents", "random directions", "unsteered")

# (experiment, block, stage) -> record of `trials.run`
Records = Mapping[tuple[str, str, str], Mapping]


def all_claims(layouts: xarray.Dataset, records: Records) -> list[Claim]:
    """Every claim that was put to the test, with its verdict."""
    blocks = list(dict.fromkeys(layouts.block.values.tolist()))
    claims = [_predicted(layouts, blocks)]
    experiments = {experiment for experiment, _, _ in records}
    if "quadrant" in experiments:
        claims += [
            _effective(
                "composition_early",
                "In early stages, image composition can be effectively controlled",
                records,
                ("quadrant", "early"),
                blocks,
            ),
            _settled(records, blocks),
            _ineffective(
                "composition_final",
                "In the final stages, composition is not subject to change",
                records,
                ("quadrant", "final"),
                blocks,
            ),
        ]
    if "style" in experiments:
        claims += [
            _effective(
                "style_middle",
                "In the middle stages, stylistic interventions are effective",
                records,
                ("style", "middle"),
                blocks,
            ),
            _ineffective(
                "style_final",
                "In the final stages, style is not subject to change",
                records,
                ("style", "final"),
                blocks,
            ),
        ]
    return claims


def estimates(columns: Mapping[str, numpy.ndarray]) -> dict[str, Estimate]:
    """Means with intervals that hold for all columns together; each is (picture,), NaN where it does not count.

    Of successes, and of their differences, n pictures can show no smaller error than one picture more or less. Where
    few differ, there may be others that were not met: with 95%, up to ln(20 m) / n of them in each of m columns, which
    is the rule of three for one (Hanley and Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031). So no interval
    reaches less far than that.

    Example:
        >>> str(estimates({"up": numpy.ones(30)})["up"])
        '1.00 [0.90, 1.10]'
    """
    values = numpy.stack(list(columns.values()), axis=1)
    n = (~numpy.isnan(values)).sum(0).clip(min=1)
    counts = float(numpy.isin(values[~numpy.isnan(values)], (-1, 0, 1)).all())
    mean, low, high = ratio_intervals(values, numpy.ones(len(values)), 0.95, least_error=counts / n.max())
    rule = counts * numpy.log(20 * len(columns)) / n
    found = zip(mean, numpy.minimum(low, mean - rule), numpy.maximum(high, mean + rule), strict=True)
    return {name: Estimate(*map(float, one)) for name, one in zip(columns, found, strict=True)}


def _predicted(layouts: xarray.Dataset, blocks: Sequence[str]) -> Claim:
    first = {block: _of(layouts, block, "early") for block in blocks}
    controls = {"chance_miou": "what is active in another picture", "constant_miou": "a constant layout"}
    gains = estimates({(b, name): (one.miou - one[name]).values for b, one in first.items() for name in controls})
    shown = estimates({(b, name): one[name].values for b, one in first.items() for name in ("miou", *controls)})
    findings = []
    for block in blocks:
        best = max(controls, key=lambda name, block=block: shown[block, name].mean)
        found = {name: gains[block, name] for name in controls}
        findings.append(
            Finding(
                attribute=block,
                place=f"{BLOCKS[block]}, first step",
                estimate=shown[block, "miou"],
                control=shown[block, best],
                sham=None,
                verdict=judge(list(found.values()), []),
                reason="; ".join(f"{one} above that of {controls[name]}" for name, one in found.items()),
            )
        )
    return _claim(
        "prediction",
        "The final composition can be predicted from what is active at the first step",
        "mean IoU of the predicted layout with that of the finished picture",
        "the better of what is active in another picture, and a constant layout: where other pictures have things",
        f"the mean IoU exceeds that of each control by more than {MARGIN}",
        findings,
    )


def _effective(name: str, statement: str, records: Records, where: tuple[str, str], blocks: Sequence[str]) -> Claim:
    experiment, stage = where
    return _claim(
        name,
        statement,
        f"{experiment} success of pictures steered by the concept's latents",
        "the best of random latents, random directions and no steering",
        f"success exceeds that of each control by more than {MARGIN}",
        _against_controls(records, experiment, stage, blocks, effective=True),
    )


def _ineffective(name: str, statement: str, records: Records, where: tuple[str, str], blocks: Sequence[str]) -> Claim:
    experiment, stage = where
    return _claim(
        name,
        statement,
        f"{experiment} success of pictures steered by the concept's latents",
        "no steering",
        f"success differs from that without steering by less than {MARGIN}",
        _against_controls(records, experiment, stage, blocks, effective=False),
    )


def _settled(records: Records, blocks: Sequence[str]) -> Claim:
    """Composition is settled if what could move it early can do so no longer; what never could tells nothing."""
    success = {
        (block, stage, arm): _success(records, "quadrant", block, stage, arm)
        for block in blocks
        for stage in ("early", "middle")
        for arm in ("concept", *_CONTROLS)
    }
    wanted = [(block, "early", arm) for block in blocks for arm in _CONTROLS]
    wanted += [(block, "middle", "unsteered") for block in blocks]
    differences = estimates(
        {(b, stage, arm): success[b, stage, "concept"] - success[b, stage, arm] for b, stage, arm in wanted}
    )
    shown = estimates({(b, arm): success[b, "middle", arm] for b in blocks for arm in ("concept", "unsteered")})
    findings = []
    for block in blocks:
        early = {arm: differences[block, "early", arm] for arm in _CONTROLS}
        middle = differences[block, "middle", "unsteered"]
        told = "; ".join(f"{one} above {arm}" for arm, one in early.items())
        findings.append(
            Finding(
                attribute=block,
                place=f"{BLOCKS[block]}, middle",
                estimate=shown[block, "concept"],
                control=shown[block, "unsteered"],
                sham=None,
                verdict=settled(list(early.values()), middle),
                reason=f"middle: {middle} above unsteered; early: {told}",
            )
        )
    return _claim(
        "composition_settled",
        "In the middle stages, image composition is finalized",
        "quadrant success of pictures steered in the middle stages by the concept's latents",
        "no steering",
        f"success in the early stages exceeds that of each control by more than {MARGIN}, and in the middle stages it"
        f" differs from that without steering by less than {MARGIN}; inconclusive if it is without effect in both",
        findings,
    )


def settled(early: Sequence[Estimate], middle: Estimate) -> str:
    """The verdict on whether something is settled, by how much success in two stages exceeds that of controls.

    Args:
        early: in the early stages, by control.
        middle: in the middle stages, where it should exceed that without steering by nothing.

    Example:
        >>> some, none = Estimate(0.5, 0.4, 0.6), Estimate(0.0, -0.05, 0.05)
        >>> settled([some], none), settled([some], some), settled([none], none)
        ('reproduced', 'not reproduced', 'inconclusive')
    """
    verdict, was_open = judge([], [middle]), judge(early, []) == REPRODUCED
    return INCONCLUSIVE if verdict == REPRODUCED and not was_open else verdict


def _against_controls(
    records: Records, experiment: str, stage: str, blocks: Sequence[str], *, effective: bool
) -> list[Finding]:
    controls = _CONTROLS if effective else ("unsteered",)
    own = {block: _success(records, experiment, block, stage, "concept") for block in blocks}
    others = {(b, arm): _success(records, experiment, b, stage, arm) for b in blocks for arm in controls}
    best = {block: max(controls, key=lambda arm, block=block: nanmean(others[block, arm], 0)) for block in blocks}
    differences = estimates({(block, arm): own[block] - other for (block, arm), other in others.items()})
    shown = estimates({(block, "own"): own[block] for block in blocks} | {b: others[b, best[b]] for b in blocks})
    findings = []
    for block in blocks:
        found = {arm: differences[block, arm] for arm in controls}
        told = "; ".join(f"{one} above {arm}" for arm, one in found.items())
        strength = records[experiment, block, stage]["strength"]
        findings.append(
            Finding(
                attribute=block,
                place=f"{BLOCKS[block]}, {stage}",
                estimate=shown[block, "own"],
                control=shown[block],
                sham=None,
                verdict=judge(list(found.values()), []) if effective else judge([], list(found.values())),
                reason=f"{told}; strength {strength}{_left_out(own[block])}",
            )
        )
    return findings


def _claim(name: str, statement: str, quantity: str, control: str, rule: str, findings: list[Finding]) -> Claim:
    verdict = together([one.verdict for one in findings])
    return Claim(name, statement, quantity, control, rule, tuple(findings), verdict)


def _of(layouts: xarray.Dataset, block: str, stage: str, branch: str = "cond") -> xarray.Dataset:
    chosen = (layouts.block == block) & (layouts.stage == stage) & (layouts.branch == branch)
    return layouts.isel(autoencoder=int(numpy.flatnonzero(chosen.values)[0]))


def _success(records: Records, experiment: str, block: str, stage: str, arm: str) -> numpy.ndarray:
    """Successes of an arm, NaN for pictures that the concept's arm could not steer, whatever other arms did."""
    found = records[experiment, block, stage]["success"]
    own, other = (numpy.array(found[name], float) for name in ("concept", arm))
    return numpy.where(numpy.isnan(own), numpy.nan, other)


def _left_out(own: numpy.ndarray) -> str:
    n = int(numpy.isnan(own).sum())
    return f"; {n} of {len(own)} pictures have no latent to steer by, and do not count" if n else ""


def tables(summary: xarray.Dataset, random: Mapping[Key, float], records: Records) -> str:
    """Explained variance and layouts by place, and successes by experiment, block and stage, as a page.

    Args:
        summary: from `mediation.summarize_emergence`.
        random: the variance that random directions explain at each place.
        records: of the steering.
    """
    measures = {
        "explained_variance": "explained variance",
        "miou": "mIoU",
        "chance_miou": "mIoU by another picture's latents",
        "constant_miou": "mIoU of a constant layout",
        "gain": "gain over the former",
        "gain_over_constant": "over the latter",
    }
    names = ["block", "stage", "branch", "explained by random directions", *measures.values()]
    lines = ["# What autoencoders explain, show and change", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for i in range(summary.sizes["autoencoder"]):
        one = summary.isel(autoencoder=i)
        values = (one.sel(measure=name) for name in measures)
        cells = [f"{float(v['mean']):.3f} [{float(v.low):.3f}, {float(v.high):.3f}]" for v in values]
        place = tuple(str(one[name].values) for name in ("block", "stage", "branch"))
        lines.append(f"| {' | '.join([*place, f'{random[place]:.3f}', *cells])} |")
    lines += [
        "",
        "Brackets: 95% bootstrap intervals over pictures. Random directions are as many as there are latents; each"
        " position takes the k that lie most along it, in the amounts that fit best, by least squares, in activations"
        " of other pictures.",
        "",
    ]
    lines += ["![mIoU of the predicted layout over sampling](emergence.png)", ""]
    lines += ["| experiment | block | stage | strength | pictures | not steered | "]
    lines[-1] += " | ".join(("concept", *_CONTROLS)) + " |"
    lines += ["|---" * (6 + 1 + len(_CONTROLS)) + "|"]
    for (experiment, block, stage), record in records.items():
        found = estimates({arm: _success(records, experiment, block, stage, arm) for arm in ("concept", *_CONTROLS)})
        own = _success(records, experiment, block, stage, "concept")
        counts = (str(len(own)), str(int(numpy.isnan(own).sum())))
        cells = [experiment, block, stage, str(record["strength"]), *counts, *map(str, found.values())]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Stages are t in {', '.join(f'{name} {span}' for name, span in STAGES.items())}."]
    lines += [
        "A strength is chosen on other pictures by the concept's success at one stage, and used at all:"
        f" {', '.join(f'of {experiment}, {stage}' for experiment, stage in TUNED_AT.items())}.",
        "Pictures are not steered where the dictionary has no latent for what is wanted, and then they do not count.",
        "",
    ]
    return "\n".join(lines)
