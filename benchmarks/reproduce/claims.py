"""Claims on where knowledge is, as statements of which places are causal and which are not, with verdicts by one rule.

Everything is measured as a share: IE / TE, the ratio of means over cases. By its interval, a place is

- causal: all of the interval lies above `MARGIN`;
- adverse: all of it lies below −`MARGIN`, so that restoring the place makes matters worse;
- negligible: all of it lies within ±`MARGIN`;
- unclear: anything else.

A claim is reproduced for an attribute if every place is what the claim says; not reproduced if a place that should be
causal is negligible or adverse, or one that should be negligible is causal or adverse; and inconclusive otherwise, or
if the corruption has no total effect. It is reproduced if it is for every attribute, and not reproduced if for some
attribute it is not.

Intervals are studentised bootstrap intervals over cases, which hold with 95% for all places of one attribute together.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy
import xarray

from benchmarks.reproduce.simultaneous import ratio_intervals
from mediation.badrows import without_bad_rows
from mediation.effects import masked_effects, noise_floor

MARGIN = 0.1
_CONFIDENCE = 0.95

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """What a place with this share is: causal, adverse, negligible or unclear.

        Example:
            >>> Estimate(0.3, 0.2, 0.4).kind, Estimate(0.05, -0.02, 0.09).kind, Estimate(0.1, 0.0, 0.2).kind
            ('causal', 'negligible', 'unclear')
        """
        if self.low > MARGIN:
            return "causal"
        if self.high < -MARGIN:
            return "adverse"
        return "negligible" if self.low > -MARGIN and self.high < MARGIN else "unclear"

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a claim comes to for one attribute.

    Attributes:
        attribute: the attribute.
        place: what the estimate is of.
        estimate: the quantity that the claim is about.
        control: the same of the control that the claim names.
        sham: the noise floor, likewise; None where nothing corresponds to it.
        verdict: reproduced, not reproduced or inconclusive.
        reason: why, in words.
    """

    attribute: str
    place: str
    estimate: Estimate
    control: Estimate
    sham: float | None
    verdict: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, what it comes to for every attribute, and the verdict.

    Attributes:
        name: a short name, for files.
        statement: what is claimed.
        quantity: what is estimated.
        control: what it is compared with.
        rule: when the claim counts as reproduced for an attribute.
        findings: by attribute.
        verdict: of all findings together.
    """

    name: str
    statement: str
    quantity: str
    control: str
    rule: str
    findings: tuple[Finding, ...]
    verdict: str


def judge(expected_causal: Sequence[Estimate], expected_negligible: Sequence[Estimate]) -> str:
    """The verdict on a statement of which places are causal and which are negligible.

    Example:
        >>> judge([Estimate(0.9, 0.8, 1.0)], [Estimate(0.0, -0.1, 0.05)])
        'inconclusive'
    """
    as_claimed = [one.kind == "causal" for one in expected_causal]
    as_claimed += [one.kind == "negligible" for one in expected_negligible]
    against = [one.kind in ("negligible", "adverse") for one in expected_causal]
    against += [one.kind in ("causal", "adverse") for one in expected_negligible]
    if any(against):
        return NOT_REPRODUCED
    return REPRODUCED if as_claimed and all(as_claimed) else INCONCLUSIVE


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those on its attributes.

    Example:
        >>> together([REPRODUCED, INCONCLUSIVE]), together([REPRODUCED, NOT_REPRODUCED])
        ('inconclusive', 'not reproduced')
    """
    if NOT_REPRODUCED in verdicts:
        return NOT_REPRODUCED
    return REPRODUCED if verdicts and set(verdicts) == {REPRODUCED} else INCONCLUSIVE


@dataclasses.dataclass(frozen=True)
class Shares:
    """IE / TE at every place of a map, which has been measured for at least one case.

    Attributes:
        places: names: of sites, with their tokens where the map has them.
        estimates: by place.
        sham: the noise floor as a share.
        problem: why shares mean nothing here, or None.
    """

    places: tuple[str, ...]
    estimates: tuple[Estimate, ...]
    sham: float
    problem: str | None

    def finding(self, attribute: str, place: str, control: Estimate, verdict: str, reason: str) -> Finding:
        """What a claim comes to at one of the places; inconclusive where shares mean nothing."""
        if self.problem:
            verdict, reason = INCONCLUSIVE, self.problem
        return Finding(attribute, place, self.of(place), control, self.sham, verdict, reason)

    def of(self, place: str) -> Estimate:
        """The share of one place.

        Raises:
            KeyError: if it was not measured.
        """
        if place not in self.places:
            raise KeyError(f"the map has no {place!r}; it has {', '.join(self.places[:3])}, …")
        return self.estimates[self.places.index(place)]

    def but(self, places: Sequence[str]) -> dict[str, Estimate]:
        """The shares of all other places."""
        return {name: one for name, one in zip(self.places, self.estimates, strict=True) if name not in places}


def shares(effects: xarray.Dataset, places: Sequence[str] | None = None, *, confidence: float = _CONFIDENCE) -> Shares:
    """The share of the total effect that each place brings back.

    Args:
        effects: a map of one metric, from `mediation.trace`.
        places: only these; None is all.
        confidence: that all intervals hold.
    """
    indirect, total = _counted(effects)
    chosen = (~numpy.isnan(indirect)).any("case").values
    if places is not None:
        chosen &= numpy.isin(indirect.place.values, list(places))
    indirect = indirect.isel(place=numpy.flatnonzero(chosen))
    found = _estimates(indirect.values, total.values, confidence)
    (whole,) = _estimates(total.values[:, None], numpy.ones(len(total)), _CONFIDENCE)
    floor = float(noise_floor(effects))
    problem = None if whole.low > floor else f"the corruption has no total effect: {whole} on the metric"
    sham = floor / abs(whole.mean) if whole.mean else math.inf
    return Shares(tuple(indirect.place.values.tolist()), tuple(found), sham, problem)


def random_place(effects: xarray.Dataset, but: Sequence[str]) -> Estimate:
    """The share that a place drawn at random from all `but` some brings back, in expectation."""
    indirect, total = _counted(effects)
    others = indirect.isel(place=numpy.flatnonzero(~numpy.isin(indirect.place.values, list(but))))
    return _estimates(others.mean("place").values[:, None], total.values, _CONFIDENCE)[0]


def by_place(indirect: xarray.DataArray) -> xarray.DataArray:
    """Indirect effects (case, draw, place), where a place is a site, or a site at a token."""
    if "token" not in indirect.dims:
        return indirect.rename(site="place").reset_coords(drop=True)
    names = [f"{site} at {token}" for site in indirect.site.values for token in indirect.token.values]
    stacked = indirect.transpose("case", "draw", "site", "token")
    values = stacked.values.reshape(*stacked.shape[:2], -1)
    return xarray.DataArray(values, dims=("case", "draw", "place"), coords={"place": names})


def _counted(effects: xarray.Dataset) -> tuple[xarray.DataArray, xarray.DataArray]:
    """Indirect and total effects (case[, place]) of runs whose total effect exceeds the noise floor."""
    indirect, total = masked_effects(without_bad_rows(effects))
    return by_place(indirect).transpose("case", "draw", "place").mean("draw"), total.mean("draw")


def _estimates(values: numpy.ndarray, total: numpy.ndarray, confidence: float) -> list[Estimate]:
    return [Estimate(*map(float, one)) for one in ratio_intervals(values, total, confidence).T]
