"""The exact backend: corrupt a prompt's subject, restore one site at a time, measure what comes back.

Cost grows with cases × draws × sites (× tokens × windows): one row of sampling each, and two more per chunk.
"""

import math

import numpy
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.metrics import evaluate
from mediation.pipelines import family_of
from mediation.plans import Plan
from mediation.sampling import CLEAN, N_CONTROLS, SHAM, Intervention, sample_rows


def restoration(pipe: DiffusionPipeline, plan: Plan) -> dict[str, numpy.ndarray]:
    """Runs every restoration of a plan (Basu et al. 2024, arXiv:2310.13730, section 3).

    Every chunk carries its own clean row, which the others copy from, and a sham row: corrupted, with nothing restored.
    All chunks have the same number of rows.

    Returns:
        clean, corrupted: (case, draw, metric); sham, restored: (case, draw, site, token, window, metric), where sham is
        the sham row of the chunk that a restoration ran in. What has no token to restore is NaN.
    """
    n_cases, n_draws, n_metrics = len(plan.cases), plan.n_draws, len(plan.metrics)
    whole = (n_cases, n_draws, n_metrics)
    each = (n_cases, n_draws, *plan.shape, n_metrics)
    values = {
        "clean": numpy.full(whole, numpy.nan),
        "corrupted": numpy.full(whole, numpy.nan),
        "sham": numpy.full(each, numpy.nan),
        "restored": numpy.full(each, numpy.nan),
    }
    work = [list(plan.interventions(pipe, case)) for case in plan.cases]
    chunks_by_case = [_chunks([(None, Intervention()), *jobs], plan.batch_size - N_CONTROLS) for jobs in work]
    n_chunks = n_draws * sum(map(len, chunks_by_case))
    with tqdm(total=n_chunks, desc="tracing", unit="chunk", disable=None if plan.progress else True) as bar:
        for c, (case, chunks) in enumerate(zip(plan.cases, chunks_by_case, strict=True)):
            for draw in range(n_draws):
                for number, chunk in enumerate(chunks):
                    measured = _measure(pipe, plan, case, draw, [intervention for _, intervention in chunk])
                    if number == 0:
                        values["clean"][c, draw] = measured[:, CLEAN]
                        values["corrupted"][c, draw] = measured[:, N_CONTROLS]
                    for row, (index, _) in enumerate(chunk, start=N_CONTROLS):
                        if index is not None:
                            values["restored"][(c, draw, *index)] = measured[:, row]
                            values["sham"][(c, draw, *index)] = measured[:, SHAM]
                    bar.update()
    return values


def _chunks(jobs: list, capacity: int) -> list[list]:
    """Splits jobs into chunks of one size, the last one filled up with rows that restore nothing."""
    n_chunks = math.ceil(len(jobs) / capacity)
    size = math.ceil(len(jobs) / n_chunks)
    jobs = jobs + [(None, Intervention())] * (n_chunks * size - len(jobs))
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


@torch.no_grad()
def _measure(pipe, plan: Plan, case, draw: int, rows: list[Intervention]) -> numpy.ndarray:
    """Values of every metric, (metric, row)."""
    latents = sample_rows(pipe, case, draw, rows, plan.sampling)
    needs_images = any(getattr(metric, "needs_images", True) for metric in plan.metrics)
    images = family_of(pipe).decode(pipe, latents) if needs_images else None
    return evaluate(plan.metrics, images, latents, [case] * len(latents))
