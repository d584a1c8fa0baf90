"""Where positive and negative scores lie, by component and layer, and whether the causal map shows the same sites."""

import dataclasses
from collections.abc import Mapping, Sequence

import xarray
from diffusers import DiffusionPipeline

import mediation
from benchmarks.emoji import world
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim, Estimate, Finding, together
from mediation.intervals import mean_interval

# attribute -> prompts that name each of its concepts
PROMPTS = {
    "style": [f"{style} style" for style in world.STYLES],
    "object": [f"a {name}" for name in world.OBJECTS[:8]],
    "color": [f"{color} background" for color in world.BACKGROUNDS if color != "white"],
}
AMOUNTS = ("positive", "negative", "n_weights")
N_STEPS = 10
_K = 5
_N_RESAMPLES = 500
_KEPT = ("backend", "estimate", "metric", "intervention")


def describe(attribute: str) -> dict:
    """All that decides on the sums of an attribute, but for the model, as plain JSON."""
    return {"prompts": PROMPTS[attribute], "num_inference_steps": N_STEPS, "parameters": "unet.*"}


def run(pipe: DiffusionPipeline, prompts: Sequence[str], num_inference_steps: int = N_STEPS) -> xarray.Dataset:
    """Sums by site of all weights' scores for erasing, as `Attribution.to_dataset` has them; a case is a concept."""
    options = {"parameters": "unet.*", "num_inference_steps": num_inference_steps}
    maps = [mediation.attribute(pipe, prompt, **options).to_dataset() for prompt in prompts]
    how = {"data_vars": "all", "coords": "minimal", "compat": "override", "join": "exact", "combine_attrs": "drop"}
    joined = xarray.concat(maps, "case", **how).assign_coords(case=range(len(maps)), concept=("case", list(prompts)))
    return joined.assign_attrs({name: maps[0].attrs[name] for name in _KEPT})


def of_amount(effects: xarray.Dataset, amount: str) -> xarray.Dataset:
    """A map whose indirect effects are how much positive or negative score, or how many weights, a site has."""
    values = abs(effects[amount]).transpose("case", "site")
    restored = (effects.clean - values).transpose("case", "draw", "site")
    corrupted = (effects.clean - values.sum("site")).transpose("case", "draw")
    return effects[["clean", "sham"]].assign(restored=restored, corrupted=corrupted)


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a component, or of one layer of it, in all scores of one sign.

    Attributes:
        attribute: of the concepts.
        component: kind of sites.
        layer: its place in the order in which layers run; None is all of the component.
        site: name of the layer's site, likewise.
        positive: its share of all positive scores.
        negative: likewise of negative ones.
        weights: its share of all weights.
    """

    attribute: str
    component: str
    layer: int | None
    site: str | None
    positive: Estimate
    negative: Estimate
    weights: float


def shares(attribute: str, effects: xarray.Dataset) -> list[Share]:
    """The parts of all components, with intervals over concepts."""
    sums = xarray.Dataset({name: effects[name].groupby("component").sum("site") for name in AMOUNTS})
    places = {component: (component, None, None) for component in dict.fromkeys(effects.component.values.tolist())}
    return _shares(attribute, sums, "component", places)


def layer_shares(attribute: str, effects: xarray.Dataset) -> list[Share]:
    """The parts of all layers, in the order in which they run, likewise."""
    columns = (effects[name].values.tolist() for name in ("site", "component", "layer"))
    places = {site: (component, layer, site) for site, component, layer in zip(*columns, strict=True)}
    return _shares(attribute, effects[list(AMOUNTS)], "site", places)


def _shares(
    attribute: str, sums: xarray.Dataset, by: str, places: Mapping[str, tuple[str, int | None, str | None]]
) -> list[Share]:
    parts = sums / sums.sum(by)
    options = {"confidence": 0.95, "n_resamples": 2000, "method": "percentile", "seed": 0}
    intervals = {name: mean_interval(parts[name], None, **options) for name in ("positive", "negative")}

    def estimate(name: str, label: str) -> Estimate:
        return Estimate(*(float(one.sel({by: label})) for one in intervals[name]))

    return [
        Share(
            attribute,
            *place,
            estimate("positive", label),
            estimate("negative", label),
            float(parts["n_weights"].sel({by: label}).mean()),
        )
        for label, place in places.items()
    ]


def positive_where_causal(
    sums: Mapping[str, xarray.Dataset], causal: Mapping[str, xarray.Dataset]
) -> tuple[Claim, list[Finding]]:
    """That weights of positive score lie in sites which bring the attribute back when they are restored.

    Args:
        sums: attribute -> what `run` returns.
        causal: attribute -> a map of the denoiser's sites by several metrics; what is missing is not judged.

    Returns:
        The claim, and for comparison the same of negative scores, which nothing is claimed of, without verdicts.
    """
    findings, others = [], []
    for attribute, effects in sums.items():
        for metric in causal[attribute].metric.values.tolist() if attribute in causal else ():
            truth = causal[attribute].sel(metric=metric, drop=True)
            found = {name: _agreement(of_amount(effects, name), truth) for name in AMOUNTS}
            size = found["n_weights"]
            verdict, reason = judge(found["positive"], size)
            place = f"positive scores, {metric}"
            findings.append(Finding(attribute, place, found["positive"], size, None, verdict, reason))
            others.append(Finding(attribute, f"negative scores, {metric}", found["negative"], size, None, "", ""))
    claim = Claim(
        name="positive_where_causal",
        statement="Weights of positive score lie in the sites that a causal map shows.",
        quantity="Spearman's ρ, of sums by site and indirect effects",
        control="the same with the number of weights of each site",
        rule="the interval lies above 0, and above the control's; not reproduced if it does not reach above 0",
        findings=tuple(findings),
        verdict=together([one.verdict for one in findings]),
    )
    return claim, others


def judge(found: Estimate, size: Estimate) -> tuple[str, str]:
    """The verdict on a correlation, and why.

    Example:
        >>> judge(Estimate(0.5, 0.3, 0.7), Estimate(0.4, 0.2, 0.5))[0]
        'inconclusive'
    """
    if found.high <= 0:
        return NOT_REPRODUCED, "they lie elsewhere"
    if not found.low > 0:
        return INCONCLUSIVE, "it may be chance"
    if not found.low > size.high:
        return INCONCLUSIVE, "counting the weights of a site may tell as much"
    return REPRODUCED, "they lie there, more than the size of sites tells"


def _agreement(amounts: xarray.Dataset, causal: xarray.Dataset) -> Estimate:
    found = mediation.compare(amounts, causal, _K, n_resamples=_N_RESAMPLES).sel(statistic="spearman")
    return Estimate(float(found.estimate), float(found.low), float(found.high))
