"""What an edit does to pictures: every prompt of a suite drawn without and with it, from the same noise."""

import contextlib
import dataclasses
import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy
import torch
import xarray
from diffusers import DiffusionPipeline
from tqdm import tqdm

from editing.edit import Edit
from editing.judging import JUDGES, Judge
from editing.suites import Suite, Trial
from mediation import bundled
from mediation.distances import LPIPS
from mediation.metrics import ClassProbability, CLIPScore
from mediation.parameters import digest
from mediation.pipelines import family_of, quiet
from mediation.provenance import provenance

UNEDITED = "unedited"


def evaluate(
    pipe: DiffusionPipeline,
    edit: Edit | Mapping[str, Edit],
    suite: Suite | Iterable[Trial],
    *,
    seeds: int | Sequence[int] = 0,
    classifiers: Mapping[str, ClassProbability] | None = None,
    scorer: CLIPScore | None = None,
    lpips: LPIPS | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    keep_images: bool = False,
    unedited: xarray.Dataset | None = None,
    progress: bool = True,
) -> xarray.Dataset:
    """Draws a suite with the plain and with the edited pipeline, and judges every picture.

    Args:
        pipe: the pipeline; it is edited for a while, and left as it was.
        edit: one edit, or several by name, which share the unedited pictures.
        suite: what to draw.
        seeds: each prompt is drawn once from each, by every model, from noise that depends on the seed and the prompt's
            place in the suite; `noise_seed` in the result has the number that seeds the pipeline's generator.
        classifiers: factor -> classifier with its labels, for the factors that trials name. None is the bundled probe
            for the bundled pipeline, and nothing for others.
        scorer: compares pictures with texts; None likewise.
        lpips: measures how far pictures are from the unedited model's as people see it; None leaves this out.
        num_inference_steps: of the pipeline's scheduler.
        guidance_scale: of classifier-free guidance.
        batch_size: pictures drawn together; it changes them in their last digits.
        keep_images: keeps pictures and final latents in the result, for `plot_sheet` and for `unedited`.
        unedited: an earlier result with images for the same suite, seeds, sampling and weights, by the same judges, of
            which reports have digests; its unedited pictures are taken over, with all that was said of them, and not
            drawn again.
        progress: shows a progress bar in interactive runs.

    Returns:
        A Dataset over (trial, seed, model), where model is "unedited", and then "edited" or the edits' names:

        - label: what the classifier sees; is_source and is_target, whether that is the label which the prompt asks for,
          and the one which it should have with the edit; NaN where nothing is classified or no target named;
        - source_score and target_score: CLIPScore with the prompt, and with the target prompt;
        - latent_distance: root mean square distance of the final latents from the unedited model's;
        - lpips: distance of the picture from the unedited model's, both rounded to 8 bits, if it was asked for;
        - images, (…, y, x, channel), 8 bits, and latents, (…, latent_channel, latent_y, latent_x), if kept.

        What has no classifier or scorer is left out. `summarize_evaluation` has intervals.

    Raises:
        RuntimeError: if an edit is already applied to the pipeline.
        ValueError: if there are no seeds or one is there twice, or a trial's factor has no classifier, or a classifier
            does not know its labels, or names clash, or an edit is for another pipeline, or `unedited` was made for
            something else or judged by others.

    Example:
        >>> import editing, mediation
        >>> pipe = mediation.load_pipeline()
        >>> edit = editing.quickfix(pipe, {"ink": "noto"})
        >>> suite = editing.emoji_suite({"ink": "noto"}, n=1)
        >>> report = editing.evaluate(pipe, edit, suite, num_inference_steps=1)
        >>> report.is_source.dims, report.model.values.tolist()
        (('trial', 'seed', 'model'), ['unedited', 'edited'])
    """
    trials = tuple(suite if isinstance(suite, Suite) else Suite(tuple(suite)))
    edits = {"edited": edit} if isinstance(edit, Edit) else dict(edit)
    if not edits or UNEDITED in edits:
        raise ValueError(f"name at least one edit, and none {UNEDITED!r}; got {list(edits)}")
    seeds = _checked_seeds(seeds)
    if bundled.is_bundled(pipe):
        factors = {trial.factor for trial in trials if trial.factor}
        classifiers = classifiers or {factor: bundled.attribute_probability(factor) for factor in factors} or None
        scorer = bundled.load_scorer() if scorer is None else scorer
    judge = Judge(trials, classifiers, scorer)
    # Noise of its own for every trial: with one for all, a suite would judge a single composition.
    noise_seeds = [[_noise_seed(seed, place) for seed in seeds] for place in range(len(trials))]
    jobs = [(trial, noise_seed) for trial, row in zip(trials, noise_seeds, strict=True) for noise_seed in row]
    sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    coords, attrs = _coords(trials) | {"seed": seeds}, _attrs(edits, sampling, pipe) | judge.described()

    columns: dict[str, list] = {}
    if unedited is not None:
        names = ["latents", *judge.names, *(["images"] if keep_images or lpips else [])]
        columns = {name: [values] for name, values in _taken_over(unedited, names, coords, attrs).items()}
    for one in edits.values():  # what cannot be applied is to fail now, and not behind the unedited pictures
        with one.applied(pipe):
            pass
    models = list(edits) if columns else [UNEDITED, *edits]
    with tqdm(total=len(jobs) * len(models), desc="pictures", disable=None if progress else True) as bar:
        for model in models:
            found: dict[str, list] = {}
            with edits[model].applied(pipe) if model in edits else contextlib.nullcontext():
                for chunk, latents, images in _draw(pipe, jobs, batch_size, sampling):
                    found.setdefault("latents", []).append(latents)
                    for name, values in judge(images, [trial for trial, _ in chunk]).items():
                        found.setdefault(name, []).append(values)
                    if keep_images or lpips:
                        pixels = (images.permute(0, 2, 3, 1) * 255).round().byte()
                        found.setdefault("images", []).append(pixels.numpy())
                    bar.update(len(chunk))
            for name, values in found.items():
                columns.setdefault(name, []).append(numpy.concatenate(values))
    plain, *_ = latents = columns["latents"]
    columns["latent_distance"] = [numpy.sqrt(numpy.square(x - plain).reshape(len(x), -1).mean(1)) for x in latents]
    if lpips:
        columns["lpips"] = [_lpips(lpips, images, columns["images"][0], batch_size) for images in columns["images"]]
    if not keep_images:
        columns = {name: values for name, values in columns.items() if name not in ("latents", "images")}
    coords |= {"model": [UNEDITED, *edits], "noise_seed": (("trial", "seed"), noise_seeds)}
    return _dataset(columns, coords, attrs)


