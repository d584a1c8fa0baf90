"""Reports on attribution made of numbers that a test chooses."""

import numpy
import xarray

from benchmarks.reproduce.attributions.predictions import MAIN
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.attributions.whereabouts import AMOUNTS
from editing.ablation import CONTROLS
from tests.maps import make_map

NAMES = [f"unet.{i}.{kind}" for i in range(3) for kind in ("resnet", "feed_forward")]
EXACT = [[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]]
REVERSED = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


def with_metric(effects):
    """A map of indirect effects (case, site) by one metric."""
    return make_map(numpy.asarray(effects, float)[:, None, :, None], sites=NAMES, metric=["m"])


def predicted_changes(n_random=360, n_layers=28):
    """A report on predictions in which half the variance of true changes, twice as large, is predicted."""
    top = [named(scores, ratio) for ratio in RATIOS for scores in ("cad", *CONTROLS)]
    n = n_random + n_layers + len(top)
    predicted, other, noise = numpy.random.default_rng(0).normal(size=(3, n))
    columns = {"predicted": predicted, "shuffled": other, "actual": 2 * (predicted + noise)}
    columns |= {"squares": numpy.arange(n), "n_weights": numpy.full(n, 10)}
    kinds = ["random"] * n_random + ["layer"] * n_layers + ["top"] * len(top)
    labels = [f"{MAIN:g}"] * n_random + [f"unet.{i}.resnet" for i in range(n_layers)] + top
    return xarray.Dataset(
        {name: ("ablation", values) for name, values in columns.items()},
        {"kind": ("ablation", kinds), "label": ("ablation", labels)},
        {"name": "erase ink", "value": -4.0},
    )


def judged(shares, n=40):
    """A report on ablations in which models show these shares of targets and of bystanders; others, the unedited ones.

    Args:
        shares: model -> (share of targets, share of bystanders); "unedited" is needed.
        n: prompts of each role.
    """
    models = ["unedited", *(named(scores, ratio) for ratio in RATIOS for scores in ("cad", *CONTROLS))]
    shown = numpy.zeros((3 * n, 1, len(models)))
    for k, model in enumerate(models):
        target, bystander = shares.get(model, shares["unedited"])
        for start, share in ((0, target), (n, target), (2 * n, bystander)):
            shown[start : start + round(n * share), 0, k] = 1
    variables = {"is_source": shown, "is_target": 1 - shown, "latent_distance": shown}
    return xarray.Dataset(
        {name: (("trial", "seed", "model"), values) for name, values in variables.items()},
        {
            "prompt": ("trial", [f"prompt {i}" for i in range(3 * n)]),
            "role": ("trial", ["efficacy"] * n + ["generality"] * n + ["specificity"] * n),
            "seed": [0],
            "model": models,
        },
    )


def planted_scores(follows):
    """Sums of scores of six concepts at twenty sites, of which one kind has the ranks of the causal map beside them.

    Ranks of positive and negative scores are opposite, and neither has to do with the number of weights.
    """
    rng = numpy.random.default_rng(0)
    names = [f"unet.{i}.resnet" for i in range(20)]
    up = numpy.arange(20.0) + 1
    amounts = dict(zip(AMOUNTS, (up, up[::-1], abs(up - up.mean()) + 1), strict=True))
    whole, each = ("case", "draw"), ("case", "draw", "site")
    variables = {"clean": (whole, numpy.full((6, 1), 100.0)), "corrupted": (whole, numpy.zeros((6, 1)))}
    variables |= {name: (each, numpy.full((6, 1, 20), 100.0)) for name in ("sham", "restored")}
    for name, values in amounts.items():
        noisy = values + rng.uniform(-0.4, 0.4, (6, 20))
        variables[name] = (("case", "site"), -noisy if name == "negative" else noisy)
    sums = xarray.Dataset(
        variables,
        {
            "case": range(6),
            "draw": [0],
            "site": names,
            "component": ("site", ["resnet"] * 20),
            "layer": ("site", range(20)),
        },
        {"intervention": "knock_out", "metric": "the erase objective"},
    )
    effects = amounts[follows] + rng.uniform(-0.4, 0.4, (10, 1, 20))
    return sums, make_map(effects[..., None], sites=names, metric=["m"])
