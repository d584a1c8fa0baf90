"""Steering trials: is the object where it was put, has the picture the style, the background, that was asked for?

Every trial draws the same pictures by four arms: steered by the concept's latents; by as many other latents that are
active in pictures, drawn at random; along random directions in place of the concept's; and not at all. All steered arms
add as much, relative to what is there.

The strength is chosen by the concept's arm alone, on other pictures, at the stage at which the paper finds the steering
to work, and is used at all stages. Where nothing works there is nothing to choose by: noise would.
"""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy
import scipy.ndimage
import torch
import torch.nn.functional as F
import xarray
from diffusers import DiffusionPipeline

import editing
import mediation
from benchmarks.emoji import world
from benchmarks.emoji.evaluate import generate
from benchmarks.reproduce.report import plain
from benchmarks.reproduce.saes.preparing import OBJECTS, SEEDS, STAGES, Key, Settings
from mediation import bundled
from mediation.bundled.labelling import foreground
from mediation.intervals import nanmean

EXPERIMENTS = ("quadrant", "style", "background")
ARMS = ("concept", "random latents", "random directions", "unsteered")
STRENGTHS = (1.0, 2.0, 4.0, 8.0)  # relative to what the block adds, which is less than what it reads
TUNED_AT = {"quadrant": "early", "style": "middle", "background": "middle"}
N_LATENTS = 5  # that are steered together
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")  # row by row
_LEAST_SHARE = 0.4  # of an object in its quadrant: one in the middle has a quarter in each


@dataclasses.dataclass(frozen=True)
class Trial:
    """Pictures, each with what it should show once it is steered.

    Attributes:
        experiment: one of `EXPERIMENTS`.
        objects: what is drawn.
        targets: quadrants, styles or backgrounds.
        seed: of the first picture; every picture has noise of its own.
        draws: pictures of each object for each target.
    """

    experiment: str
    objects: tuple[str, ...]
    targets: tuple[str, ...]
    seed: int
    draws: int = 1

    @property
    def prompts(self) -> list[str]:
        """One prompt per picture; nothing is said of what is steered."""
        return [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in self.objects * self.draws]

    def first_seed(self, number: int) -> int:
        """The seed of the first picture of the target with this number."""
        return self.seed + number * len(self.prompts)

    def label(self, target: str) -> str:
        """The label of the dictionary whose latents are steered towards a target."""
        return "object" if self.experiment == "quadrant" else f"{self.experiment}: {target}"


def trials(experiment: str, settings: Settings) -> tuple[Trial, Trial]:
    """The trial that a strength is chosen by, and the one that is reported: other objects, other noise."""
    targets = {
        "quadrant": QUADRANTS,
        "style": world.STYLES,
        "background": tuple(name for name in world.BACKGROUNDS if name != "white"),
    }[experiment]
    order = numpy.random.default_rng(SEEDS["steering"]).permutation(OBJECTS).tolist()
    tuned, reported = order[: settings.tuned], order[settings.tuned :][: settings.objects]
    start = 10_000 * SEEDS["steering"]
    return (
        Trial(experiment, tuple(tuned), targets, start),
        Trial(experiment, tuple(reported), targets, start + 1000, settings.draws),
    )


class Studio:
    """Draws the pictures of trials, steered and not."""

    def __init__(self, pipe: DiffusionPipeline, settings: Settings):
        self.settings, self._pipe = settings, pipe
        self._unsteered: dict[tuple[tuple[str, ...], int], torch.Tensor] = {}

    def draw(self, trial: Trial, number: int) -> torch.Tensor:
        """The images in [0, 1] of the target with this number, (picture, 3, height, width)."""
        options = {"steps": self.settings.steps, "guidance_scale": self.settings.guidance_scale}
        return generate(self._pipe, trial.prompts, seed=trial.first_seed(number), **options)

    def unsteered(self, trial: Trial, number: int) -> torch.Tensor:
        """The same without steering, drawn once for whatever is steered."""
        key = (trial.objects, trial.first_seed(number))
        if key not in self._unsteered:
            self._unsteered[key] = self.draw(trial, number)
        return self._unsteered[key]

    def successes(
        self,
        sae: mediation.SparseAutoencoder,
        dictionary: xarray.Dataset,
        trial: Trial,
        stage: tuple[float, float],
        arm: str,
        strength: float,
    ) -> numpy.ndarray:
        """1 where a picture shows its target, by target and picture; NaN where there was no latent to steer by."""
        found = []
        for number, target in enumerate(trial.targets):
            if arm == "unsteered":
                images = self.unsteered(trial, number)
            else:
                used, latents = steered_by(sae, dictionary, trial.label(target), arm, seed=number)
                if not latents:
                    found += [numpy.nan] * len(trial.prompts)
                    continue
                region = target if trial.experiment == "quadrant" else None
                with editing.steer(self._pipe, used, latents, strength=strength, region=region, stage=stage):
                    images = self.draw(trial, number)
            found += [float(shows(image, trial.experiment, target)) for image in images]
        return numpy.array(found)