def _checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    sound = all(isinstance(seed, numbers.Integral) and seed >= 0 for seed in chosen)
    if not (chosen and sound and len(set(chosen)) == len(chosen)):
        raise ValueError(f"seeds are integers from 0 up, at least one and each once; got {seeds!r}")
    return [int(seed) for seed in chosen]


def _noise_seed(seed: int, place: int) -> int:
    state = numpy.random.SeedSequence([seed, place]).generate_state(1)[0]
    return int(state >> 1)  # 31 bits, which every file format holds


@torch.no_grad()
def _draw(
    pipe: DiffusionPipeline, jobs: Sequence[tuple[Trial, int]], batch_size: int, sampling: Mapping
) -> Iterator[tuple[Sequence[tuple[Trial, int]], numpy.ndarray, torch.Tensor]]:
    """Final latents, and images in [0, 1], of some jobs at a time."""
    for start in range(0, len(jobs), batch_size):
        chunk = jobs[start : start + batch_size]
        # One generator per picture, so that no picture depends on its neighbours in the batch.
        generator = [torch.Generator().manual_seed(seed) for _, seed in chunk]
        prompts = [trial.prompt for trial, _ in chunk]
        with quiet(pipe):
            latents = pipe(prompts, generator=generator, output_type="latent", **sampling).images
        yield chunk, latents.float().cpu().numpy(), family_of(pipe).decode(pipe, latents).float().cpu()


@torch.no_grad()
def _lpips(lpips: LPIPS, images: numpy.ndarray, others: numpy.ndarray, batch_size: int) -> numpy.ndarray:
    """Distances of 8-bit pictures, (picture, y, x, channel), one by one."""
    chunks = [
        [torch.from_numpy(pixels[start : start + batch_size]).permute(0, 3, 1, 2) / 255 for pixels in (images, others)]
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat([lpips.distance(*pair) for pair in chunks]).double().cpu().numpy()


def _taken_over(report: xarray.Dataset, names: Sequence[str], coords: Mapping, attrs: Mapping) -> dict:
    """What an earlier report has of the unedited pictures, one value per picture; it must be of the same ones."""
    if missing := [name for name in names if name not in report]:
        raise ValueError(f"`unedited` has no {', '.join(missing)}: make it with keep_images, and the same judges")
    wanted = {name: values[1] if isinstance(values, tuple) else values for name, values in coords.items()}
    different = [name for name, values in wanted.items() if report[name].values.tolist() != values]
    different += [name for name, value in attrs.items() if name != "edits" and report.attrs.get(name) != value]
    if different and set(different) <= JUDGES:
        raise ValueError(f"`unedited` was judged by others: it differs in {', '.join(different)}; make it again")
    if different:
        raise ValueError(f"`unedited` is of other pictures: it differs in {', '.join(different)}")
    dtypes = {"label": str, "images": numpy.uint8}
    plain = report.sel(model=UNEDITED).transpose("trial", "seed", ...)
    columns = {name: plain[name].values for name in names}
    return {
        name: values.reshape(-1, *values.shape[2:]).astype(dtypes.get(name, values.dtype))
        for name, values in columns.items()
    }


def _coords(trials: Sequence[Trial]) -> dict[str, tuple]:
    fields = [field.name for field in dataclasses.fields(Trial)]
    return {field: ("trial", [getattr(trial, field) for trial in trials]) for field in fields}


def _attrs(edits: Mapping[str, Edit], sampling: Mapping, pipe: DiffusionPipeline) -> dict:
    origins = {
        name: {key: value for key, value in edit.metadata.items() if key != "base"} for name, edit in edits.items()
    }
    return {
        **sampling,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "edits": json.dumps(origins, ensure_ascii=False),
        "weights": digest(pipe),
        "provenance": json.dumps(provenance(pipe)),
    }


def _dataset(columns: Mapping[str, list[numpy.ndarray]], coords: Mapping, attrs: Mapping) -> xarray.Dataset:
    """Labels what was found of every picture, given as an array for each model."""
    dims, shape = ("trial", "seed", "model"), numpy.shape(coords["noise_seed"][1])
    inner = {"images": ("y", "x", "channel"), "latents": ("latent_channel", "latent_y", "latent_x")}
    variables = {}
    for name, by_model in columns.items():
        values = numpy.stack([x.reshape(*shape, *x.shape[1:]) for x in by_model], axis=2)
        variables[name] = (dims + inner.get(name, ()), values)
    return xarray.Dataset(variables, coords, attrs)
