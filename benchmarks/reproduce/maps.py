"""Maps of attributes in files: made once, and found again by whoever asks for the same."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import xarray
from diffusers import DiffusionPipeline
from torch import nn

import mediation
from mediation.mapfiles import open_map, save_map
from mediation.metrics import Metric, metric_name
from mediation.parameters import sha256
from mediation.pipelines import family_of, tokenizers_of
from mediation.plans import make_plan
from mediation.restoration import n_computed_rows
from mediation.sampling import Sampling, n_iterations

# Where in the prompt sites of text encoders are restored. What comes before the subject cannot know of it.
TOKENS = ("last_subject", "after", "eos", "padding")
NETWORKS = ("denoiser", "text")


@dataclasses.dataclass(frozen=True)
class Task:
    """One map: all sites of the denoiser, or all of the text encoders at named tokens, for cases of one attribute.

    Attributes:
        attribute: what the cases' subjects state.
        network: "denoiser" or "text".
        cases: the cases.
        metrics: what is measured.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
    """

    attribute: str
    network: str
    cases: tuple[mediation.Case, ...]
    metrics: tuple[Metric, ...]
    num_inference_steps: int
    guidance_scale: float

    def arguments(self, model: str) -> str:
        """All that decides the values of the map, as JSON; `model` is a fingerprint."""
        values = {
            "model": model,
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "metrics": [metric_name(metric) for metric in self.metrics],
            "tokens": TOKENS if self.network == "text" else None,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        return json.dumps(values, sort_keys=True)

    def run(self, pipe: DiffusionPipeline) -> xarray.Dataset:
        """Traces the map."""
        return mediation.trace(
            pipe,
            self.cases,
            metric=self.metrics,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            **self._places(pipe),
        )

    def row_evaluations(self, pipe: DiffusionPipeline) -> int:
        """How often the denoiser evaluates a row, at most: by halves of guidance, iterations, draws and cases.

        Raises:
            ValueError: if the map cannot be traced.
        """
        sampling = Sampling(self.num_inference_steps, self.guidance_scale)
        options = {"tokens": None, "windows": None, "mode": "restore", "batch_size": None, "images": None}
        options |= self._places(pipe)
        plan = make_plan(pipe, self.cases, metric=self.metrics, sampling=sampling, progress=False, **options)
        n_steps, n_halves = n_iterations(pipe, self.num_inference_steps), 2 if sampling.guided else 1
        n_evaluations = 0
        for case in self.cases:
            jobs = [one for _, one in plan.interventions(pipe, case)]
            opened = [next(i for i in range(n_steps) if one.covers(i / n_steps)) for one in jobs]
            n_rows = n_computed_rows(len(jobs), plan.batch_size)
            # a row costs nothing before its window opens, and in its first step no unconditional half
            n_shared = n_halves * sum(opened) + (n_halves - 1) * len(jobs)
            n_evaluations += plan.n_draws * (n_halves * n_rows * n_steps - n_shared)
        return n_evaluations

    def _places(self, pipe: DiffusionPipeline) -> dict[str, object]:
        if self.network == "text":
            return {"sites": None, "tokens": TOKENS}
        return {"sites": mediation.sites(pipe, network=family_of(pipe).denoiser)}


def fingerprint(pipe: DiffusionPipeline, judges: Sequence[nn.Module]) -> str:
    """SHA-256 of all weights that make or judge the pictures, and of the scheduler's settings."""
    digest = hashlib.sha256(json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str).encode())
    parts = [getattr(pipe, network) for network in (*tokenizers_of(pipe), family_of(pipe).denoiser, "vae")]
    for module in (*parts, *judges):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {sha256(tensor)}\n".encode())
    return digest.hexdigest()


def pending(tasks: Sequence[Task], folder: pathlib.Path, model: str) -> list[Task]:
    """The tasks whose map is not in the folder.

    Raises:
        ValueError: if a map is there and was made with other arguments.
    """
    missing = []
    for task in tasks:
        path = map_path(task, folder)
        if not path.exists():
            missing.append(task)
        elif open_map(path).attrs.get("arguments") != task.arguments(model):
            raise ValueError(
                f"{path} was made with another model, other cases or other settings: choose another --output, or"
                " move the map away to make it anew"
            )
    return missing


def make(task: Task, pipe: DiffusionPipeline, folder: pathlib.Path, model: str) -> None:
    """Traces a map and saves it; whoever interrupts this leaves no file that looks like a map."""
    effects = task.run(pipe)
    path = map_path(task, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished.nc")
    save_map(effects.assign_attrs(arguments=task.arguments(model)), unfinished)
    unfinished.replace(path)


def map_path(task: Task, folder: pathlib.Path) -> pathlib.Path:
    """The file of a task's map."""
    return folder / f"{task.attribute}.{task.network}.nc"
