"""From judged pictures to figures with intervals: accuracies, scores, and the harmonic mean of the three aims."""

import numpy
import xarray
from scipy import stats

from editing.evaluation import UNEDITED
from editing.suites import ROLES

_ACCURACIES = ("is_source", "is_target")
_SCORES = ("source_score", "target_score", "latent_distance", "lpips")


def summarize_evaluation(
    report: xarray.Dataset, *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> xarray.Dataset:
    """Means by role and model with their intervals, changes against the unedited model, and H0.

    Args:
        report: from `evaluate`.
        confidence: level of the intervals.
        n_resamples: of each bootstrap.
        seed: of the resampling.

    Returns:
        A Dataset over (measure, role, model):

        - mean, low, high, n: of accuracies with Wilson's interval, which takes pictures for independent; of scores with
          the percentile bootstrap over prompts, seeds averaged; NaN with a single prompt. n counts pictures.
        - change, change_low, change_high: against the unedited model on the same prompts and seeds, bootstrap.

        and over model: h0, h0_low, h0_high, if all of its roles are there and classified: MACE's harmonic mean
        (Lu et al., arXiv:2403.06135), 3 / (1/(1 - Acc_e) + 1/Acc_s + 1/(1 - Acc_g)), where Acc is the share of
        pictures that show what the prompt asks for, of efficacy, specificity and generality prompts.

    Raises:
        ValueError: if `report` is not from `evaluate`, or `confidence` not between 0 and 1.

    Example:
        >>> summary = summarize_evaluation(_example())
        >>> float(summary["mean"].sel(measure="is_source", role="efficacy", model="edited"))
        0.5
    """
    if "latent_distance" not in getattr(report, "data_vars", ()):
        raise ValueError("expected the Dataset that editing.evaluate returns")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    options = {"confidence_level": confidence, "n_resamples": n_resamples, "method": "percentile"}
    measures = [name for name in (*_ACCURACIES, *_SCORES) if name in report]
    roles = [role for role in ROLES if role in report.role.values]
    models = report.model.values.tolist()
    names = ("mean", "low", "high", "n", "change", "change_low", "change_high")
    table = {name: numpy.full((len(measures), len(roles), len(models)), numpy.nan) for name in names}
    for i, measure in enumerate(measures):
        for j, role in enumerate(roles):
            inside = report[measure].sel(trial=report.role == role).transpose("model", "trial", "seed").values
            for k, values in enumerate(inside):
                rng = numpy.random.default_rng(seed)
                cells = _interval(values, measure in _ACCURACIES, options, rng)
                changes = _bootstrap(_by_prompt(values - inside[models.index(UNEDITED)]), options, rng)
                for name, value in zip(names, (*cells, *changes), strict=True):
                    table[name][i, j, k] = value
    summary = xarray.Dataset(
        {name: (("measure", "role", "model"), values) for name, values in table.items()},
        {"measure": measures, "role": roles, "model": models},
        report.attrs | {"confidence": confidence, "n_resamples": n_resamples, "seed_of_resampling": seed},
    )
    if "is_source" in measures and {"efficacy", "specificity", "generality"} <= set(roles):
        summary = summary.assign(_harmonic_means(report, options, seed))
    return summary.assign(n=summary.n.astype(int))


def harmonic_mean(efficacy, specificity, generality):
    """MACE's H0 of three accuracies, each the share of pictures that show what the prompt asks for; 0 at its worst.

    Example:
        >>> float(harmonic_mean(efficacy=0.0, specificity=1.0, generality=0.0))
        1.0
    """
    aims = numpy.stack(numpy.broadcast_arrays(1 - numpy.asarray(efficacy), specificity, 1 - numpy.asarray(generality)))
    with numpy.errstate(divide="ignore"):
        return (3 / (1 / aims).sum(0))[()]


def _harmonic_means(report: xarray.Dataset, options: dict, seed: int) -> dict[str, tuple]:
    found = {"h0": [], "h0_low": [], "h0_high": []}
    for model in report.model.values:
        shown = report.is_source.sel(model=model)
        samples = [
            _by_prompt(shown.sel(trial=report.role == role).transpose("trial", "seed").values)
            for role in ("efficacy", "specificity", "generality")
        ]
        cells = _bootstrap_of(_harmonic_of_means, samples, options, numpy.random.default_rng(seed))
        for name, value in zip(found, cells, strict=True):
            found[name].append(value)
    return {name: ("model", values) for name, values in found.items()}


def _harmonic_of_means(*samples: numpy.ndarray, axis: int = -1):
    return harmonic_mean(*(sample.mean(axis) for sample in samples))


def _interval(values: numpy.ndarray, is_accuracy: bool, options: dict, rng) -> tuple[float, float, float, int]:
    """Mean, low, high and n of a measure, (trial, seed)."""
    known = values[~numpy.isnan(values)]
    if not is_accuracy or not known.size:
        return *_bootstrap(_by_prompt(values), options, rng), known.size
    wilson = stats.binomtest(int(known.sum()), known.size).proportion_ci(options["confidence_level"], method="wilson")
    return known.mean(), wilson.low, wilson.high, known.size


def _by_prompt(values: numpy.ndarray) -> numpy.ndarray:
    """Means over seeds, of the trials that were measured."""
    return values[~numpy.isnan(values).any(1)].mean(1)


def _bootstrap(sample: numpy.ndarray, options: dict, rng) -> tuple[float, float, float]:
    return _bootstrap_of(numpy.mean, [sample], options, rng)


def _bootstrap_of(statistic, samples: list[numpy.ndarray], options: dict, rng) -> tuple[float, float, float]:
    """A statistic of samples of prompts, and its interval."""
    if min(map(len, samples)) == 0:
        return numpy.nan, numpy.nan, numpy.nan
    point = statistic(*samples, axis=-1)
    if min(map(len, samples)) == 1:
        return point, numpy.nan, numpy.nan
    found = stats.bootstrap(samples, statistic, vectorized=True, rng=rng, **options).confidence_interval
    return point, found.low, found.high


def _example() -> xarray.Dataset:
    """The smallest report, for the examples: two efficacy prompts, of which the edit reaches one."""
    dims = ("trial", "seed", "model")
    return xarray.Dataset(
        {"is_source": (dims, [[[1.0, 0.0]], [[1.0, 1.0]]]), "latent_distance": (dims, [[[0.0, 1.0]], [[0.0, 1.0]]])},
        {"role": ("trial", ["efficacy"] * 2), "model": [UNEDITED, "edited"]},
    )
