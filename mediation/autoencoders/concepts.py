"""What a concept dictionary says: the label of each latent, how good it is, and the latents of each label."""

from collections.abc import Callable

import numpy
import xarray

from mediation.autoencoders.tally import agreement


def score_latents(dictionary: xarray.Dataset, *, seed: int = 0) -> xarray.Dataset:
    """Names each latent by its best label, and scores the name on pictures that did not choose it.

    The label is the one with the largest IoU in the even pictures; scores are of the odd ones. Monosemanticity is
    1 − H / log n: H is the entropy of the values that the positions where the latent is active have, among the n values
    of the label's kind that occur; 1 is a latent of a single value.

    Two controls say what the scores are worth. Chance is the same procedure with every picture's masks taken from
    another picture. And the name of each latent is judged on a random one, drawn among the others that are active in
    both halves: what a name that fits any latent would have.

    Args:
        dictionary: from `mediation.concept_dictionary`.
        seed: of the random latents.

    Returns:
        A Dataset over latent: label, iou, precision, recall, monosemanticity, and the last four as chance_… and as
        random_…, with random_latent, which one that is, or -1. Scores are NaN, and labels empty, for latents that are
        not active in both halves of the pictures, or in the even ones never where anything is labelled; by chance
        likewise, for those that meet nothing of other pictures.

    Example:
        >>> from mediation.autoencoders.concepts import _example
        >>> score_latents(_example()).label.values.tolist()
        ['object: cat', 'object: dog']
    """
    found = {}
    chosen, judged = (dictionary.isel(fold=fold, drop=True) for fold in (0, 1))
    active = (chosen.active > 0) & (judged.active > 0)
    for prefix in ("", "chance_"):
        iou = agreement(chosen, prefix)["iou"]
        best = iou.fillna(-1).argmax("label")
        named = active & (iou.isel(label=best).drop_vars("label") > 0)
        scores = agreement(judged, prefix) | {"monosemanticity": _monosemanticity(judged, f"{prefix}overlap")}
        for name, score in scores.items():
            found[f"{prefix}{name}"] = score.isel(label=best).drop_vars("label").where(named)
        if not prefix:
            labels = dictionary.label.values[best.values]
            found["label"] = ("latent", numpy.where(named.values, labels, ""))
            other = numpy.where(named.values, _others(active.values, seed), -1)
            found["random_latent"] = ("latent", numpy.where(other < 0, -1, dictionary.latent.values[other]))
            for name, score in scores.items():
                values = score.transpose("latent", "label").values[other, best.values]
                found[f"random_{name}"] = ("latent", numpy.where(other < 0, numpy.nan, values))
    return xarray.Dataset(found, coords={"latent": dictionary.latent}, attrs=dict(dictionary.attrs))


