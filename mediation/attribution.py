"""The first-order backend: what restoring each site would bring back, estimated from gradients.

One way forward and one way back serve all sites and steps, whatever their number: the clean and the corrupted run are
sampled, each of their steps is computed once more, and one of the two is differentiated.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy
import scipy.special
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.adjoint import differentiable, frozen, rows_with_graph, uncheckpointed
from mediation.cases import Case
from mediation.distances import Distance
from mediation.encoding import encode_in_graph, encode_rows
from mediation.guards import check_gradients_allowed
from mediation.hooks import Change, hooked, recorded_calls, watched
from mediation.interventions import first_order
from mediation.metrics import Metric, check_differentiable, evaluate, images_for, metric_name, score
from mediation.pipelines import family_of, tokenizers_of
from mediation.plans import Plan
from mediation.rows import CLEAN, N_CONTROLS, Intervention, Target, changing
from mediation.sampling import denoise, sample_alone, starting_latents


def attribution_patching(pipe: DiffusionPipeline, plan: Plan, *, integrated: int = 1) -> dict[str, numpy.ndarray]:
    """Estimates every intervention of a plan to first order (Kramár et al. 2024, arXiv:2403.00745).

    With a the activation of a site in one step, m the metric, and clean and corrupted runs as in `restoration`,

        IE ≈ <dm/da, a_clean − a_corrupted>     at the corrupted run; at the clean run if sites are knocked out

    Exact where m is linear in a. Of a window of several steps, or of sites that are changed together, it is the sum,
    as if no change acted through another: too much where they carry the same thing.

    Args:
        pipe: the pipeline.
        plan: what to estimate.
        integrated: points at which the gradient is taken and averaged, on the line between what the denoiser reads of
            the prompt in the one run and in the other. 1 is the untouched run alone; k are those of Gauss and Radau,
            the untouched run among them. Rows keep the graph of a step, so that no more run at once than
            `rows_with_graph` says; each call has the untouched run in it, and c rows at once take
            k + ⌈(k − 1) / (c − 1)⌉ − 1 in all.

    Returns:
        As `restoration` does. An estimate has no sham run: sham is the untouched run's value.

    Raises:
        ValueError: before any work, if a metric has no gradient, float16 is too narrow for one, or
            `torch.inference_mode` forbids it.
    """
    _check(pipe, plan, integrated)
    values, untouched = plan.blank(), Intervention(mode=plan.mode)
    networks = [getattr(pipe, name) for name in (family_of(pipe).denoiser, *tokenizers_of(pipe))]
    n_runs = len(plan.cases) * plan.n_draws
    bar = tqdm(total=n_runs, desc="estimating", disable=None if plan.progress else True)
    with frozen(pipe), uncheckpointed(networks), bar:
        for c, case in enumerate(plan.cases):
            jobs = list(plan.interventions(pipe, case))
            for draw in range(plan.n_draws):
                controls, effects = _estimate(pipe, plan, case, draw, [job for _, job in jobs], integrated)
                values["clean"][c, draw], values["corrupted"][c, draw] = controls.T
                start = controls[:, untouched.sham]
                for (index, _), effect in zip(jobs, effects.T, strict=True):
                    values["sham"][(c, draw, *index)] = start
                    values["restored"][(c, draw, *index)] = start + effect
                bar.update()
    return values


def radau(n_points: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Points in [0, 1] and weights that average polynomials up to degree 2n − 2 exactly, the first point being 0.

    Example:
        >>> points, weights = radau(2)
        >>> points.round(4).tolist(), weights.round(4).tolist()
        ([0.0, 0.6667], [0.25, 0.75])
    """
    if n_points == 1:
        return numpy.zeros(1), numpy.ones(1)
    inner = scipy.special.roots_jacobi(n_points - 1, 0, 1)[0]
    weights = (1 - inner) / (n_points * scipy.special.eval_legendre(n_points - 1, inner)) ** 2
    return (1 + numpy.array([-1, *inner])) / 2, numpy.array([2 / n_points**2, *weights]) / 2


