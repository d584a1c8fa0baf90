"""Where a result comes from: the pipeline, and the versions of the software."""

import importlib.metadata

from diffusers import DiffusionPipeline


def provenance(pipe: DiffusionPipeline) -> dict[str, dict[str, str | None]]:
    """Names of a pipeline and versions of the packages that matter, ready for JSON."""
    packages = ("diffusion-mediation", "torch", "transformers", "diffusers")
    return {
        "pipeline": {"class": type(pipe).__name__, "name": pipe.name_or_path},
        "versions": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return None
