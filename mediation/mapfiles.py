"""Causal maps in files: netCDF, which needs nothing else installed, or Zarr."""

import importlib.util
import pathlib

import numpy
import xarray

from mediation.schema import IMAGE_DIMS, check


def check_path(path: str | pathlib.Path) -> pathlib.Path:
    """Checks that a map can be kept under this name.

    Raises:
        ValueError: if it ends neither in .nc nor in .zarr.
        ImportError: if it needs zarr, which is not installed.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".nc", ".zarr"):
        raise ValueError(f"a map is kept in a .nc file or a .zarr folder, got {path.name!r}")
    if path.suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        raise ImportError('.zarr needs the zarr package: pip install "diffusion-mediation[zarr]"')
    return path


def save_map(effects: xarray.Dataset, path: str | pathlib.Path) -> None:
    """Writes a map to a .nc file or a .zarr folder, in place of what is there.

    Raises:
        ValueError: if `effects` is no map, or the name ends otherwise.
    """
    check(effects)
    path = check_path(path)
    effects = effects.copy()
    for name in IMAGE_DIMS:
        if name in effects:  # netCDF 3 has no unsigned bytes
            effects[name].encoding = {"dtype": "int16" if path.suffix == ".nc" else "uint8"}
    if path.suffix == ".nc":
        effects.to_netcdf(path, engine="scipy")
    else:
        effects.to_zarr(path, mode="w", zarr_format=2)  # format 3 does not specify text yet


def open_map(path: str | pathlib.Path) -> xarray.Dataset:
    """Reads a map that `save_map` or xarray wrote, all of it into memory.

    Raises:
        ValueError: if the file holds something else, with what is wrong.
    """
    path = check_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no map at {path}")
    with xarray.open_dataset(path, engine="scipy" if path.suffix == ".nc" else "zarr") as found:
        effects = found.load()
    check(effects)
    return effects.assign({name: effects[name].astype(numpy.uint8) for name in IMAGE_DIMS if name in effects})
