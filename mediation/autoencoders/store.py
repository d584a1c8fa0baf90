"""A store of activations: several places of the same pictures, in chunks on disk, to train on as often as needed."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.autoencoders.observing import check_prompts, observe, rows_that_fit
from mediation.autoencoders.places import Place
from mediation.autoencoders.sources import choose_prompts, origin
from mediation.sampling import Sampling


def collect_activations(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    path: str | os.PathLike,
    *,
    places: Sequence[Place],
    n_images: int,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Place, object]:
    """Draws pictures, and stores what places compute on the way in a Zarr group; goes on where it was interrupted.

    Args:
        pipe: a diffusers pipeline of a supported family.
        prompts: drawn from at random.
        path: folder of the group. If it is there, it must have been made with the same arguments, of a pipeline with
            the same weights and scheduler, and by the same versions of the software.
        places: what to store; all of them are read in one run.
        n_images: how many pictures.
        seed: of the choice of prompts, and of the noise.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: rows of one call of the pipeline, and of a chunk of the store; None suits the latents' size.
        progress: shows a progress bar on a terminal.

    Returns:
        As `open_activations`.

    Raises:
        ImportError: if zarr is not installed.
        KeyError, ValueError: before any work, if an argument does not fit the pipeline, or the folder was made of
            another one or with other arguments, or holds something else.

    Example:
        >>> import mediation, tempfile
        >>> from mediation import Place
        >>> pipe, places = mediation.load_pipeline(), [Place("unet.mid.0"), Place("unet.up.1.0")]
        >>> options = {"places": places, "n_images": 2, "num_inference_steps": 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arrays = mediation.collect_activations(pipe, ["a cat"], f"{folder}/activations.zarr", **options)
        ...     [array.shape for array in arrays.values()]
        [(32, 192), (128, 128)]
    """
    zarr = _zarr()
    prompts, places = check_prompts(prompts), tuple(places)
    if n_images < 1:
        raise ValueError(f"n_images must be at least 1, got {n_images}")
    if not places or len(set(places)) < len(places):
        raise ValueError("places must hold at least one place, and each once")
    size = rows_that_fit(pipe) if batch_size is None else batch_size
    settings = {
        "places": [place.as_json() for place in places],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "n_prompts": len(prompts),
        "n_images": n_images,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "batch_size": size,
        **origin(pipe),
    }
    settings = json.loads(json.dumps(settings))
    sampling = Sampling(num_inference_steps, guidance_scale)
    observe(pipe, prompts, range(len(prompts)), places, sampling=sampling, batch_size=size)  # checks, and draws nothing
    chosen, seeds = choose_prompts(len(prompts), n_images, seed=seed, stream=0)
    if _is_foreign(zarr, pathlib.Path(path)):
        raise ValueError(f"{path} holds something else than collected activations: choose another path, or remove it")
    group = zarr.open_group(path, mode="a")
    known = group.attrs.get("settings", settings)
    if differing := sorted(name for name in settings if known.get(name) != settings[name]):
        raise ValueError(
            f"{path} was collected from another pipeline, or with other arguments ({', '.join(differing)} differ):"
            " choose another path, or remove it"
        )
    n_done = int(group.attrs.get("n_done", 0))
    if n_done < n_images:
        drawn = [prompts[i] for i in chosen[n_done:]]
        observed = observe(pipe, drawn, seeds[n_done:], places, sampling=sampling, batch_size=size)
        group.attrs["settings"] = settings
        with tqdm(total=n_images, initial=n_done, desc="collecting", disable=None if progress else True) as bar:
            for one in observed:
                for number, place in enumerate(places):
                    _write(group, str(number), one.activations[place], n_done, n_images, size)
                n_done += len(one.prompts)
                group.attrs["n_done"] = n_done  # last, so that an interrupted chunk is written again
                bar.update(len(one.prompts))
    return open_activations(path)


def open_activations(path: str | os.PathLike) -> dict[Place, object]:
    """The arrays of a store by place, each (position, feature), float32; nothing is read yet.

    Raises:
        FileNotFoundError: if there is no store.
        ImportError: if zarr is not installed.
        ValueError: if it is not complete.
    """
    group = _zarr().open_group(path, mode="r")
    settings, n_done = group.attrs.get("settings"), group.attrs.get("n_done", 0)
    if settings is None or n_done < settings["n_images"]:
        raise ValueError(f"{path} is no complete store of activations: collect them with the same arguments again")
    return {Place(**place): group[str(number)] for number, place in enumerate(settings["places"])}


def origin_of(array) -> dict:
    """What a store says of one of its arrays: prompts, counts, seed, sampling, pipeline; {} of any other array."""
    if not (hasattr(array, "store") and hasattr(array, "path")):  # no Zarr
        return {}
    folder, _, name = array.path.rpartition("/")
    if not name.isdecimal():
        return {}
    try:
        settings = dict(_zarr().open_group(array.store, path=folder, mode="r").attrs.get("settings", {}))
    except (FileNotFoundError, ValueError):  # an array in no group
        return {}
    if int(name) >= len(settings.get("places", ())):
        return {}
    return {"place": settings.pop("places")[int(name)]} | settings


def _write(group, name: str, activations, n_done: int, n_images: int, size: int) -> None:
    """Puts the activations (row, step, y, x, feature) of the next rows where they belong."""
    n_positions = activations[0, ..., 0].numel()
    values = activations.flatten(0, -2).numpy()
    if name not in group:
        shape, chunks = (n_images * n_positions, values.shape[1]), (size * n_positions, values.shape[1])
        group.create_array(name, shape=shape, chunks=chunks, dtype="float32")
    start = n_done * n_positions
    group[name][start : start + len(values)] = values


def _is_foreign(zarr, path: pathlib.Path) -> bool:
    """Whether there is something at a path that this module did not begin; an empty folder or group is nothing."""
    if not path.is_dir() or not any(path.iterdir()):
        return path.exists() and not path.is_dir()
    try:
        found = zarr.open(path, mode="r")
    except (FileNotFoundError, ValueError):  # no Zarr at all
        return True
    is_group = isinstance(found, zarr.Group)
    return not is_group or ("settings" not in found.attrs and len(found.attrs) + len(found) > 0)


def _zarr():
    try:
        import zarr
    except ImportError as error:
        raise ImportError('a store of activations needs zarr: pip install "diffusion-mediation[zarr]"') from error
    return zarr
