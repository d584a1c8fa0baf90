"""Rows whose metric came out as no finite number: told apart from what never ran, reported, and never averaged over."""

import warnings

import numpy
import xarray

_N_NAMED = 5


def bad_rows(effects: xarray.Dataset) -> xarray.DataArray:
    """Which rows are not finite, by (case, draw, site[, token][, window][, metric]).

    What never ran, having no token to change, is not among them. Where the clean or the corrupted run of a case and
    draw is, all its rows are.

    Args:
        effects: a map.

    Example:
        >>> from mediation.effects import _example
        >>> bad_rows(_example().assign(restored=("site", [numpy.inf, 1.0]))).values.tolist()
        [[[True, False]]]
    """
    return _bad_restorations(effects) | _bad_controls(effects)


def without_bad_rows(effects: xarray.Dataset) -> xarray.Dataset:
    """The map with NaN at places, in every case, at which some row is not finite; a warning says which rows."""
    places = bad_rows(effects).any(("case", "draw"))
    if not places.any():
        return effects
    warn_of_bad_rows(effects, stacklevel=4)
    whole = _bad_controls(effects).any(("case", "draw"))
    kept = {name: effects[name].where(~places) for name in ("sham", "restored")}
    return effects.assign(kept | {name: effects[name].where(~whole) for name in ("clean", "corrupted")})


def warn_of_bad_rows(effects: xarray.Dataset, *, stacklevel: int = 3) -> None:
    """Warns of rows that are not finite, by site, case and whatever else tells them apart."""
    for bad, names, remedy in (
        (_bad_controls(effects), "the clean or the corrupted run", "nothing is averaged until drop_sel leaves it out"),
        (_bad_restorations(effects), "rows", "averages leave these places out, in every case"),
    ):
        labels = _labels(bad)
        if labels:
            more = f" and {len(labels) - _N_NAMED} more" if len(labels) > _N_NAMED else ""
            named = "; ".join(labels[:_N_NAMED])
            warnings.warn(f"the metric is not finite for {names} of {named}{more}: {remedy}", stacklevel=stacklevel)


def _bad_controls(effects: xarray.Dataset) -> xarray.DataArray:
    return ~(numpy.isfinite(effects.clean) & numpy.isfinite(effects.corrupted))


def _bad_restorations(effects: xarray.Dataset) -> xarray.DataArray:
    return (~numpy.isfinite(effects.restored) & ~never_ran(effects)).transpose(*effects.sham.dims)


def never_ran(effects: xarray.Dataset) -> xarray.DataArray:
    """Places without a token to change, by what the map says of them; one that does not say left the sham out there."""
    if "absent" in effects:
        return effects.absent.astype(bool)
    if "token" in effects.coords:
        return numpy.isnan(effects.sham)
    return xarray.zeros_like(effects.sham, bool)


def _labels(bad: xarray.DataArray) -> list[str]:
    """Where a mask is set in some draw, in words: "unet.mid.0.resnet (case 2, window 0–0.5)", or "case 2"."""
    bad = bad.any("draw").transpose(*(["site"] if "site" in bad.dims else []), "case", ...)
    labels = []
    for index in numpy.argwhere(bad.values):
        own = {dim: bad[dim].values[i] for dim, i in zip(bad.dims, index, strict=True)}
        site = own.pop("site", None)
        rest = ", ".join(f"{dim} {label}" for dim, label in own.items())
        labels.append(rest if site is None else f"{site} ({rest})")
    return labels
