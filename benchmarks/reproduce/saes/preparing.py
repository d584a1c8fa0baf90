"""What the experiments need: activations, an autoencoder for each place, and its dictionary; each is made once."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy
import torch
import torch.nn.functional as F
import xarray
from diffusers import DiffusionPipeline

import mediation
from benchmarks.emoji import world
from benchmarks.emoji.evaluate import GUIDANCE_SCALE
from benchmarks.emoji.train_sae import captions
from mediation import bundled
from mediation.autoencoders.files import open_dictionary, save_dictionary

BLOCKS = {"down": "unet.down.1.0", "mid": "unet.mid.0", "up": "unet.up.1.0"}
# t above start and up to stop, and the step at which the autoencoder of the stage is trained
STAGES = {"early": (0.6, 1.0), "middle": (0.2, 0.6), "final": (0.0, 0.2)}
STEPS = {"early": 1.0, "middle": 0.5, "final": 0.0}
BRANCHES = ("cond", "uncond")
OBJECTS = tuple(name for name in world.OBJECTS if name != "grapes")  # which come in bunches
# captions that activations, dictionaries, layouts and steering are judged by: none in common but by chance
Key = tuple[str, str, str]  # block, stage, branch
_N_HELD_OUT = 2000  # positions
SEEDS = {"training": 0, "dictionary": 1, "layout": 2, "steering": 3}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        images: pictures whose activations are stored.
        positions: that each autoencoder is trained on.
        k: latents that are active at a position.
        labelled: pictures that dictionaries are made from.
        watched: pictures whose layout is predicted.
        tuned: objects that are drawn for each target to choose a strength by.
        objects: other objects that are drawn for each target, and reported.
        draws: pictures of each of these, from noise of their own.
    """

    steps: int = 10
    guidance_scale: float = GUIDANCE_SCALE
    images: int = 4000
    positions: int = 1_000_000
    k: int = 10
    labelled: int = 400
    watched: int = 200
    tuned: int = 6
    objects: int = 12
    draws: int = 1

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.tuned + self.objects > len(OBJECTS):
            raise ValueError(f"the world has {len(OBJECTS)} objects, fewer than {self.tuned} and {self.objects}")

    @property
    def sampling(self) -> dict[str, int | float]:
        """How whatever observes a pipeline samples."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}


def places(blocks: Sequence[str]) -> dict[Key, mediation.Place]:
    """Every place of some blocks."""
    return {
        (block, stage, branch): mediation.Place(BLOCKS[block], (STEPS[stage],), branch)
        for block in blocks
        for stage in STAGES
        for branch in BRANCHES
    }


def label(image: torch.Tensor) -> dict:
    """Masks by object, style and background, and of "object" and "background" whichever they are."""
    return bundled.label_emoji(image) | bundled.label_composition(image)


def autoencoders(
    pipe: DiffusionPipeline, blocks: Sequence[str], settings: Settings, folder: pathlib.Path, model: str
) -> dict[Key, mediation.SparseAutoencoder]:
    """An autoencoder for each place, trained on the same pictures.

    Args:
        pipe: the pipeline.
        blocks: names of blocks.
        settings: how much is done.
        folder: where activations and autoencoders are kept.
        model: fingerprint of the pipeline.

    Raises:
        ValueError: if something in the folder was made with another model or other settings.
    """
    told, found = _told(settings, model, "steps", "guidance_scale", "images", "positions", "k"), {}
    wanted = {key: folder / "autoencoders" / ".".join(key) for key in places(blocks)}
    if not all(_is_made(path, told) for path in wanted.values()):
        arrays = mediation.collect_activations(
            pipe,
            captions(settings.images, seed=SEEDS["training"]),
            _store(folder, blocks),
            places=list(places(blocks).values()),
            n_images=settings.images,
            **settings.sampling,
        )
    for key, place in places(blocks).items():
        if not _is_made(wanted[key], told):
            checkpoint = wanted[key] / "training.safetensors"
            sae = mediation.fit_sae(
                arrays[place],
                place=place,
                k=settings.k,
                recipe=mediation.Recipe(n_positions=settings.positions, max_gradient_norm=None),  # as was published
                checkpoint=checkpoint,
            )
            sae.save_pretrained(wanted[key])
            checkpoint.unlink()
            (wanted[key] / "made.json").write_text(told)
        found[key] = mediation.SparseAutoencoder.from_pretrained(wanted[key])
    return found


def explained_by_random(blocks: Sequence[str], settings: Settings, folder: pathlib.Path) -> dict[Key, float]:
    """The variance that random directions explain at each place, as `explained_along` has it, of held-out activations.

    Args:
        blocks: names of blocks, as of `autoencoders`, which must have run.
        settings: how much is done.
        folder: where activations are kept.
    """
    arrays, found = mediation.open_activations(_store(folder, blocks)), {}
    for number, (key, place) in enumerate(places(blocks).items()):
        held_out = torch.from_numpy(numpy.asarray(arrays[place][-_N_HELD_OUT:], dtype=numpy.float32))
        n_latents = mediation.SparseAutoencoder.from_pretrained(folder / "autoencoders" / ".".join(key)).n_latents
        directions = torch.randn(n_latents, held_out.shape[1], generator=torch.Generator().manual_seed(number))
        found[key] = explained_along(F.normalize(directions, dim=1), held_out, settings.k)
    return found


def explained_along(directions: torch.Tensor, activations: torch.Tensor, k: int) -> float:
    """The variance that k directions explain at each position: those that are most along it, by least squares.

    Args:
        directions: (direction, feature), of norm 1.
        activations: (position, feature).
        k: directions at each position.

    Example:
        >>> explained_along(torch.eye(3), torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), k=3)
        1.0
    """
    x = (activations - activations.mean(0)).double()
    chosen = directions.double()[(x @ directions.double().T).topk(k).indices].mT
    missed = x - (chosen @ torch.linalg.lstsq(chosen, x[..., None]).solution)[..., 0]
    return 1 - float(missed.square().sum() / x.square().sum())


def dictionaries(
    pipe: DiffusionPipeline,
    saes: Mapping[Key, mediation.SparseAutoencoder],
    settings: Settings,
    folder: pathlib.Path,
    model: str,
) -> dict[Key, xarray.Dataset]:
    """The dictionary of each autoencoder; else as `autoencoders`."""
    told = _told(settings, model, "steps", "guidance_scale", "images", "positions", "k", "labelled")
    paths = {key: folder / "dictionaries" / f"{'.'.join(key)}.nc" for key in saes}
    missing = [key for key in saes if not paths[key].exists()]
    if missing:
        made = mediation.concept_dictionaries(
            pipe,
            [saes[key] for key in missing],
            captions(settings.labelled, seed=SEEDS["dictionary"]),
            label,
            seed=10_000 * SEEDS["dictionary"],
            n_top=min(4, settings.labelled),
            **settings.sampling,
        )
        (folder / "dictionaries").mkdir(parents=True, exist_ok=True)
        for key, dictionary in zip(missing, made, strict=True):
            unfinished = paths[key].with_suffix(".unfinished.nc")
            save_dictionary(dictionary.assign_attrs(arguments=told), unfinished)
            unfinished.replace(paths[key])
    found = {key: open_dictionary(path) for key, path in paths.items()}
    for key, dictionary in found.items():
        if dictionary.attrs.get("arguments") != told:
            raise ValueError(f"{paths[key]} was made with another model or other settings: choose another --output")
    return found


def layouts(
    pipe: DiffusionPipeline,
    saes: Mapping[Key, mediation.SparseAutoencoder],
    named: Mapping[Key, xarray.Dataset],
    settings: Settings,
) -> xarray.Dataset:
    """What all autoencoders explain of other pictures, and show of their layouts."""
    prompts = captions(settings.watched, seed=SEEDS["layout"])
    found = mediation.emergence(
        pipe,
        list(saes.values()),
        [named[key] for key in saes],
        prompts,
        bundled.label_composition,
        seed=10_000 * SEEDS["layout"],
        **settings.sampling,
    )
    blocks, stages, _ = zip(*saes, strict=True)
    return found.assign_coords(block=("autoencoder", list(blocks)), stage=("autoencoder", list(stages)))


def _store(folder: pathlib.Path, blocks: Sequence[str]) -> pathlib.Path:
    return folder / f"activations.{'+'.join(blocks)}.zarr"


def _is_made(folder: pathlib.Path, told: str) -> bool:
    path = folder / "made.json"
    if path.exists() and path.read_text() != told:
        raise ValueError(f"{folder} was made with another model or other settings: choose another --output")
    return path.exists()


def _told(settings: Settings, model: str, *names: str) -> str:
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name in names}
    return json.dumps({"model": model, "settings": values}, sort_keys=True)
