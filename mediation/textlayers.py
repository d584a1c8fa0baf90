"""Which consecutive cross-attentions carry a subject: the search of LocoGen."""

import dataclasses
from collections.abc import Sequence

import xarray
from diffusers import DiffusionPipeline

from mediation.cases import Case
from mediation.direct import text_layers
from mediation.effects import indirect_effect
from mediation.tracing import trace


@dataclasses.dataclass(frozen=True, eq=False)
class TextLayers:
    """Consecutive cross-attentions that carry a subject.

    Attributes:
        layers: their names, in execution order; what `editing.cross_attention_edit` takes as `layers`.
        effects: the causal map of every run of layers that was tried, longest last.
    """

    layers: tuple[str, ...]
    effects: xarray.Dataset


def find_text_layers(
    pipe: DiffusionPipeline,
    cases: Case | Sequence[Case],
    *,
    share: float = 0.8,
    max_layers: int | None = None,
    mode: str = "knock_out",
    **options,
) -> TextLayers:
    """Finds the fewest consecutive cross-attentions through which a prompt gives the picture its subject (LocoGen).

    For m = 1, 2, …, every run of m consecutive layers reads the other run's prompt in the conditional half, at every
    step. The search ends where the best of them has

        mean IE / mean TE >= share

    whichever sign the total effect has: of some metrics, less is better.

    Args:
        pipe: a diffusers pipeline of a supported family.
        cases: what to look for; with `ReplaceSubject`, the layers read the prompt about something else.
        share: of the total effect that is enough.
        max_layers: the longest run to try; None is all layers.
        mode: "knock_out" takes the subject from the clean prompt's picture, "restore" gives it to the corrupted one's.
        **options: of `mediation.trace`, but for several metrics, images and windows.

    Returns:
        The layers, and the map that they were found in.

    Raises:
        ValueError: if no run of layers has enough of the effect, with the best one; or if there is no total effect.
        TypeError, KeyError, ValueError: before any work, if an argument does not fit the pipeline.

    References:
        Basu et al. 2024, On Mechanistic Knowledge Localization in Text-to-Image Generative Models, arXiv:2405.01008.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> case = mediation.Case("a cat in ink", subject="ink", corruption=mediation.ReplaceSubject("noto"))
        >>> options = {"metric": mediation.LatentDistance(), "num_inference_steps": 1}
        >>> found = find_text_layers(pipe, case, share=0.1, mode="restore", **options)
        >>> set(found.layers) <= {layer.name for layer in text_layers(pipe)}
        True
    """
    names = [layer.name for layer in text_layers(pipe)]
    max_layers = len(names) if max_layers is None else max_layers
    if not 0 < share <= 1:
        raise ValueError(f"share of the total effect must lie between 0 and 1, got {share}")
    if not 1 <= max_layers <= len(names):
        raise ValueError(f"max_layers must lie between 1 and the {len(names)} layers there are, got {max_layers}")
    metric = options.get("metric")
    if not (metric is None or callable(metric)):
        raise ValueError("the search goes by one metric: pass a single one")
    for name in ("images", "windows"):
        if options.get(name) is not None:
            raise ValueError(f"the search is for layers at all steps and keeps no images: pass no {name}")
    maps = []
    for m in range(1, max_layers + 1):
        runs = [names[first : first + m] for first in range(len(names) - m + 1)]
        maps.append(trace(pipe, cases, sites=runs, backend="direct_effect", mode=mode, **options))
        # by shares, since total effects are negative by a metric of which less is better
        shares = indirect_effect(maps[-1], normalize=True).mean("draw").mean("case")
        if shares.isnull().all():
            raise ValueError(
                "no case has a total effect above the noise floor and a finite metric, of which layers could carry a"
                " share: choose cases whose subject the metric sees, or another metric"
            )
        best = str(shares.idxmax("site").item())
        reached = float(shares.max())
        if reached >= share:
            return TextLayers(tuple(best.split("+")), _joined(maps))
    raise ValueError(
        f"no {max_layers} consecutive layers have {share:g} of the total effect; the best, {best}, have {reached:.3g}"
    )


def _joined(maps: Sequence[xarray.Dataset]) -> xarray.Dataset:
    """One map of the sites of all, with the controls of the first."""
    shared = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "exact"}
    return xarray.concat(maps, "site", combine_attrs="override", **shared)
