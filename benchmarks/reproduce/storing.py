"""Datasets in files: made once with the same arguments, and found again."""

import json
import pathlib
from collections.abc import Callable, Mapping

import xarray


def stored(path: pathlib.Path, arguments: Mapping, make: Callable[[], xarray.Dataset]) -> xarray.Dataset:
    """What is in the file, or what is made now and saved.

    Args:
        path: a netCDF file.
        arguments: all that decides on the values, as plain JSON.
        make: makes the Dataset.

    Raises:
        ValueError: if the file was made with other arguments.
    """
    described = json.dumps(arguments, sort_keys=True)
    if not path.exists():
        save(make().assign_attrs(arguments=described), path)
    found = xarray.load_dataset(path, engine="scipy")
    if found.attrs.get("arguments") != described:
        raise ValueError(
            f"{path} was made with another model or other settings: choose another --output, or move it away"
        )
    return found


def save(dataset: xarray.Dataset, path: pathlib.Path) -> None:
    """Writes a netCDF file; whoever interrupts this leaves no file that looks like one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    dataset.to_netcdf(unfinished, engine="scipy")
    unfinished.replace(path)
