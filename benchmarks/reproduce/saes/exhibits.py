"""What the gallery shows of an autoencoder: figures with captions, made of pictures that nobody chose.

Nothing is left out because it failed: prompts are captions of the world by their seed, or its first objects, and
targets are all of its kind.
"""

import dataclasses
from collections.abc import Iterator

import matplotlib.figure
import numpy
import torch
import torch.nn.functional as F
import xarray
from diffusers import DiffusionPipeline

import editing
import mediation
from benchmarks.emoji import world
from benchmarks.emoji.evaluate import GUIDANCE_SCALE, generate
from benchmarks.emoji.train_sae import captions
from benchmarks.reproduce.saes import showing, trials
from benchmarks.reproduce.saes.preparing import OBJECTS, SEEDS, STAGES
from benchmarks.reproduce.saes.showing import RIGHT, WRONG, Cell, cell
from mediation import bundled
from mediation.autoencoders.dictionary import label_masks
from mediation.autoencoders.observing import observe
from mediation.autoencoders.places import in_stage
from mediation.autoencoders.prediction import composition_iou
from mediation.autoencoders.tally import agreement
from mediation.sampling import Sampling

STRENGTHS = (-1.0, *trials.STRENGTHS)  # against the concept too
COMPOSITION = ("object", "background")  # the labels of `bundled.label_composition`
_BACKGROUNDS = tuple(name for name in world.BACKGROUNDS if name != "white")  # which pictures have anyway

Exhibits = Iterator[tuple[str, matplotlib.figure.Figure, str]]  # name, figure, caption


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is drawn.

    Attributes:
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        labelled: pictures that dictionaries are made from.
        predicted: pictures whose layout is predicted.
        objects: that are steered, the first of the world's.
        strength: of steering into quadrants.
    """

    steps: int = 25
    guidance_scale: float = GUIDANCE_SCALE
    labelled: int = 150
    predicted: int = 6
    objects: int = 2
    strength: float = 8.0  # as the trials of the claims chose

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def sampling(self) -> dict[str, int | float]:
        """How pictures are sampled."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}


def exhibits(
    pipe: DiffusionPipeline, sae: mediation.SparseAutoencoder, dictionary: xarray.Dataset, settings: Settings
) -> Exhibits:
    """All figures of an autoencoder; what cannot be drawn for want of latents is left out."""
    yield from best_latents(dictionary)
    yield all_latents(dictionary)
    yield layouts(pipe, sae, dictionary, settings)
    yield from quadrants(pipe, sae, dictionary, settings)
    for factor, targets in (("style", world.STYLES), ("background", _BACKGROUNDS)):
        yield from strengths(pipe, sae, dictionary, settings, factor, targets)


def best_latents(dictionary: xarray.Dataset) -> Exhibits:
    """Three good latents of each kind of label, and a poor one, with the pictures in which they are most active."""
    rows = {kind: [_strip(own, scores) for scores in ranked(own)[:3]] for kind, own in by_kind(dictionary).items()}
    rows |= {"a poor one": [_strip(dictionary, scores) for scores in ranked(dictionary)[-1:]]}
    rows = {kind: cells for kind, cells in rows.items() if cells}
    caption = (
        "Latents with the largest IoU of each kind of label on even pictures, with IoU (chance IoU) on odd ones, and"
        " the pictures in which each is most active, dark where it is silent; last, the named one with the smallest."
    )
    if rows:
        yield "latents", showing.sheet(rows, width=2.6), caption


def all_latents(dictionary: xarray.Dataset) -> tuple[str, matplotlib.figure.Figure, str]:
    """IoU and chance IoU of every latent that has a label of a kind."""
    points = {}
    for kind, own in by_kind(dictionary).items():
        scores = mediation.score_latents(own)
        scores = scores.isel(latent=(scores.label != "").values)
        points[f"{kind}: {scores.sizes['latent']} latents"] = (scores.chance_iou.fillna(0).values, scores.iou.values)
    caption = "IoU of every latent with its label, over the same with masks of other pictures; the line is chance."
    return "chance", showing.beside_chance(points), caption


