"""The exact backend: put one site of a run into another run, at every step, and measure what that changes.

Cost grows with cases × draws × sites (× tokens × windows): one row of sampling each, and two more per chunk. For n rows
in chunks of c, batch_size being c + 2, the denoiser computes at most n + 2 ⌈n / c⌉ + c rows at every step.
"""

import gc
import math
import warnings
from collections.abc import Iterator

import numpy
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.album import Album
from mediation.cases import Case
from mediation.encoding import encode_rows
from mediation.metrics import evaluate, images_for
from mediation.pipelines import family_of
from mediation.plans import Plan
from mediation.rows import N_CONTROLS, Intervention
from mediation.sampling import sample_alone

_CONTROLS = ("clean", "corrupted")  # in the order of their rows


def restoration(pipe: DiffusionPipeline, plan: Plan) -> dict[str, numpy.ndarray]:
    """Runs every intervention of a plan (Basu et al. 2024, arXiv:2310.13730, section 3).

    Every chunk carries its own clean and corrupted row. One of them is the donor, which the others copy from; the other
    is the sham row, in which nothing is changed. What the sham rows are compared with is computed once more: in the
    last chunk or, if the others fill it, alone. Chunks of one case are filled up to the same number of rows.

    Returns:
        clean, corrupted: (case, draw, metric); sham, restored: (case, draw, site, token, window, metric), where sham is
        the sham row of the chunk that an intervention ran in. What has no token to change is NaN. And the arrays of an
        `Album`, if the plan asks for images.
    """
    values = plan.blank()
    album = Album(plan)
    untouched = Intervention(mode=plan.mode)
    jobs = [[*plan.interventions(pipe, case), (None, untouched)] for case in plan.cases]
    n_rows = plan.n_draws * sum(map(len, jobs))
    with tqdm(total=n_rows, desc="tracing", unit="row", disable=None if plan.progress else True) as bar:
        for c, draw, chunk, measured in _measured_chunks(pipe, plan, jobs, album):
            for row, (index, _) in enumerate(chunk, start=N_CONTROLS):
                if index is None:
                    values[_CONTROLS[untouched.donor]][c, draw] = measured[:, untouched.donor]
                    values[_CONTROLS[untouched.sham]][c, draw] = measured[:, row]
                else:
                    values["sham"][(c, draw, *index)] = measured[:, untouched.sham]
                    values["restored"][(c, draw, *index)] = measured[:, row]
            bar.update(len(chunk))
    return values | album.arrays


def _measured_chunks(
    pipe, plan: Plan, jobs: list[list], album: Album
) -> Iterator[tuple[int, int, list, numpy.ndarray]]:
    """(case, draw, its next jobs, their values as of `_measure`); chunks shrink for good when memory runs out."""
    capacity = plan.batch_size - N_CONTROLS
    for c, case in enumerate(plan.cases):
        for draw in range(plan.n_draws):
            pending = jobs[c]
            size = _even_size(len(pending), capacity)
            while pending:
                # the last job, the untouched run, needs no controls: it is no reason for another chunk
                n_next = len(pending) if len(pending) == size + 1 else size
                chunk = pending[:n_next]
                rows = [intervention for _, intervention in chunk]
                rows += [Intervention(mode=plan.mode)] * (size - len(chunk))
                places = album.places(chunk)
                found = _measure_if_it_fits(pipe, plan, case, draw, rows, size, list(places))
                if found is None:
                    capacity = size // 2
                    size = _even_size(len(pending), capacity)
                else:
                    measured, images = found
                    album.add(c, draw, list(places.values()), images)
                    yield c, draw, chunk, measured
                    pending = pending[n_next:]


def n_computed_rows(n_places: int, batch_size: int) -> int:
    """Rows of every step, for one case and draw: of so many places, of controls, and of what fills chunks up.

    Rows that wait for their window take fewer steps, and running out of memory takes more rows.

    Example:
        >>> n_computed_rows(4, batch_size=4)  # two chunks of two beside two controls each, and the untouched run alone
        9
    """
    n_jobs = n_places + 1  # with the untouched run
    size = _even_size(n_jobs, batch_size - N_CONTROLS)
    n_chunks = max(1, math.ceil(n_places / size))
    return max(n_chunks * size, n_jobs) + n_chunks * N_CONTROLS


def _even_size(n_jobs: int, capacity: int) -> int:
    """The size at which the fewest chunks, not counting the last job, are about equally full."""
    n_chunks = max(1, math.ceil((n_jobs - 1) / capacity))
    return min(capacity, math.ceil(n_jobs / n_chunks))


def _measure_if_it_fits(
    pipe, plan: Plan, case: Case, draw: int, rows: list[Intervention], size: int, pictured: list[int]
) -> tuple[numpy.ndarray, torch.Tensor] | None:
    """What `_measure` returns, or None if memory ran out and fewer rows could still do."""
    try:
        return _measure(pipe, plan, case, draw, rows, size, pictured)
    except RuntimeError as error:
        if size == 1 or not _is_out_of_memory(error):
            raise
    # Only here is the error gone, and with it the tensors of the frames that it came through.
    gc.collect()
    torch.cuda.empty_cache()
    n_tried, n_next = size + N_CONTROLS, size // 2 + N_CONTROLS
    warnings.warn(
        f"out of memory with batch_size={n_tried}: going on with at most {n_next} rows, and the same results but for"
        " rounding",
        stacklevel=2,
    )
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error).lower() for phrase in phrases)


@torch.no_grad()
def _measure(
    pipe, plan: Plan, case: Case, draw: int, rows: list[Intervention], size: int, pictured: list[int]
) -> tuple[numpy.ndarray, torch.Tensor]:
    """Values of every metric, (metric, row), and the images of the rows in `pictured`.

    The first `size` of `rows` are sampled together, behind their controls; one that is left over is untouched.
    """
    latents = plan.sample(pipe, case, draw, rows[:size])
    if len(rows) > size:
        text = encode_rows(pipe, case, draw, ())
        latents = torch.cat([latents, sample_alone(pipe, case, text, rows[-1].sham, plan.sampling)])
    images = images_for(pipe, plan.metrics, latents)
    measured = evaluate(plan.metrics, images, latents, [case] * len(latents))
    if not pictured:
        return measured, latents[:0]
    return measured, family_of(pipe).decode(pipe, latents[pictured]) if images is None else images[pictured]
