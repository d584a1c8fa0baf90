"""How well estimates rank places, against exact maps of the same cases; and where they do not."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy
import xarray
from scipy import stats

import mediation
from benchmarks.reproduce.claims import Estimate
from mediation.effects import noise_floor
from mediation.intervals import mean_interval

K = 5  # how many of the largest effects are to be found
SCREENED = 0.2  # the share of places that is restored exactly, the largest estimates
GOAL, GOAL_SCREENED = 0.8, 0.9
_N_RESAMPLES = 500
_ALL = ("case", "draw")


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How one estimated map agrees with the exact one.

    Attributes:
        places: what the places are.
        metric: of both maps.
        attribute: of the cases.
        variant: estimated or integrated; "…, screened" with the best places restored exactly.
        spearman: rank correlation over places.
        recall: share of the K largest exact effects that are among the K largest estimates.
        chance: recall of unrelated maps.
        control: mean rank correlation of the exact map with the estimates of other attributes; NaN without any.
        total: the total effect.
    """

    places: str
    metric: str
    attribute: str
    variant: str
    spearman: Estimate
    recall: Estimate
    chance: float
    control: float
    total: Estimate

    @property
    def goal(self) -> float:
        """What both statistics should reach."""
        return GOAL_SCREENED if self.variant.endswith("screened") else GOAL


@dataclasses.dataclass(frozen=True)
class Part:
    """Estimates without screening within one component, or at one step.

    Attributes:
        places, metric, attribute, variant: as of `Fidelity`.
        part: the component, or the step's window.
        n: places.
        spearman: rank correlation within the part.
        slope: of estimates by exact effects, through the origin: how many times too large estimates are.
        signs: share of right signs, of the effects above the noise floor.
    """

    places: str
    metric: str
    attribute: str
    variant: str
    part: str
    n: int
    spearman: float
    slope: float
    signs: float


@dataclasses.dataclass(frozen=True)
class Miss:
    """A place whose estimate is far from its exact effect."""

    places: str
    metric: str
    attribute: str
    variant: str
    place: str
    estimate: float
    exact: float


def over_steps(effects: xarray.Dataset) -> xarray.Dataset:
    """The estimate of restoring at every step, from estimates of single steps: their sum."""
    change = (effects.restored - effects.sham).sum("window")
    sham = effects.sham.isel(window=0, drop=True)
    return effects.drop_dims("window").assign(sham=sham, restored=sham + change)


def screened(estimates: xarray.Dataset, exact: xarray.Dataset, share: float = SCREENED) -> xarray.Dataset:
    """What `mediation.trace(…, screen=share)` returns, from a map that was measured everywhere."""
    mean = mediation.indirect_effect(estimates).mean(_ALL)
    values = mean.values.ravel()
    n_chosen = math.ceil(share * int((~numpy.isnan(values)).sum()) - 1e-9)
    chosen = numpy.zeros(values.size, bool)
    chosen[numpy.argsort(-values, kind="stable")[:n_chosen]] = True
    is_chosen = mean.copy(data=chosen.reshape(mean.shape))
    return estimates.assign({name: exact[name].where(is_chosen, estimates[name]) for name in ("sham", "restored")})


def fidelities(
    places: str, exact: Mapping[str, xarray.Dataset], estimates: Mapping[str, Mapping[str, xarray.Dataset]]
) -> list[Fidelity]:
    """The agreement of every estimated map with the exact one of its attribute.

    Args:
        places: what the places are.
        exact: attribute -> map, by several metrics.
        estimates: attribute -> variant -> map.
    """
    found = []
    for metric in next(iter(exact.values())).metric.values.tolist():
        truths = {attribute: _by_metric(effects, metric) for attribute, effects in exact.items()}
        guesses = {a: {v: _by_metric(one, metric) for v, one in maps.items()} for a, maps in estimates.items()}
        for attribute, truth in truths.items():
            total = _total(truth)
            for variant, guess in guesses[attribute].items():
                others = [maps[variant] for other, maps in guesses.items() if other != attribute]
                control = float(numpy.mean([_rho(other, truth) for other in others])) if others else math.nan
                for name, one in ((variant, guess), (f"{variant}, screened", screened(guess, truth))):
                    spearman, recall, chance = agree(one, truth)
                    about = (places, metric, attribute, name)
                    found.append(Fidelity(*about, spearman, recall, chance, control, total))
    return found


