"""Running units: each is saved as soon as it is ready, and found again; unedited pictures are drawn once."""

import dataclasses
import hashlib
import json
import pathlib

import matplotlib.pyplot
import xarray
from diffusers import DiffusionPipeline

import editing
from benchmarks.reproduce.edits.units import Unit
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
        path, arguments = self.path(unit), self._arguments(unit.describe())
        if path.exists():
            report = xarray.load_dataset(path, engine="scipy")
            if report.attrs.get("arguments") != arguments:
                raise ValueError(
                    f"{path} was made with another model or other settings: choose another --output, or move it away"
                )
            return report
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
            _save(report.sel(model=[UNEDITED]), unedited)
        if unit.keeps_pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure = editing.plot_sheet(report)
            figure.savefig(path.with_suffix(".png"), dpi=120)
            matplotlib.pyplot.close(figure)
        _save(report.drop_vars(_PICTURES).assign_attrs(arguments=arguments), path)
        return xarray.load_dataset(path, engine="scipy")

    def _arguments(self, values: dict | list) -> str:
        sampler = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return json.dumps({"model": self.model, "of": values} | sampler, sort_keys=True)

    def _unedited_path(self, suite: Suite, seed: int) -> pathlib.Path:
        """The file of unedited pictures, which all units with the same suite and noise share."""
        arguments = self._arguments([seed, *(dataclasses.asdict(trial) for trial in suite)])
        return self.folder / "unedited" / f"{hashlib.sha256(arguments.encode()).hexdigest()[:16]}.nc"


def _save(report: xarray.Dataset, path: pathlib.Path) -> None:
    """Writes a report; whoever interrupts this leaves no file that looks like one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = report.copy()
    if "images" in report:  # netCDF 3 has no bytes without a sign
        report.images.encoding = {"dtype": "int16"}
    unfinished = path.with_suffix(".unfinished")
    report.to_netcdf(unfinished, engine="scipy")
    unfinished.replace(path)
