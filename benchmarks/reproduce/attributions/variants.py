"""Maps of the same cases, measured and estimated: each is made once, and found again."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import xarray
from diffusers import DiffusionPipeline

import mediation
from benchmarks.reproduce import maps, tracing
from benchmarks.reproduce.attributions.fidelity import over_steps
from mediation.mapfiles import open_map
from mediation.sampling import n_iterations

# points at which gradients are taken: without integration, and with
POINTS = (1, 3)
STEPS, SITES, TOKENS = "sites of the U-Net, by step", "sites of the U-Net", "sites of the text encoder, by token"


@dataclasses.dataclass(frozen=True)
class Variant(maps.Task):
    """A map, measured or estimated: of the denoiser's sites at each step, or of the text encoders' sites at tokens.

    Attributes:
        integrated: points at which gradients are taken, as of `mediation.trace`; 0 restores exactly.
    """

    integrated: int = 0

    @classmethod
    def of(cls, task: maps.Task, integrated: int) -> "Variant":
        """The same cases and sites."""
        values = {field.name: getattr(task, field.name) for field in dataclasses.fields(maps.Task)}
        return cls(**values, integrated=integrated)

    @property
    def way(self) -> str:
        """How the map is made: exact, estimated or integrated."""
        return {0: "exact", 1: "estimated"}.get(self.integrated, "integrated")

    def arguments(self, model: str) -> str:
        """All that decides the values of the map, as JSON; `model` is a fingerprint."""
        values = json.loads(super().arguments(model))
        values |= {"integrated": self.integrated, "windows": self._windows.get("windows")}
        return json.dumps(values, sort_keys=True)

    def run(self, pipe: DiffusionPipeline) -> xarray.Dataset:
        """Traces the map, or estimates it."""
        if not self.integrated:
            return super().run(pipe)
        return mediation.trace(
            pipe,
            self.cases,
            backend="attribution_patching",
            integrated=self.integrated,
            metric=self.metrics,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            **self._places(pipe),
        )

    def row_evaluations(self, pipe: DiffusionPipeline) -> int:
        """How often the denoiser evaluates a row, where the way back through a row counts as two evaluations."""
        if not self.integrated:
            return super().row_evaluations(pipe)
        n_runs = sum(case.corruption.draws for case in self.cases)
        # Every step is computed again for each metric, and beside it, for the denoiser's sites, that of the other run.
        n_beside = 1 if self.network == "denoiser" else 0
        n_rows = 1 + self.integrated + len(self.metrics) * (n_beside + 3 * self.integrated)
        return (2 if self.guidance_scale > 1 else 1) * n_iterations(pipe, self.num_inference_steps) * n_runs * n_rows

    @property
    def _windows(self) -> dict[str, str]:
        return {"windows": "each"} if self.network == "denoiser" else {}

    def _places(self, pipe: DiffusionPipeline) -> dict[str, object]:
        return super()._places(pipe) | self._windows


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """Maps of one attribute's cases over the same places.

    Attributes:
        places: what the places are.
        attribute: the attribute.
        exact: the map that was measured.
        estimates: "estimated" and "integrated" -> the map.
    """

    places: str
    attribute: str
    exact: xarray.Dataset
    estimates: Mapping[str, xarray.Dataset]


def make_tasks(
    pipe: DiffusionPipeline,
    attributes: Sequence[str] | None,
    *,
    n_cases: int,
    draws: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> tuple[list[maps.Task], str]:
    """The maps that `benchmarks.reproduce.tracing` makes of the emoji world, and the fingerprint of what makes them."""
    options = argparse.Namespace(
        attributes=attributes,
        cases_per_attribute=n_cases,
        draws=draws,
        steps=num_inference_steps,
        guidance_scale=guidance_scale,
        cases=None,
        scorer=None,
    )
    return tracing.make_tasks(pipe, options)


def traced(pipe: DiffusionPipeline, task: maps.Task, folder: pathlib.Path | None) -> xarray.Dataset | None:
    """The map of a task's sites that `benchmarks.reproduce.tracing` made, of all its cases; None if there is none.

    Raises:
        ValueError: if it was made with another model or other settings than the task's, but for the number of cases.
    """
    path = None if folder is None else maps.map_path(task, folder)
    if path is None or not path.exists():
        return None
    effects = open_map(path)
    same, model = make_tasks(
        pipe,
        [task.attribute],
        n_cases=effects.sizes["case"],
        draws=effects.sizes["draw"],
        num_inference_steps=task.num_inference_steps,
        guidance_scale=task.guidance_scale,
    )
    (wanted,) = (one.arguments(model) for one in same if one.network == task.network)
    if effects.attrs.get("arguments") != wanted:
        raise ValueError(f"{path} was made with another model or other settings: pass other --maps, or make it anew")
    return effects


def collect(
    pipe: DiffusionPipeline,
    tasks: Sequence[maps.Task],
    model: str,
    folder: pathlib.Path,
    traced_folder: pathlib.Path | None,
) -> list[Compared]:
    """Makes what is not in `folder`, and puts estimates beside exact maps.

    Args:
        pipe: the pipeline.
        tasks: from `make_tasks`.
        model: likewise.
        folder: of the maps that are made here.
        traced_folder: of those that `benchmarks.reproduce.tracing` made; what is not there is not compared.

    Raises:
        ValueError: before any work, if a map is there and was made for something else.
    """
    chosen, whole = [], {}
    for task in tasks:
        effects = traced(pipe, task, traced_folder)
        if effects is not None:
            whole[task.attribute, task.network] = first_cases(effects, task)
        if task.network == "denoiser":
            chosen += [Variant.of(task, points) for points in (0, *POINTS)]
        elif effects is not None:
            chosen += [Variant.of(task, points) for points in POINTS]
    ways = {way: [one for one in chosen if one.way == way] for way in dict.fromkeys(one.way for one in chosen)}
    for way, ones in ways.items():
        maps.pending(ones, folder / way, model)  # which raises, before any of them is made
    for way, ones in ways.items():
        print(f"{way} maps", flush=True)
        tracing.make_maps(pipe, ones, folder / way, model)
    found = []
    for task in tasks:
        made = {
            one.way: open_map(maps.map_path(one, folder / one.way))
            for one in chosen
            if (one.attribute, one.network) == (task.attribute, task.network)
        }
        if task.network == "denoiser":
            found.append(Compared(STEPS, task.attribute, made.pop("exact"), made))
            made = {way: over_steps(effects) for way, effects in made.items()}
        if (task.attribute, task.network) in whole:
            places = SITES if task.network == "denoiser" else TOKENS
            found.append(Compared(places, task.attribute, whole[task.attribute, task.network], made))
    return found


def first_cases(effects: xarray.Dataset, task: maps.Task) -> xarray.Dataset:
    """The part of a traced map that is of a task's cases and draws, which are the first of their attribute.

    Raises:
        ValueError: if the map has fewer.
    """
    wanted = {"case": len(task.cases), "draw": task.cases[0].corruption.draws}
    for dim, size in wanted.items():
        if effects.sizes[dim] < size:
            raise ValueError(
                f"the traced map of {task.attribute} has {effects.sizes[dim]} {dim}s, and {size} are asked for: choose"
                " fewer, or trace more"
            )
    return effects.isel({dim: slice(size) for dim, size in wanted.items()})