def concept_latents(dictionary: xarray.Dataset, label: str, k: int = 5) -> list[int]:
    """The k latents that coincide best with a label, by IoU over all pictures, best first.

    Args:
        dictionary: from `mediation.concept_dictionary`.
        label: one of its labels, or the part behind "kind: " if no other label ends alike.
        k: how many; fewer are returned if fewer ever coincide with it.

    Raises:
        KeyError: if there is no such label, or several.
        ValueError: if k is not positive, or no latent coincides with it.

    Example:
        >>> from mediation.autoencoders.concepts import _example
        >>> concept_latents(_example(), "dog", k=1)
        [1]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    labels = dictionary.label.values.tolist()
    matching = [label] if label in labels else [known for known in labels if known.partition(": ")[2] == label]
    if len(matching) != 1:
        close = ", ".join(matching or labels[:5])
        raise KeyError(f"{'several labels are' if matching else 'no label is'} called {label!r}: {close}")
    iou = dictionary.iou.sel(label=matching[0]).fillna(0).values
    order = [int(i) for i in numpy.argsort(-iou, kind="stable")[:k] if iou[i] > 0]
    if not order:
        raise ValueError(f"no latent is ever active where {matching[0]!r} is: draw more pictures, or train longer")
    return [int(dictionary.latent.values[i]) for i in order]


def concept_labels(dictionary: xarray.Dataset, threshold: float = 0.3) -> dict[int, list[str]]:
    """The labels whose IoU with a latent reaches a threshold, best first, by latent; latents without any are left out.

    Example:
        >>> from mediation.autoencoders.concepts import _example
        >>> concept_labels(_example(), threshold=0.9)
        {0: ['object: cat'], 1: ['object: dog']}
    """
    iou = dictionary.iou.fillna(0)
    found = {}
    for latent, row in zip(dictionary.latent.values.tolist(), iou.transpose("latent", "label").values, strict=True):
        order = numpy.argsort(-row, kind="stable")
        if labels := [str(dictionary.label.values[i]) for i in order if row[i] >= threshold]:
            found[latent] = labels
    return found


def embed_latents(
    dictionary: xarray.Dataset, embed: Callable[[list[str]], "numpy.typing.ArrayLike"], threshold: float = 0.3
) -> xarray.DataArray:
    """Embeds latents by the mean of their labels' embeddings, each weighted by IoU (Tinaz et al. 2025, section 3).

    Args:
        dictionary: from `mediation.concept_dictionary`.
        embed: labels to vectors (label, component), as a text encoder gives them.
        threshold: labels with a smaller IoU do not count.

    Returns:
        (latent, component), NaN for latents without labels.

    Example:
        >>> from mediation.autoencoders.concepts import _example
        >>> embed_latents(_example(), lambda labels: [[len(label)] for label in labels]).values.tolist()
        [[11.0], [11.0]]
    """
    vectors = numpy.asarray(embed(dictionary.label.values.tolist()), float)
    if vectors.ndim != 2 or len(vectors) != dictionary.sizes["label"]:
        raise ValueError(f"expected one vector for each of {dictionary.sizes['label']} labels, got {vectors.shape}")
    weights = dictionary.iou.fillna(0).transpose("latent", "label")
    weights = weights.where(weights >= threshold, 0).values
    total = weights.sum(1, keepdims=True)
    blank = numpy.full((len(weights), vectors.shape[1]), numpy.nan)
    mean = numpy.divide(weights @ vectors, total, out=blank, where=total > 0)
    return xarray.DataArray(mean, dims=("latent", "component"), coords={"latent": dictionary.latent})


def _others(active: numpy.ndarray, seed: int) -> numpy.ndarray:
    """For each active latent the index of another, each as likely; -1 for the rest, or if there is no other."""
    found, indices = numpy.full(len(active), -1), active.nonzero()[0]
    if (n := len(indices)) > 1:
        shifts = numpy.random.default_rng(seed).integers(1, n, size=n)
        found[indices] = indices[(numpy.arange(n) + shifts) % n]
    return found


def _monosemanticity(counts: xarray.Dataset, name: str) -> xarray.DataArray:
    """By (latent, label): of the values of the label's kind, how far those where the latent is active are one."""
    overlap = counts[name].transpose("latent", "label").values
    labels = counts.label.values.tolist()
    kinds = numpy.array([label.partition(": ")[0] if ": " in label else "" for label in labels])
    scores = numpy.full(overlap.shape, numpy.nan)
    for kind in dict.fromkeys(kinds.tolist()):
        columns = kinds == kind
        of_kind = overlap[:, columns]
        n_values = int((of_kind.sum(0) > 0).sum())
        total = of_kind.sum(1, keepdims=True)
        if n_values > 1:
            shares = numpy.divide(of_kind, total, out=numpy.zeros(of_kind.shape), where=total > 0)
            logs = numpy.log(shares, out=numpy.zeros(shares.shape), where=shares > 0)
            single = 1 + (shares * logs).sum(1) / numpy.log(n_values)
            scores[:, columns] = numpy.where(total > 0, single[:, None], numpy.nan)
    return xarray.DataArray(scores, dims=("latent", "label"), coords={"label": counts.label})


def _example() -> xarray.Dataset:
    """The smallest dictionary, for the examples of this file: two latents, each with a label of its own."""
    overlap = numpy.array([[[4.0, 0.0], [0.0, 4.0]]] * 2)
    chance = numpy.full(overlap.shape, 2.0)
    area, active = numpy.full((2, 2), 4.0), numpy.full((2, 2), 4.0)
    found = xarray.Dataset(
        {
            "overlap": (("fold", "latent", "label"), overlap),
            "chance_overlap": (("fold", "latent", "label"), chance),
            "area": (("fold", "label"), area),
            "chance_area": (("fold", "label"), area),
            "active": (("fold", "latent"), active),
            "n_positions": ("fold", [8.0, 8.0]),
        },
        coords={"fold": [0, 1], "latent": [0, 1], "label": ["object: cat", "object: dog"]},
    )
    return found.assign(agreement(found.sum("fold")))
