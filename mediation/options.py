"""Options that several commands have, and loading the pipeline that they name."""

import pathlib
import warnings
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline

import mediation

DTYPES = ("float32", "float16", "bfloat16")

Model = Annotated[str | None, typer.Option(help="Pipeline folder or hub id; without it, Emoji Diffusion.")]
Device = Annotated[str | None, typer.Option(help="Where to run, as cuda; without it, the CPU.")]
Dtype = Annotated[str | None, typer.Option(help=f"Of weights: {', '.join(DTYPES)}; without it, float32.")]
Component = Annotated[str | None, typer.Option(help="Only sites of this kind, as resnet or block.")]
Heads = Annotated[bool, typer.Option("--heads", help="Single attention heads in place of modules.")]
Map = Annotated[pathlib.Path, typer.Argument(help="A map that `mediation trace` wrote.")]
Select = Annotated[
    list[str], typer.Option(help="One token, window or metric, as metric=image_mse; give it as often as needed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(model: str | None, device: str | None = None, dtype: str | None = None) -> DiffusionPipeline:
    """Loads a pipeline to a device, in a dtype.

    Args:
        model: folder or hub id; None is Emoji Diffusion.
        device: as of torch; None is the CPU.
        dtype: a name among `DTYPES`; None is float32.

    Raises:
        ValueError: if there is no such device or dtype, before anything is loaded.

    Example:
        >>> load(None, dtype="bfloat16").dtype
        torch.bfloat16
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
            raise ValueError(f"cannot run on the device {device!r}: {error}") from error
    with warnings.catch_warnings():
        # the name that all supported versions know, and the latest deprecate
        warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
        pipe = mediation.load_pipeline(model, **({} if dtype is None else {"torch_dtype": getattr(torch, dtype)}))
    return pipe if device is None else pipe.to(device)
