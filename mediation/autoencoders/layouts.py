"""Emergence: what latents explain, and how much of the finished composition they show, by place and step."""

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy
import torch
import xarray
from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.autoencoders.dictionary import Labeller, check_dictionary, label_masks
from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.observing import check_prompts, observe
from mediation.autoencoders.prediction import composition_iou, score_labels, votes_of
from mediation.autoencoders.splicing import check_spliceable
from mediation.intervals import check_interval, mean_interval
from mediation.provenance import provenance
from mediation.sampling import Sampling


def emergence(
    pipe: DiffusionPipeline,
    saes: Sequence[SparseAutoencoder],
    dictionaries: Sequence[xarray.Dataset],
    prompts: Sequence[str],
    labeller: Labeller,
    *,
    seed: int = 1_000_000,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> xarray.Dataset:
    """Predicts the layout of finished pictures from latents at each autoencoder's place and step.

    With z_c the latents at a position, a label l has the score Σ_c z_c (precision_cl − base_l), where base_l is the
    share of positions that have the label: each latent votes for what it meets more often than chance. Scores are
    enlarged to the picture, bilinearly, and each pixel takes the label with the largest score, of those that
    the picture has. The mIoU of a picture is the mean over its labels of |predicted ∩ mask| / |predicted ∪ mask|.

    Which labels a picture has is given; where they are is predicted. Pictures have habits, as objects in the middle, so
    there are two controls: the same with the latents of the picture before; and a constant layout, where each pixel
    takes the label that it has most often in the other pictures with that label. The masks of all pictures are kept.

    Args:
        pipe: a diffusers pipeline of a supported family.
        saes: autoencoders that know their places; all are read in one run.
        dictionaries: of each, from `mediation.concept_dictionary` with the same kind of labels and other pictures.
        prompts: one picture each, at least two.
        labeller: as of `mediation.concept_dictionary`; masks of a picture must not overlap.
        seed: of the first picture's noise; each further one has the next. By default far from a dictionary's: a prompt
            and a seed that made one of the dictionaries are refused.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: rows of one call of the pipeline; None suits the latents' size.
        progress: shows a progress bar on a terminal.

    Returns:
        A Dataset by (autoencoder, case), where a case is a picture: residual, Σ||x − x̂||², and variance,
        Σ||x − mean||²; miou, chance_miou and constant_miou, NaN for pictures without a label that the dictionary has.
        Coordinates on autoencoder: site, t (the first of its steps), branch. Means and intervals:
        `mediation.summarize_emergence`.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline or another.
        ValueError: before any work, if a picture made one of the dictionaries; later, if masks overlap.

    Example:
        >>> import mediation
        >>> from mediation import bundled
        >>> pipe = mediation.load_pipeline()
        >>> sae = mediation.SparseAutoencoder(192, 384, k=8, place=mediation.Place("unet.mid.0"))
        >>> options = {"num_inference_steps": 2}
        >>> prompts, labeller = ["a cat on a red background", "a dog"], bundled.label_composition
        >>> dictionary = mediation.concept_dictionary(pipe, sae, prompts, labeller, n_top=1, **options)
        >>> found = mediation.emergence(pipe, [sae], [dictionary], prompts, labeller, **options)
        >>> dict(found.sizes)
        {'autoencoder': 1, 'case': 2}
    """
    prompts, saes = check_prompts(prompts), list(saes)
    if not saes or len(saes) != len(dictionaries):
        raise ValueError(f"there is one dictionary for each autoencoder; got {len(saes)} and {len(dictionaries)}")
    if len(prompts) < 2:
        raise ValueError("emergence needs at least two prompts: the control mistakes one picture for another")
    for sae, dictionary in zip(saes, dictionaries, strict=True):
        check_spliceable(pipe, sae, "cond")
        check_dictionary(dictionary, sae)
    if len({sae.place for sae in saes}) < len(saes):
        raise ValueError("two autoencoders read the same place: compare them in separate calls")
    sampling, seeds = Sampling(num_inference_steps, guidance_scale), range(seed, seed + len(prompts))
    for dictionary in dictionaries:
        _check_unseen(dictionary, prompts, seeds)
    votes = [votes_of(dictionary) for dictionary in dictionaries]
    labels = [dictionary.label.values.tolist() for dictionary in dictionaries]
    sums = [_Sums() for _ in saes]
    scores: list[list[torch.Tensor]] = [[] for _ in saes]
    masks: list[dict[str, torch.Tensor]] = []
    options = {"sampling": sampling, "with_images": True, "batch_size": batch_size}
    with tqdm(total=len(prompts), desc="watching", unit="image", disable=None if progress else True) as bar:
        for found in observe(pipe, prompts, seeds, [sae.place for sae in saes], **options):
            for i, sae in enumerate(saes):
                for activations in found.activations[sae.place]:
                    latents = sums[i].add(sae, activations)
                    scores[i].append(score_labels(latents, votes[i]))
            masks += [_partition(label_masks(labeller, image)) for image in found.images]
            bar.update(len(found.prompts))
    n = len(prompts)
    names, habits = ("residual", "variance", "miou", "chance_miou", "constant_miou"), _Habits(masks)
    values = {name: numpy.full((len(saes), n), numpy.nan) for name in names}
    for i in range(len(saes)):
        values["residual"][i], values["variance"][i] = sums[i].totals()
        for j in range(n):
            values["miou"][i, j] = composition_iou(scores[i][j], labels[i], masks[j])
            values["chance_miou"][i, j] = composition_iou(scores[i][j - 1], labels[i], masks[j])
            known = {label: mask for label, mask in masks[j].items() if label in labels[i]}
            values["constant_miou"][i, j] = composition_iou(habits.without(j), list(masks[j]), known)
    places = [sae.place for sae in saes]
    return xarray.Dataset(
        {name: (("autoencoder", "case"), array) for name, array in values.items()},
        coords={
            "autoencoder": [str(place) for place in places],
            "site": ("autoencoder", [place.site for place in places]),
            "t": ("autoencoder", [place.steps[0] for place in places]),
            "branch": ("autoencoder", [place.branch for place in places]),
            "case": range(n),
            "prompt": ("case", prompts),
            "seed": ("case", list(seeds)),
        },
        attrs={**dataclasses.asdict(sampling), "provenance": json.dumps(provenance(pipe))},
    )


def summarize_emergence(
    found: xarray.Dataset,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    method: str = "percentile",
    seed: int = 0,
) -> xarray.Dataset:
    """Means over pictures with bootstrap intervals: explained variance, a ratio of sums, and mIoU.

    Args:
        found: from `mediation.emergence`.
        confidence: level of the intervals.
        n_resamples: bootstrap resamples of the pictures.
        method: "percentile" or "BCa".
        seed: of the resampling.

    Returns:
        A Dataset by (autoencoder, measure): mean, low, high. Measures are explained_variance; miou, chance_miou and
        constant_miou; and gain and gain_over_constant, by which the first exceeds the other two, picture by picture.
    """
    check_interval(confidence, method)
    options = {"confidence": confidence, "n_resamples": n_resamples, "method": method, "seed": seed}
    missed, low, high = mean_interval(found.residual, found.variance, **options)
    rows = {"explained_variance": (1 - missed, 1 - high, 1 - low)}
    quantities = {name: found[name] for name in ("miou", "chance_miou", "constant_miou")}
    quantities["gain"] = found.miou - found.chance_miou
    quantities["gain_over_constant"] = found.miou - found.constant_miou
    for name, values in quantities.items():
        rows[name] = mean_interval(values, **options)
    summary = {}
    for i, statistic in enumerate(("mean", "low", "high")):
        columns = numpy.stack([rows[name][i].values for name in rows], axis=1)
        summary[statistic] = (("autoencoder", "measure"), columns)
    found = xarray.Dataset(summary, coords=found.autoencoder.coords)
    return found.assign_coords(measure=list(rows)).assign_attrs(options)


class _Habits:
    """Where pictures have their labels, on average."""

    def __init__(self, masks: Sequence[dict[str, torch.Tensor]]):
        self._masks = masks
        self._sums: dict[str, torch.Tensor] = {}
        self._n: collections.Counter[str] = collections.Counter()
        for picture in masks:
            for label, mask in picture.items():
                self._sums[label] = self._sums.get(label, 0.0) + mask.float()
                self._n[label] += 1

    def without(self, number: int) -> torch.Tensor:
        """By label of a picture, the share of all others with that label that have it at a pixel, (label, y, x)."""
        picture = self._masks[number].items()
        shares = [(self._sums[label] - mask.float()) / max(1, self._n[label] - 1) for label, mask in picture]
        return torch.stack(shares) if shares else torch.zeros(0, 1, 1)


class _Sums:
    """Sums of squares picture by picture, from which residuals and variances about the mean of all follow."""

    def __init__(self):
        self._residual: list[float] = []
        self._squares: list[float] = []
        self._n: list[int] = []
        self._sums: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, sae: SparseAutoencoder, activations: torch.Tensor) -> torch.Tensor:
        """Adds a picture's activations (step, y, x, feature), and returns their latents."""
        latents = sae.encode(activations)
        wide = activations.double()
        self._residual.append(float((wide - sae.decode(latents).to(wide)).square().sum()))
        self._squares.append(float(wide.square().sum()))
        self._sums.append(wide.flatten(0, -2).sum(0))
        self._n.append(wide[..., 0].numel())
        return latents.cpu()

    def totals(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Residuals and variances, (picture,)."""
        sums, n = torch.stack(self._sums).numpy(), numpy.array(self._n)
        mean = sums.sum(0) / n.sum()
        variances = numpy.array(self._squares) - 2 * sums @ mean + n * (mean @ mean)
        return numpy.array(self._residual), variances


def _check_unseen(dictionary: xarray.Dataset, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if not {"prompt", "seed"} <= set(dictionary.coords):
        return
    known = set(zip(dictionary.prompt.values.tolist(), dictionary.seed.values.tolist(), strict=True))
    again = [pair for pair in zip(prompts, seeds, strict=True) if pair in known]
    if again:
        prompt, seed = again[0]
        raise ValueError(
            f"{len(again)} of the pictures made a dictionary, as {prompt!r} with seed {seed}, and would be predicted"
            " from what is known of them: choose another seed, or other prompts"
        )


def _example() -> xarray.Dataset:
    """What `emergence` returns, in small, for examples: an autoencoder at three steps, watched over two pictures."""
    values = {"residual": 1.0, "variance": 2.0, "miou": 0.6, "chance_miou": 0.4, "constant_miou": 0.5}
    return xarray.Dataset(
        {name: (("autoencoder", "case"), numpy.full((3, 2), value)) for name, value in values.items()},
        coords={
            "autoencoder": [f"unet.mid.0 at t={t}, cond" for t in (1, 0.5, 0)],
            "site": ("autoencoder", ["unet.mid.0"] * 3),
            "t": ("autoencoder", [1.0, 0.5, 0.0]),
            "branch": ("autoencoder", ["cond"] * 3),
        },
    )


def _partition(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if masks and torch.stack(list(masks.values())).sum(0).max() > 1:
        raise ValueError(
            f"masks of a composition must not overlap, and those of {', '.join(masks)} do: label one kind of thing only"
        )
    return masks
