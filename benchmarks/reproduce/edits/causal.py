"""Edits of single places of the text encoder, set against the causal map of the same attribute."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import xarray
from scipy import stats

import mediation
from benchmarks.reproduce.edits.recipes import Recipe
from benchmarks.reproduce.edits.scoring import merit
from editing.evaluation import UNEDITED
from mediation.mapfiles import open_map

# The map is judged by the probe, as the edits are.
_METRIC = "probe_probability"
# What `benchmarks.reproduce.tracing` calls an attribute, where that is something else.
_NAMES = {"background": "color"}
# Tokens of the map that an edit of these tokens changes.
_EDITED = {"last_subject": ["last_subject"], "from_subject": ["last_subject", "after", "eos", "padding"]}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How edits by place agree with what restoring the place brings back.

    Attributes:
        tokens: which tokens were edited.
        sites: names of the places.
        merits: of the edits there.
        effects: indirect effects there, summed over the tokens that the edit changes.
        rho: Spearman's correlation of the two; NaN where one of them is the same at all places.
        p: its two-sided p-value, if places were exchangeable; NaN likewise.
        traced: the place with the largest effect.
        rank: of the edit there among all, 1 being the best; ties share the better rank.
    """

    tokens: str
    sites: tuple[str, ...]
    merits: tuple[float, ...]
    effects: tuple[float, ...]
    rho: float
    p: float
    traced: str
    rank: int


def load_map(folder: pathlib.Path | None, attribute: str) -> xarray.Dataset | None:
    """The map of an attribute's text-encoder sites that `benchmarks.reproduce.tracing` made, or None if there is none.

    Raises:
        ValueError: if the map was not judged by the probe.
    """
    path = None if folder is None else folder / f"{_NAMES.get(attribute, attribute)}.text.nc"
    if path is None or not path.exists():
        return None
    effects = open_map(path)
    if _METRIC not in effects.get("metric", []):
        raise ValueError(f"{path} has no metric {_METRIC}: make it with benchmarks.reproduce.tracing")
    return effects.sel(metric=_METRIC, drop=True)


def agreement(
    rows: Sequence[Mapping], recipes: Mapping[str, Recipe], effects: xarray.Dataset, tokens: str
) -> Agreement:
    """Compares edits of single sites at some tokens with a map.

    Args:
        rows: of `scoring.score`, the unedited model's among them.
        recipes: by the rows' models; those of other tokens are left out.
        effects: a map of one metric, with tokens.
        tokens: the tokens that the edits changed.
    """
    plain = next(row for row in rows if row["model"] == UNEDITED)
    chosen = {row["model"]: row for row in rows if row["model"] in recipes and recipes[row["model"]].tokens == tokens}
    merits = {
        recipes[name].sites[0]: merit(row["gone"]["mean"], row["specificity"]["mean"], plain["specificity"]["mean"])
        for name, row in chosen.items()
    }
    # A prompt that ends with its subject has nothing after it: NaN there, which counts for nothing in the sum.
    mean = mediation.indirect_effect(effects).mean(("case", "draw")).sel(token=_EDITED[tokens]).sum("token")
    shown = [float(mean.sel(site=site)) for site in merits]
    rho = p = math.nan
    if len({*merits.values()}) > 1 and len({*shown}) > 1:
        rho, p = map(float, stats.spearmanr(list(merits.values()), shown))
    traced = list(merits)[max(range(len(shown)), key=shown.__getitem__)]
    rank = 1 + sum(value > merits[traced] for value in merits.values())
    return Agreement(
        tokens,
        tuple(merits),
        tuple(merits.values()),
        tuple(shown),
        rho,
        p,
        traced,
        rank,
    )
