"""Where a result comes from: the pipeline, and the versions of the software."""

import functools
import importlib.metadata
from collections.abc import Mapping

from diffusers import DiffusionPipeline


def provenance(pipe: DiffusionPipeline) -> dict[str, dict[str, str | None]]:
    """Names of a pipeline and versions of the packages that matter, ready for JSON."""
    packages = ("diffusion-mediation", "torch", "transformers", "diffusers", "numpy")
    return {
        "pipeline": {"class": type(pipe).__name__, "name": pipe.name_or_path},
        "versions": {package: _version(package) for package in packages},
    }


def pipeline_class(metadata: Mapping) -> str | None:
    """Class of the pipeline that an edit was made with, by its metadata; of a sum, that of its first part."""
    if "pipeline" in metadata:
        return metadata["pipeline"]["class"]
    return next(filter(None, map(pipeline_class, metadata.get("of", ()))), None)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return None