def _check(pipe: DiffusionPipeline, plan: Plan, integrated: int) -> None:
    check_gradients_allowed()
    if integrated < 1:
        raise ValueError(f"integrated counts the points at which gradients are taken: at least 1, got {integrated}")
    traced = [site.network for group in plan.groups for site in group]
    for network in (family_of(pipe).denoiser, *dict.fromkeys(traced)):
        if getattr(pipe, network).dtype == torch.float16:
            raise ValueError(
                f"gradients underflow in float16, which the {network} is in: load the pipeline in bfloat16 or float32"
            )
    for metric in plan.metrics:
        if plan.mode == "knock_out" and isinstance(metric, Distance):
            raise ValueError(
                f"{metric_name(metric)} is least at the clean run and has no gradient there, where sites are knocked"
                ' out: choose another metric, mode="restore" or backend="restoration"'
            )
        check_differentiable(pipe, metric, plan.cases[0])


def _estimate(
    pipe: DiffusionPipeline, plan: Plan, case: Case, draw: int, jobs: list[Intervention], integrated: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Values of the clean and the corrupted run, (metric, run), and what each job would add, (metric, job)."""
    donor, base = Intervention(mode=plan.mode).donor, Intervention(mode=plan.mode).sham
    text = encode_rows(pipe, case, draw, ())
    finals = {}
    with torch.no_grad(), recorded_calls(getattr(pipe, family_of(pipe).denoiser)) as calls:
        finals[donor] = sample_alone(pipe, case, text, donor, plan.sampling)
    effects = numpy.zeros((len(plan.metrics), len(jobs)))
    for points, weights in _batches(integrated, max(2, min(plan.batch_size, rows_with_graph(pipe)))):
        watch = _Watch(pipe, plan, jobs, calls)
        doors = {keyword: _between(value[base], value[donor], points) for keyword, value in text.items()}
        start = starting_latents(pipe, case, len(points)).clone().requires_grad_()
        with torch.enable_grad(), differentiable(pipe, watch.step):
            latents = denoise(pipe, case, doors, start, plan.sampling)
        finals[base] = latents[:1].detach()
        with torch.enable_grad():
            outcomes = _outcomes(pipe, plan.metrics, case, finals[CLEAN], latents, weights)
        for i, outcome in enumerate(outcomes):
            watch.reset()
            inputs = [start, *doors.values()]  # with the start, since the first step reads nothing before its sites
            _, *found = torch.autograd.grad(outcome, inputs, retain_graph=i < len(outcomes) - 1)
            watch.text(case, draw, {name: gradient.sum(0) for name, gradient in zip(doors, found, strict=True)})
            effects[i] += [float(total) for total in watch.totals]
    with torch.no_grad():
        rows = torch.cat([finals[row] for row in sorted(finals)])  # clean, corrupted
        controls = evaluate(plan.metrics, images_for(pipe, plan.metrics, rows), rows, [case] * len(rows))
    return controls, effects


def _batches(n_points: int, batch_size: int) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """Points and weights of each call of the pipeline; every one begins with the untouched run, and counts it once."""
    points, weights = radau(n_points)
    size = batch_size - 1
    for first in range(0, max(1, n_points - 1), size):
        chunk = slice(1 + first, 1 + first + size)
        own = weights[0] if first == 0 else 0.0
        yield numpy.array([0.0, *points[chunk]]), numpy.array([own, *weights[chunk]])


def _between(start: torch.Tensor, stop: torch.Tensor, points: Sequence[float]) -> torch.Tensor:
    """Rows on the line between two tensors, to take gradients at."""
    return torch.stack([start if point == 0 else torch.lerp(start, stop, point) for point in points]).requires_grad_()


def _outcomes(
    pipe: DiffusionPipeline,
    metrics: Sequence[Metric],
    case: Case,
    clean: torch.Tensor,
    latents: torch.Tensor,
    weights: numpy.ndarray,
) -> list[torch.Tensor]:
    """The weighted sum of each metric over rows of `latents`, next to a clean run that is no part of the graph."""
    rows = torch.cat([clean, latents])
    images = images_for(pipe, metrics, rows)
    scores = [score(metric, images, rows, [case] * len(rows))[1:] for metric in metrics]
    return [found @ torch.as_tensor(weights, dtype=found.dtype, device=found.device) for found in scores]


class _Watch:
    """Adds up what each job would change, to first order, as gradients pass its sites.

    Attributes:
        totals: by job, since the last reset.
    """

    def __init__(self, pipe: DiffusionPipeline, plan: Plan, jobs: list[Intervention], calls: list):
        family = family_of(pipe)
        self._pipe, self._jobs, self._calls = pipe, jobs, calls
        self._denoiser = family.denoiser
        self._n_halves = len(plan.sampling.present_halves(family.guidance_halves))
        self._halves = plan.sampling.changed_halves(family.guidance_halves)
        self._untouched = Intervention(mode=plan.mode)
        self.totals: list[torch.Tensor | float] = []
        self.reset()

    def reset(self) -> None:
        """Begins anew, for another metric."""
        self.totals = [0.0] * len(self._jobs)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watches one call of the denoiser, beside which the donor's call is made again."""
        # The pipelines call the denoiser once per iteration of their loop, as windows count.
        fraction = number / len(self._calls)
        jobs = [job if job.covers(fraction) else self._untouched for job in self._jobs]
        if not any(site.network == self._denoiser for job in jobs for site in job.sites):
            yield
            return
        donated = collections.defaultdict(collections.deque)

        def keep(targets: list[Target]) -> Change:
            queue = donated[targets[0].site.path]

            def change(tensor: torch.Tensor) -> torch.Tensor:
                queue.append(self._by_half(tensor)[:, 0])
                return tensor

            return change

        def watch(targets: list[Target]) -> Change:
            queue = donated[targets[0].site.path]

            def change(tensor: torch.Tensor) -> torch.Tensor:
                source, target = queue.popleft(), self._by_half(tensor.detach())[:, 0]
                return watched(tensor, functools.partial(self._arrive, targets, source, target))

            return change

        with torch.no_grad(), changing(self._pipe, jobs, [self._denoiser], keep):
            self._calls[number]()
        with changing(self._pipe, jobs, [self._denoiser], watch):
            yield

    def text(self, case: Case, draw: int, gradients: dict[str, torch.Tensor]) -> None:
        """Takes the gradients of what the denoiser reads back through the text encoders, where the untouched run is."""
        encoders = list(tokenizers_of(self._pipe))
        if not any(site.network in encoders for job in self._jobs for site in job.sites):
            return
        donor, base = self._untouched.donor, self._untouched.sham
        leaves = []

        def begin(embeddings: torch.Tensor) -> torch.Tensor:
            leaves.append(embeddings.detach().requires_grad_())
            return leaves[-1]

        def watch(targets: list[Target]) -> Change:
            def change(tensor: torch.Tensor) -> torch.Tensor:
                rows = tensor.detach()

                def arrive(gradient: torch.Tensor) -> None:
                    for target in targets:
                        pairs = target.intervention.positions(target.site.network)
                        self._add(target, gradient[base], rows[donor], rows[base], pairs)

                return watched(tensor, arrive)

            return change

        tables = [getattr(self._pipe, encoder).get_input_embeddings() for encoder in encoders]
        with (
            torch.enable_grad(),
            hooked([(table, begin) for table in tables]),
            changing(self._pipe, self._jobs, encoders, watch),
        ):
            encoded = encode_in_graph(self._pipe, case, draw, ())
        torch.autograd.grad([encoded[name][base] for name in gradients], leaves, list(gradients.values()))

    def _by_half(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (self._n_halves, -1))

    def _arrive(self, targets: list[Target], source: torch.Tensor, target: torch.Tensor, gradient: torch.Tensor):
        # rows are points on the way, whose outcomes were weighted
        gradient = self._by_half(gradient).sum(1)
        for one in targets:
            for half in self._halves:
                self._add(one, gradient[half], source[half], target[half])

    def _add(self, one: Target, gradient, source, target, pairs=None) -> None:
        features = one.site.features(source.shape[-1])
        self.totals[one.row - N_CONTROLS] += first_order(gradient, source, target, pairs, features)
