"""What CAD's scores predict of J, and what happens to J, when weights are set to 0.

Weights are taken at random, layer by layer, and where scores or controls say.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy
import torch
import xarray
from diffusers import DiffusionPipeline
from tqdm import tqdm

import editing
import mediation
from benchmarks.reproduce.attributions.recipes import CONCEPTS, OBJECTIVES, RATIOS, named
from editing.ablation import CONTROLS, control
from mediation.objectives import Objective, amplify_objective, erase_objective
from mediation.parameters import locate
from mediation.sampling import Sampling

MAIN = 0.01  # share of the weights in the ablations that the claim is about
OTHERS = (0.001, 0.1)  # reported beside it, from a fifth as many
N_LATENTS = 5  # of one trajectory, that J is the mean over
_SCORED = "unet.*"  # single layers are of every kind; all other ablations are of feed-forwards, as in the paper
_SEED = 0

Places = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is predicted.

    Attributes:
        concept: its name.
        prompt: what the denoiser reads.
        objective: erase or amplify.
        n_random: share of weights -> how many ablations of as many weights at random.
        n_latents: of one trajectory of as many steps, that J is the mean over.
    """

    concept: str
    prompt: str
    objective: str
    n_random: Mapping[float, int]
    n_latents: int = N_LATENTS

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.objective} {self.concept}"

    def describe(self) -> dict:
        """All that decides on the result, but for the model, as plain JSON."""
        random = {f"{share:g}": n for share, n in self.n_random.items()}
        return dataclasses.asdict(self) | {"n_random": random, "ratios": list(RATIOS), "seed": _SEED}

    def run(self, pipe: DiffusionPipeline) -> xarray.Dataset:
        """Ablates, one after the other.

        Returns:
            A Dataset over `ablation`: kind (random, layer or top), label (share, site, or scores with their ratio),
            n_weights; squares, of those weights, summed; predicted, the change of J by the scores; shuffled, the same
            by scores of other weights of the same matrices; actual. The attribute `value` is J before.
        """
        found, objective = self._scored(pipe)
        others, before = control(found, "random").scores, objective.value(pipe)
        if not math.isclose(before, found.metadata["value"], rel_tol=1e-3):
            raise RuntimeError(f"scores are of another J, {found.metadata['value']}, than what is measured, {before}")
        squares = {name: weight.float().square() for name, weight in found.weights.items()}
        n_sites = len(set(found.sites.values()))
        n_ablations = sum(self.n_random.values()) + n_sites + len(RATIOS) * (1 + len(CONTROLS))
        rows = []
        for kind, label, places in tqdm(self._ablations(found), total=n_ablations, desc=self.name, disable=None):
            with ablated(pipe, places):
                after = objective.value(pipe)
            n_weights = sum(map(len, places.values()))
            changes = (-_sum(found.scores, places), -_sum(others, places), after - before)
            rows.append((kind, label, n_weights, _sum(squares, places), *changes))
        names = ("kind", "label", "n_weights", "squares", "predicted", "shuffled", "actual")
        columns = zip(names, zip(*rows, strict=True), strict=True)
        dataset = xarray.Dataset({name: ("ablation", numpy.array(values)) for name, values in columns})
        return dataset.set_coords(["kind", "label"]).assign_attrs(name=self.name, value=before)

    def _scored(self, pipe: DiffusionPipeline) -> tuple[mediation.Attribution, Objective]:
        """Scores, and the J that they are of."""
        sampling = Sampling(self.n_latents, guidance_scale=3.0)
        found = mediation.attribute(
            pipe,
            self.prompt,
            objective=self.objective,
            parameters=_SCORED,
            seeds=_SEED,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )
        options = {"seeds": [_SEED], "sampling": sampling, "batch_size": 16, "progress": False}
        if self.objective == "erase":
            return found, erase_objective(pipe, self.prompt, "", **options)
        return found, amplify_objective(pipe, self.prompt, None, **options)

    def _ablations(self, found: mediation.Attribution) -> Iterator[tuple[str, str, Places]]:
        inner = feed_forwards(found)
        generator = torch.Generator().manual_seed(_SEED)
        for share, n in self.n_random.items():
            for _ in range(n):
                yield "random", f"{share:g}", random_places(inner, share, generator)
        for site in dict.fromkeys(found.sites.values()):
            names = [name for name, own in found.sites.items() if own == site]
            yield "layer", site.name, {name: torch.arange(found.scores[name].numel()) for name in names}
        ablate = editing.cad_erase if self.objective == "erase" else editing.cad_amplify
        for ratio in RATIOS:
            for scores in ("cad", *CONTROLS):
                edit = ablate(inner if scores == "cad" else control(inner, scores), ratio=ratio, per="model")
                yield "top", named(scores, ratio), {name: update.indices for name, update in edit.updates.items()}


def questions(n_random: int) -> list[Question]:
    """Every concept with every objective, and this many random ablations of the `MAIN` share."""
    n_ablations = {MAIN: n_random} | dict.fromkeys(OTHERS, max(10, n_random // 5))
    return [Question(one.name, one.prompt, objective, n_ablations) for one in CONCEPTS for objective in OBJECTIVES]


def feed_forwards(found: mediation.Attribution) -> mediation.Attribution:
    """The scores of feed-forwards alone."""
    names = [name for name, site in found.sites.items() if site.component == "feed_forward"]
    parts = ("scores", "weights", "sites", "base")
    return dataclasses.replace(found, **{part: {name: getattr(found, part)[name] for name in names} for part in parts})


def random_places(found: mediation.Attribution, share: float, generator: torch.Generator) -> Places:
    """Ascending places, by parameter, of a share of all weights that were scored, each as likely as any other."""
    sizes = {name: score.numel() for name, score in found.scores.items()}
    total = sum(sizes.values())
    drawn = torch.randperm(total, generator=generator)[: max(1, round(share * total))].sort().values
    places, start = {}, 0
    for name, size in sizes.items():
        places[name] = drawn[(drawn >= start) & (drawn < start + size)] - start
        start += size
    return {name: indices for name, indices in places.items() if len(indices)}


@contextlib.contextmanager
def ablated(pipe: DiffusionPipeline, places: Places) -> Iterator[None]:
    """Sets these weights to 0 for a while; an edit would fingerprint whole matrices, each of thousands of times."""
    flat = {name: getattr(*locate(pipe, name)).detach().view(-1) for name in places}
    kept = {name: flat[name][indices] for name, indices in places.items()}
    try:
        for name, indices in places.items():
            flat[name][indices] = 0
        yield
    finally:
        for name, indices in places.items():
            flat[name][indices] = kept[name]


def _sum(values: Mapping[str, torch.Tensor], places: Places) -> float:
    return sum(float(values[name].flatten()[indices].double().sum()) for name, indices in places.items())