def by_kind(dictionary: xarray.Dataset) -> dict[str, xarray.Dataset]:
    """The dictionary of each kind of label; those without a kind are the composition's."""
    labels = dictionary.label.values.tolist()
    kinds = [one.partition(": ")[0] if ": " in one else "composition" for one in labels]
    return {kind: dictionary.isel(label=[k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}


def ranked(dictionary: xarray.Dataset) -> list[xarray.Dataset]:
    """Scores of each latent that has a label, the best first: by even pictures, while scores are of odd ones."""
    scores = mediation.score_latents(dictionary)
    known = agreement(dictionary.isel(fold=0, drop=True))["iou"].max("label").where(scores.label != "")
    order = numpy.argsort(-known.values, kind="stable")  # NaN last
    return [scores.isel(latent=int(i)) for i in order if not numpy.isnan(known.values[i])]


def layouts(
    pipe: DiffusionPipeline, sae: mediation.SparseAutoencoder, dictionary: xarray.Dataset, settings: Settings
) -> tuple[str, matplotlib.figure.Figure, str]:
    """Finished pictures, the layouts predicted of them, and those that they have."""
    prompts, seed = captions(settings.predicted, seed=SEEDS["layout"]), first_seed("layout")
    options = {"labels": COMPOSITION, "seed": seed, **settings.sampling}
    predicted = mediation.predict_layout(pipe, sae, dictionary, prompts, **options)
    sampling = Sampling(settings.steps, settings.guidance_scale)
    seeds = range(seed, seed + len(prompts))
    drawn = torch.cat([one.images for one in observe(pipe, prompts, seeds, [], sampling=sampling, with_images=True)])
    rows: dict[str, list[Cell]] = {"finished": [], "predicted": [], "its layout": []}
    found = {"own": [], "chance": []}
    for i, (prompt, image) in enumerate(zip(prompts, drawn, strict=True)):
        masks = label_masks(bundled.label_composition, image)
        for name, used in (("own", i), ("chance", i - 1)):
            found[name].append(composition_iou(torch.from_numpy(predicted.score[used].values), COMPOSITION, masks))
        rows["finished"].append(cell(image, prompt))
        objects = predicted.layout[i].values == COMPOSITION.index("object")
        rows["predicted"].append(Cell(objects, f"mIoU {found['own'][-1]:.2f} ({found['chance'][-1]:.2f})"))
        rows["its layout"].append(Cell(masks["object"].numpy()))
    caption = (
        f"Where objects will be, in white, predicted at t={', '.join(f'{t:g}' for t in sae.place.steps)}, beside the"
        " finished picture and its layout, with mIoU (by the latents of the picture before); the means are"
        f" {numpy.mean(found['own']):.2f} ({numpy.mean(found['chance']):.2f})."
    )
    return "layouts", showing.sheet(rows, width=1.3), caption


def quadrants(
    pipe: DiffusionPipeline, sae: mediation.SparseAutoencoder, dictionary: xarray.Dataset, settings: Settings
) -> Exhibits:
    """Objects put into each quadrant by the concept's latents, by random ones, and along random directions."""
    trial = trials.Trial("quadrant", OBJECTS[: settings.objects], trials.QUADRANTS, first_seed("steering"))
    plain = _draw(pipe, trial, settings)
    rows, counts = {}, {}
    for arm in trials.ARMS[:-1]:
        grid = [[cell(image, "unsteered")] for image in plain]
        for number, target in enumerate(trial.targets):
            used, latents = trials.steered_by(sae, dictionary, trial.label(target), arm, seed=number)
            if not latents:
                return
            options = {"strength": settings.strength, "region": target, "stage": stage_of(sae)}
            with editing.steer(pipe, used, latents, **options):
                images = _draw(pipe, trial, settings)
            for line, image in zip(grid, images, strict=True):
                is_there = trials.shows(image, "quadrant", target)
                line.append(cell(image, "in it" if is_there else "not in it", RIGHT if is_there else WRONG))
        cells = [one for line in grid for one in line[1:]]
        counts[arm] = f"{sum(one.color == RIGHT for one in cells)} of {len(cells)} by {arm}"
        rows |= {f"{name}, {arm}": line for name, line in zip(trial.objects, grid, strict=True)}
    rows = {name: rows[name] for name in sorted(rows, key=lambda name: trial.objects.index(name.split(", ")[0]))}
    caption = (
        f"An object put into each quadrant at t in {stage_of(sae)}, strength {settings.strength:g} for all; in the"
        f" quadrant are {', '.join(counts.values())}."
    )
    yield "quadrants", showing.sheet(rows, ("", *trial.targets)), caption


def strengths(
    pipe: DiffusionPipeline,
    sae: mediation.SparseAutoencoder,
    dictionary: xarray.Dataset,
    settings: Settings,
    factor: str,
    targets: tuple[str, ...],
) -> Exhibits:
    """One object steered everywhere towards each style, or background, by strength, with the probe's verdict."""
    trial = trials.Trial(factor, OBJECTS[:1], targets, first_seed("steering"))
    plain = _draw(pipe, trial, settings)[0]
    columns = sorted((*STRENGTHS, 0.0))
    rows, missing, hits = {}, [], dict.fromkeys(columns, 0)
    for target in targets:
        _, latents = trials.steered_by(sae, dictionary, trial.label(target), "concept", seed=0)
        if not latents:
            missing.append(target)
            continue
        rows[target] = []
        for strength in columns:
            if strength:
                with editing.steer(pipe, sae, latents, strength=strength, stage=stage_of(sae)):
                    image = _draw(pipe, trial, settings)[0]
            else:
                image = plain
            seen, probability = verdict(image, factor)
            hits[strength] += seen == target
            rows[target].append(cell(image, f"{seen} {probability:.0%}", RIGHT if seen == target else WRONG))
    if rows:
        counts = ", ".join(f"{hits[strength]} at {strength:g}" for strength in columns)
        caption = (
            f"{trial.prompts[0].capitalize()}, steered everywhere at t in {stage_of(sae)} towards each {factor}, by"
            f" strength, and what the probe says; of {len(rows)}, as wanted are {counts}."
            + (f" No latents are known for {', '.join(missing)}." if missing else "")
        )
        yield factor, showing.sheet(rows, [f"{strength:g}" for strength in columns]), caption


def verdict(image: torch.Tensor, factor: str) -> tuple[str, float]:
    """What the probe sees in a picture (3, height, width), and how probable that is."""
    probe = bundled.load_probe()
    (found,) = probe.probabilities(F.interpolate(image[None], (64, 64), mode="area"), factor)
    return str(probe.labels(factor)[int(found.argmax())]), float(found.max())


def stage_of(sae: mediation.SparseAutoencoder) -> tuple[float, float]:
    """The stage that an autoencoder's first step is in.

    Example:
        >>> stage_of(mediation.SparseAutoencoder(4, 8, k=2, place=mediation.Place("unet.mid.0", (0.5,))))
        (0.2, 0.6)
    """
    return next(span for span in STAGES.values() if in_stage(span, sae.place.steps[0]))


def first_seed(of: str) -> int:
    """Of the noise of pictures that dictionaries are made from, whose layout is predicted, or that are steered."""
    return 10_000 * SEEDS[of]


def _draw(pipe: DiffusionPipeline, trial: trials.Trial, settings: Settings) -> torch.Tensor:
    """The same pictures, whatever steers them."""
    return generate(pipe, trial.prompts, seed=trial.seed, steps=settings.steps, guidance_scale=settings.guidance_scale)


def _strip(dictionary: xarray.Dataset, scores: xarray.Dataset) -> Cell:
    told = f"{scores.label.item()}: {float(scores.iou):.2f} ({float(scores.chance_iou.fillna(0)):.2f})"
    return Cell(numpy.asarray(mediation.top_strip(dictionary, int(scores.latent))), f"{int(scores.latent)}, {told}")
