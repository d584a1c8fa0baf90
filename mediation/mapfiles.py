"""Causal maps in files: netCDF, which needs nothing else installed, or Zarr."""

import importlib.util
import pathlib

import numpy
import xarray

from mediation.schema import IMAGE_DIMS, check, seed_labels

_LARGEST_INTEGER = numpy.iinfo(numpy.int32).max  # of netCDF 3


def check_path(path: str | pathlib.Path) -> pathlib.Path:
    """Checks that a map can be kept under this name.

    Raises:
        ValueError: if it ends neither in .nc nor in .zarr.
        ImportError: if it needs zarr, which is not installed.
        FileNotFoundError: if there is no folder to keep it in.
    """
    return check_folder(_check_name(path))


def check_folder(path: pathlib.Path) -> pathlib.Path:
    """Checks that the folder of a file that is to be written exists.

    Raises:
        FileNotFoundError: if it does not.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to keep {path.name} in: make it first")
    return path


def _check_name(path: str | pathlib.Path) -> pathlib.Path:
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
        FileNotFoundError: if there is no folder to keep it in.
    """
    check(effects)
    path = check_path(path)
    effects = effects.copy()
    if path.suffix == ".nc" and "seed" in effects.coords and (effects.seed > _LARGEST_INTEGER).any():
        effects = effects.assign_coords(seed=effects.seed.astype(str))
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
    path = _check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no map at {path}")
    with xarray.open_dataset(path, engine="scipy" if path.suffix == ".nc" else "zarr") as found:
        effects = found.load()
    check(effects)
    if "seed" in effects.coords and effects.seed.dtype.kind not in "ui":  # text, since netCDF 3 has no wide integers
        effects = effects.assign_coords(seed=("case", seed_labels([int(seed) for seed in effects.seed.values])))
    return effects.assign({name: effects[name].astype(numpy.uint8) for name in IMAGE_DIMS if name in effects})
