"""One token, window, metric or latent of maps, as the command line names it."""

from collections.abc import Sequence

import xarray

from mediation.schema import OPTIONAL


def select(choices: Sequence[str], *maps: xarray.Dataset) -> list[xarray.Dataset]:
    """Maps at chosen labels, each "dimension=label": of every map that has the dimension.

    Args:
        choices: of different dimensions, which are token, latent, window or metric.
        *maps: from `mediation.trace`.

    Raises:
        ValueError: if no map has the dimension, or one that has it lacks the label.

    Example:
        >>> from mediation.effects import _example
        >>> effects = _example().expand_dims(metric=["clip_score", "image_mse"])
        >>> select(["metric=image_mse"], effects)[0].metric.item()
        'image_mse'
    """
    found = list(maps)
    for choice in choices:
        dim, _, label = choice.partition("=")
        known = [name for name in OPTIONAL if any(name in effects.dims for effects in found)]
        if "=" not in choice or dim not in known:
            has = f"there is {', '.join(known)} to choose of" if known else "there is nothing to choose of"
            raise ValueError(f"cannot choose {choice!r}: write dimension=label; {has}")
        found = [_selected(effects, dim, label) for effects in found]
    return found


def _selected(effects: xarray.Dataset, dim: str, text: str) -> xarray.Dataset:
    """The map at the label that a text stands for, whatever its type, or as it is, without the dimension."""
    if dim not in effects.dims:
        return effects
    known = effects[dim].values.tolist()
    # windows have a dash between their fractions, which few keyboards do
    for label in known:
        if str(label) in (text, text.replace("-", "–")):
            return effects.sel({dim: label})
    raise ValueError(f"no {dim} {text!r}; the map has {', '.join(map(str, known))}")
