"""What a causal map must be: names, dimensions, coordinates and types, in one place."""

import collections
from collections.abc import Sequence

import numpy
import xarray

# Every variable with all its dimensions; a map may do without the optional ones.
DIMS = {
    "clean": ("case", "draw", "metric"),
    "corrupted": ("case", "draw", "metric"),
    "sham": ("case", "draw", "site", "token", "window", "metric"),
    "restored": ("case", "draw", "site", "token", "window", "metric"),
}
IMAGE_DIMS = {
    "clean_image": ("case", "draw", "y", "x", "channel"),
    "corrupted_image": ("case", "draw", "y", "x", "channel"),
    "restored_image": ("case", "draw", "image_site", "token", "window", "y", "x", "channel"),
}
# what the exact backend measured of an estimated map, and whether a place was drawn at random for it
CHECK_DIMS = {"exact": DIMS["restored"], "sampled": ("site", "token", "window")}
# of maps with tokens: where a case has none to change, so that nothing ran
ABSENT_DIMS = {"absent": ("case", "site", "token")}
OPTIONAL = ("token", "latent", "window", "metric")
_LABELLED = ("site", "image_site", *OPTIONAL)


def check(effects: xarray.Dataset, *, needs: Sequence[str] = (), one_metric: bool = False) -> None:
    """Checks that a Dataset is a causal map as `mediation.trace` returns it.

    Args:
        effects: what may be a map.
        needs: further coordinates of the sites that it must have, as "component".
        one_metric: whether it must not have a `metric` dimension.

    Raises:
        TypeError: if it is no Dataset.
        ValueError: if it is no map, with all that is wrong.

    Example:
        >>> check(xarray.Dataset({"clean": ("case", [1.0])}))
        Traceback (most recent call last):
        ValueError: expected the Dataset that mediation.trace returns, but it has no corrupted, sham, restored
    """
    if not isinstance(effects, xarray.Dataset):
        raise TypeError(f"expected the Dataset that mediation.trace returns, got {type(effects).__name__}")
    missing = [name for name in DIMS if name not in effects.data_vars]
    problems = [f"it has no {', '.join(missing)}"] if missing else _problems(effects, needs)
    if problems:
        raise ValueError(f"expected the Dataset that mediation.trace returns, but {'; '.join(problems)}")
    if one_metric and "metric" in effects.dims:
        raise ValueError(f"choose one metric: effects.sel(metric=…) of {list(effects.metric.values)}")


def seed_labels(seeds: Sequence[int]) -> numpy.ndarray:
    """Seeds as maps hold them: int64, or uint64 where one of them needs it, and never rounded.

    Example:
        >>> seed_labels([1, 2**63]).tolist()
        [1, 9223372036854775808]
    """
    return numpy.array(seeds, numpy.uint64 if max(seeds, default=0) >= 2**63 else numpy.int64)


def _problems(effects: xarray.Dataset, needs: Sequence[str]) -> list[str]:
    problems = []
    for name, allowed in (DIMS | IMAGE_DIMS).items():
        if name in effects.data_vars:
            # latents of an autoencoder stand where tokens do in other maps
            dims = ["latent" if dim == "token" and "latent" in effects.dims else dim for dim in allowed]
            expected = [dim for dim in dims if dim not in OPTIONAL or dim in effects.restored.dims]
            problems += _variable_problems(effects[name], expected)
    for dim in _LABELLED:
        if dim in effects.dims:
            problems += _label_problems(effects, dim)
    for name in needs:
        if name not in effects.coords or effects[name].dims != ("site",):
            problems.append(f"its sites have no coordinate {name!r}")
    return problems


def _variable_problems(variable: xarray.DataArray, expected: Sequence[str]) -> list[str]:
    problems = []
    if set(variable.dims) != set(expected):
        problems.append(f"{variable.name} has dims ({', '.join(map(str, variable.dims))}), not ({', '.join(expected)})")
    is_image = variable.name in IMAGE_DIMS
    # netCDF 3 has no uint8: images come back as wider integers
    if variable.dtype.kind not in ("ui" if is_image else "fui"):
        wanted = "integers from 0 to 255" if is_image else "real numbers"
        problems.append(f"{variable.name} holds {variable.dtype}, not {wanted}")
    return problems


def _label_problems(effects: xarray.Dataset, dim: str) -> list[str]:
    if dim not in effects.coords:
        return [f"the dimension {dim!r} has no labels"]
    if "site" not in dim:
        return []
    labels = effects[dim].values.tolist()
    if not all(isinstance(label, str) for label in labels):
        return [f"the labels of {dim!r} are {effects[dim].dtype}, not names"]
    repeated = [label for label, n in collections.Counter(labels).items() if n > 1]
    return [f"labels of {dim!r} repeat: {', '.join(repeated)}"] if repeated else []
