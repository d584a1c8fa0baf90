"""Dictionaries in files."""

import os
import pathlib

import numpy
import xarray

from mediation.mapfiles import check_folder

_NEEDED = ("iou", "precision", "recall", "overlap", "chance_overlap", "area", "chance_area", "active", "n_positions")


def save_dictionary(dictionary: xarray.Dataset, path: str | os.PathLike) -> None:
    """Writes a concept dictionary to a .nc file, netCDF.

    Args:
        dictionary: from `mediation.concept_dictionary`.
        path: ends in ".nc".

    Raises:
        ValueError: if it ends otherwise.
        FileNotFoundError: if there is no folder to keep it in.

    Example:
        >>> import mediation, tempfile
        >>> from mediation.autoencoders.concepts import _example
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mediation.save_dictionary(_example(), f"{folder}/dictionary.nc")
        ...     again = mediation.open_dictionary(f"{folder}/dictionary.nc")
        >>> mediation.concept_latents(again, "dog")
        [1]
    """
    # netCDF 3 has no unsigned bytes
    encoding = {"thumbnail": {"dtype": "int16"}} if "thumbnail" in dictionary else {}
    dictionary.to_netcdf(check_path(path), engine="scipy", encoding=encoding)


def open_dictionary(path: str | os.PathLike) -> xarray.Dataset:
    """Reads a concept dictionary that `save_dictionary` wrote, all of it into memory.

    Args:
        path: ends in ".nc".

    Returns:
        What `mediation.concept_dictionary` returned.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    path = _check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no dictionary at {path}")
    with xarray.open_dataset(path, engine="scipy") as found:
        dictionary = found.load()
    if missing := [name for name in _NEEDED if name not in dictionary]:
        raise ValueError(f"{path} holds no concept dictionary: it has no {', '.join(missing)}")
    if "thumbnail" in dictionary:
        dictionary = dictionary.assign(thumbnail=dictionary.thumbnail.astype(numpy.uint8))
    return dictionary


def check_path(path: str | os.PathLike) -> pathlib.Path:
    """The path, if a dictionary can be written there.

    Raises:
        ValueError: if it does not end in ".nc".
        FileNotFoundError: if there is no folder to keep it in.
    """
    return check_folder(_check_name(path))


def _check_name(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".nc":
        raise ValueError(f"a concept dictionary is kept in a .nc file, got {path.name!r}")
    return path
