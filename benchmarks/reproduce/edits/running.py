"""Running units: each is saved as soon as it is ready, and found again; unedited pictures are drawn once."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import matplotlib.pyplot
import xarray
from diffusers import DiffusionPipeline

import editing
from benchmarks.reproduce.edits.units import Unit
from benchmarks.reproduce.storing import save, stored
from editing.evaluation import UNEDITED
from editing.suites import Suite

_PICTURES = ["images", "latents"]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs units with one model and one sampler, and keeps the results in a folder.

    Attributes:
        pipe: Emoji Diffusion.
        folder: where to keep what is ready.
        model: fingerprint of the pipeline.
        num_inference_steps: sampler steps.
        guidance_scale: of classifier-free guidance.
        batch_size: pictures drawn together.
    """

    pipe: DiffusionPipeline
    folder: pathlib.Path
    model: str
    num_inference_steps: int
    guidance_scale: float
    batch_size: int = 32

    def path(self, unit: Unit) -> pathlib.Path:
        """The file of a unit's report."""
        return self.folder / unit.experiment / f"{unit.name.replace(' ', '_')}.nc"

    def run(self, unit: Unit) -> xarray.Dataset:
        """The unit's report, as `editing.evaluate` makes it, without pictures; from its file, if that is there.

        Raises:
            ValueError: if the file was made with another model or other settings.
        """
        return stored(self.path(unit), self._arguments(unit.describe()), functools.partial(self._judge, unit))

    def _judge(self, unit: Unit) -> xarray.Dataset:
        suite = unit.suite()
        edits = {name: recipe.make(self.pipe, unit.pairs, unit.attribute) for name, recipe in unit.recipes.items()}
        unedited = self._unedited_path(suite, unit.seed)
        report = editing.evaluate(
            self.pipe,
            edits,
            suite,
            seeds=unit.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            keep_images=True,
            unedited=xarray.load_dataset(unedited, engine="scipy") if unedited.exists() else None,
        )
        if not unedited.exists():
            plain = report.sel(model=[UNEDITED])
            plain.images.encoding = {"dtype": "int16"}  # netCDF 3 has no bytes without a sign
            save(plain, unedited)
        if unit.keeps_pictures:
            path = self.path(unit).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure = editing.plot_sheet(report)
            figure.savefig(path, dpi=120)
            matplotlib.pyplot.close(figure)
        return report.drop_vars(_PICTURES)

    def _arguments(self, values: dict | list) -> dict:
        sampler = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {"model": self.model, "of": values} | sampler

    def _unedited_path(self, suite: Suite, seed: int) -> pathlib.Path:
        """The file of unedited pictures, which all units with the same suite and noise share."""
        arguments = json.dumps(self._arguments(["judges told", seed, *map(dataclasses.asdict, suite)]), sort_keys=True)
        return self.folder / "unedited" / f"{hashlib.sha256(arguments.encode()).hexdigest()[:16]}.nc"