def run(
    studio: Studio,
    saes: Mapping[Key, mediation.SparseAutoencoder],
    named: Mapping[Key, xarray.Dataset],
    experiment: str,
    block: str,
    folder: pathlib.Path,
    model: str,
) -> dict[str, dict]:
    """Chooses a strength, and reports an experiment at every stage with it; each is found again in its file.

    Args:
        studio: draws.
        saes: the autoencoder of each place.
        named: their dictionaries.
        experiment: which one.
        block: where.
        folder: of the files.
        model: fingerprint of the pipeline.

    Returns:
        By stage: the strength, and successes by arm, (picture,), None where nothing could be steered.

    Raises:
        ValueError: if a file was made with another model or other settings.
    """
    tuning, reported = trials(experiment, studio.settings)
    told = {"model": model, "settings": dataclasses.asdict(studio.settings)}

    def successes(trial: Trial, stage: str, arm: str, strength: float) -> numpy.ndarray:
        key = (block, stage, "cond")
        return studio.successes(saes[key], named[key], trial, STAGES[stage], arm, strength)

    def tune() -> dict:
        stage = TUNED_AT[experiment]
        rates = {one: float(nanmean(successes(tuning, stage, "concept", one), 0)) for one in STRENGTHS}
        # of equal ones the strongest, so that no stage seems without effect for want of strength
        best = max(rates, key=lambda strength: (numpy.nan_to_num(rates[strength]), strength))
        return {"tuning": plain({str(strength): rate for strength, rate in rates.items()}), "strength": best}

    tuned = _made_once(folder / f"{experiment}.{block}.tuning.json", told, tune)
    strength = tuned["strength"]
    records = {}
    for stage in STAGES:

        def report(stage: str = stage) -> dict:
            found = {arm: successes(reported, stage, arm, strength).tolist() for arm in ARMS}
            return {"success": plain(found), "strength": strength}

        path = folder / f"{experiment}.{block}.{stage}.json"
        records[stage] = _made_once(path, told | {"stage": STAGES[stage], "strength": strength}, report)
    return records


def _made_once(path: pathlib.Path, arguments: dict, make: Callable[[], dict]) -> dict:
    """What is in the file, or what is made now and written."""
    described = json.dumps(arguments, sort_keys=True)
    if path.exists():
        record = json.loads(path.read_text())
        if record["arguments"] != described:
            raise ValueError(f"{path} was made with another model or other settings: choose another --output")
        return record
    record = {"arguments": described} | make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    return record


def steered_by(
    sae: mediation.SparseAutoencoder, dictionary: xarray.Dataset, label: str, arm: str, *, seed: int
) -> tuple[mediation.SparseAutoencoder, list[int]]:
    """The autoencoder and the latents that an arm steers by; none if no latent is ever active where the label is."""
    if label not in dictionary.label.values or not (dictionary.iou.sel(label=label) > 0).any():
        return sae, []
    latents = mediation.concept_latents(dictionary, label, k=N_LATENTS)
    if arm == "concept":
        return sae, latents
    rng = numpy.random.default_rng([SEEDS["steering"], seed])
    if arm == "random latents":
        alive = [int(i) for i in numpy.flatnonzero(dictionary.n.values) if int(i) not in latents]
        return sae, rng.choice(alive, min(len(latents), len(alive)), replace=False).tolist()
    if arm == "random directions":
        other = copy.deepcopy(sae)
        directions = torch.from_numpy(rng.normal(size=(len(latents), sae.n_features))).float()
        with torch.no_grad():
            other.decoder[latents] = F.normalize(directions, dim=1)
        return other, latents
    raise ValueError(f"no arm {arm!r}; the arms are {', '.join(ARMS)}")


def shows(image: torch.Tensor, experiment: str, target: str) -> bool:
    """Whether a picture shows the target: its object mainly in a quadrant, or what the probe says of it.

    The object is the largest connected part of what differs from the ground, so that specks elsewhere do not move it.
    """
    if experiment == "quadrant":
        parts, n_parts = scipy.ndimage.label(foreground(image))
        if not n_parts:
            return False
        shown = torch.from_numpy(parts == 1 + numpy.bincount(parts.ravel())[1:].argmax()).float()
        shares = F.adaptive_avg_pool2d(shown[None], 2).flatten() / shown.mean() / 4
        return float(shares[QUADRANTS.index(target)]) > _LEAST_SHARE and int(shares.argmax()) == QUADRANTS.index(target)
    probe = bundled.load_probe()
    seen = probe.probabilities(image[None], experiment)[0].argmax()
    return probe.labels(experiment)[int(seen)] == target