def agree(estimates: xarray.Dataset, exact: xarray.Dataset) -> tuple[Estimate, Estimate, float]:
    """Spearman's ρ, the recall of the K largest effects, and what chance gives of the latter."""
    found = mediation.compare(estimates, exact, K, n_resamples=_N_RESAMPLES)
    ranks, largest = (found.sel(statistic=name) for name in ("spearman", "overlap"))
    spearman, recall = (Estimate(float(one.estimate), float(one.low), float(one.high)) for one in (ranks, largest))
    return spearman, recall, float(largest.chance)


def reaches(found: Estimate, goal: float) -> str:
    """Whether a statistic reaches its goal.

    Example:
        >>> reaches(Estimate(0.85, 0.7, 0.9), 0.8)
        'met by the estimate, open by its interval'
    """
    if not found.mean >= goal:
        return "not met"
    return "met" if found.low >= goal else "met by the estimate, open by its interval"


def failures(
    places: str, attribute: str, exact: xarray.Dataset, estimates: Mapping[str, xarray.Dataset], n_misses: int = 3
) -> tuple[list[Part], list[Miss]]:
    """Where estimates without screening agree and do not, and the places that they miss most.

    Args:
        places: what the places are.
        attribute: the attribute.
        exact: its map, by several metrics.
        estimates: variant -> map.
        n_misses: places to name, by metric and variant.
    """
    parts, misses = [], []
    for metric in exact.metric.values.tolist():
        truth = _mean(_by_metric(exact, metric))
        floor = float(noise_floor(_by_metric(exact, metric)))
        for variant, effects in estimates.items():
            guess = _mean(_by_metric(effects, metric))
            guess, known = xarray.align(guess, truth, join="exact")
            known = known.transpose(*guess.dims)
            about = (places, metric, attribute, variant)
            for part, where in _parts(known):
                parts.append(Part(*about, part, *_within(guess.isel(where).values, known.isel(where).values, floor)))
            difference = numpy.nan_to_num(abs(guess - known).values)
            for index in numpy.argsort(-difference, axis=None, kind="stable")[:n_misses]:
                where = numpy.unravel_index(index, difference.shape)
                labels = [str(guess[dim].values[i]) for dim, i in zip(guess.dims, where, strict=True)]
                misses.append(Miss(*about, " at ".join(labels), float(guess.values[where]), float(known.values[where])))
    return parts, misses


def points(estimates: xarray.Dataset, exact: xarray.Dataset, metric: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean exact and mean estimated effects of all places, to be drawn against each other."""
    truth, guess = (_mean(_by_metric(effects, metric)) for effects in (exact, estimates))
    truth, guess = xarray.align(truth, guess, join="exact")
    return truth.values.ravel(), guess.transpose(*truth.dims).values.ravel()


def _parts(effects: xarray.DataArray) -> Iterator[tuple[str, dict[str, Sequence[int]]]]:
    components = effects.component.values
    for component in dict.fromkeys(components.tolist()):
        yield component.replace("_", " "), {"site": numpy.flatnonzero(components == component)}
    for dim in effects.dims:
        if dim != "site":
            yield from ((f"{dim} {label}", {dim: [i]}) for i, label in enumerate(effects[dim].values.tolist()))


def _within(guess: numpy.ndarray, truth: numpy.ndarray, floor: float) -> tuple[int, float, float, float]:
    """How many places there are, ρ, slope, and the share of right signs."""
    measured = ~numpy.isnan(guess + truth)
    guess, truth = guess[measured], truth[measured]
    several = len(truth) > 2 and numpy.ptp(guess) > 0 and numpy.ptp(truth) > 0
    spearman = float(stats.spearmanr(guess, truth).statistic) if several else math.nan
    slope = float(guess @ truth / (truth @ truth)) if truth.any() else math.nan
    above = abs(truth) > floor
    signs = float((numpy.sign(guess) == numpy.sign(truth))[above].mean()) if above.any() else math.nan
    return len(truth), spearman, slope, signs


def _rho(estimates: xarray.Dataset, exact: xarray.Dataset) -> float:
    """Spearman's ρ over the places that both maps have."""
    guess, truth = xarray.align(_mean(estimates), _mean(exact), join="inner")
    return _within(guess.transpose(*truth.dims).values, truth.values, 0.0)[1]


def _mean(effects: xarray.Dataset) -> xarray.DataArray:
    return mediation.indirect_effect(effects).mean(_ALL)


def _total(effects: xarray.Dataset) -> Estimate:
    options = {"confidence": 0.95, "n_resamples": 2000, "method": "percentile", "seed": 0}
    return Estimate(*map(float, mean_interval(mediation.total_effect(effects).mean("draw"), None, **options)))


def _by_metric(effects: xarray.Dataset, metric: str) -> xarray.Dataset:
    return effects.sel(metric=metric, drop=True)
