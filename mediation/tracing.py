"""`trace`: from cases to a labelled map of causal effects, by one of several backends."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy
import xarray
from diffusers import DiffusionPipeline

from mediation.attribution import attribution_patching
from mediation.badrows import warn_of_bad_rows
from mediation.cases import Case
from mediation.direct import direct_effect, text_layers
from mediation.metrics import Metric, metric_name, metric_options
from mediation.pipelines import tokenizers_of
from mediation.plans import Plan, checked_integer, make_plan
from mediation.provenance import provenance
from mediation.restoration import restoration
from mediation.sampling import Sampling
from mediation.schema import ABSENT_DIMS, CHECK_DIMS, DIMS, IMAGE_DIMS, seed_labels
from mediation.sites import Site, group_name, resolve
from mediation.verification import screened, verified
from mediation.windows import window_name

# A backend returns the values of a plan as `restoration` does.
BACKENDS: dict[str, Callable[[DiffusionPipeline, Plan], dict[str, numpy.ndarray]]] = {
    "restoration": restoration,
    "attribution_patching": attribution_patching,
    "direct_effect": direct_effect,
}


def trace(
    pipe: DiffusionPipeline,
    cases: Case | Sequence[Case],
    *,
    sites: Sequence[Site | str | Sequence[Site | str]] | None = None,
    backend: str = "restoration",
    metric: Metric | Sequence[Metric] | None = None,
    tokens: str | Sequence[str | int] | None = None,
    windows: str | Sequence[tuple[float, float]] | None = None,
    mode: str = "restore",
    branch: str = "cond",
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    images: str | Sequence[Site | str | Sequence[Site | str]] | None = None,
    integrated: int = 1,
    screen: float | None = None,
    verify: int | None = None,
    progress: bool = True,
) -> xarray.Dataset:
    """Measures what restoring each site brings back of a corrupted subject (causal tracing).

    Three kinds of run share one starting latent: clean, corrupted (the subject's tokens are noised or replaced), and
    restored (corrupted, but one site's output is the clean run's, at every step). The indirect effect of a site is
    IE = m(restored) − m(corrupted), the total effect TE = m(clean) − m(corrupted).

    Restoring asks whether a site is sufficient. The mirror experiment, `mode="knock_out"`, asks whether it is
    necessary: one site of a clean run takes the corrupted run's output, and IE = m(clean) − m(knocked out).

    Backends say how: "restoration" runs every intervention, and is exact. "attribution_patching" estimates all of them
    from one gradient, each step by itself, at a price that does not grow with their number. "direct_effect" lets
    cross-attentions read the other run's prompt in place of taking over their outputs.

    Args:
        pipe: a diffusers pipeline of a supported family.
        cases: what to corrupt, one case or several.
        sites: sites or names, heads and blocks among them; an entry that is itself a list is changed together. None is
            every site that `mediation.sites(pipe)` lists, or every one to which `tokens`, `windows` and `branch`
            apply; for "direct_effect", every cross-attention.
        backend: "restoration", "attribution_patching" or "direct_effect".
        metric: scores a run's outcome, or several such, which adds a `metric` dimension. None is CLIPScore with the
            prompt for the bundled pipeline, and `LatentDistance` for any other. See `mediation.metrics`; estimates
            need its gradient.
        tokens: token groups (bos, before, subject, last_subject, after, eos, padding, all) or positions at which to
            change text-encoder sites, or "each" for every position; adds a `token` dimension.
        windows: (start, stop) fractions of sampling in which to change sites of the denoiser, or "each" for one per
            iteration of the scheduler: a step, of which some make several iterations. Adds a `window` dimension. Each
            must hold an iteration. None is all of sampling but for "attribution_patching", whose estimates are of
            single iterations: there it is "each", unless sites of a text encoder are asked for.
        mode: "restore" or "knock_out".
        branch: half of the guided batch that is changed in the denoiser: "cond", "uncond" or "both". Sites of a text
            encoder feed the conditional half only, and cannot be changed for "uncond".
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: rows of one call of the pipeline, the clean and the sham row included. None suits the latents' size.
            With gradients, at most as many run at once as `attribute` takes, in whose memory their graphs fit.
        images: sites whose restored images are kept, or "all"; clean and corrupted images come along. Each takes
            height × width × 3 bytes: 70 sites at 512 × 512, 57 MB per case and draw. None keeps no image.
        integrated: of estimates, the points between the two runs at which the gradient is averaged. Each is another
            row, and 1 is the untouched run itself.
        screen: estimates everything, then restores this share of all places (sites with their token or window), the
            best, exactly: their values are exact, those of all others are estimates. The estimate of a window of
            several steps is the sum over its steps.
        verify: of "attribution_patching", restores the best places exactly, this many, and as many at random, next to
            the estimates: see `mediation.verification`.
        progress: shows a progress bar on a terminal.

    Returns:
        A Dataset with dims (case, draw, site[, token][, window][, metric]): clean and corrupted by (case, draw),
        restored (with `mode="knock_out"`, the knocked-out runs), and sham: as measured in the same chunk, the run in
        which sites are changed, unchanged. Coordinates on site: network, component, layer, block, path and, if there
        are heads, head (-1 for what is none); sites that are changed together have all their networks and components,
        with "+" between, and the rest of the site in their middle. The attributes hold what is needed to run it again.
        With `tokens`, absent (case, site, token) says where a case has none to change, so that all is NaN.
        With `images`, also clean_image and corrupted_image (case, draw, y, x, channel), and restored_image (case, draw,
        image_site[, token][, window], y, x, channel), as integers from 0 to 255. Of estimates, the attribute `estimate`
        says of which order they are, sham is the untouched run's value, and with `screen` or `verify`, exact holds what
        was restored, NaN elsewhere.

    Raises:
        TypeError, KeyError, ValueError: before any work, if an argument does not fit the pipeline.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> case = mediation.Case("a cat in the style of ink", subject="ink")
        >>> effects = mediation.trace(pipe, case, sites=["unet.mid.0.cross_attention"], num_inference_steps=2)
        >>> dict(effects.sizes)
        {'case': 1, 'draw': 1, 'site': 1}
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    estimates = backend == "attribution_patching" or screen is not None
    _check_estimates(backend, metric, images, integrated, screen, verify)
    if backend == "direct_effect" and sites is None:
        sites = text_layers(pipe)
    if backend == "attribution_patching" and windows is None and tokens is None and not _has_text(pipe, sites):
        windows = "each"
    plan = make_plan(
        pipe,
        cases,
        sites=sites,
        metric=metric,
        tokens=tokens,
        windows=windows,
        mode=mode,
        sampling=Sampling(checked_integer("num_inference_steps", num_inference_steps), guidance_scale, branch),
        batch_size=batch_size,
        images=images,
        progress=progress,
    )
    _check_places(pipe, plan, verify)
    attributes, described = {"backend": backend}, plan_attributes(pipe, plan)  # before any work, in case it fails
    if estimates:
        values = attribution_patching(pipe, plan, integrated=integrated)
        attributes |= {"estimate": "first_order", "integrated": integrated}
    else:
        values = BACKENDS[backend](pipe, plan)
    if screen is not None:
        values = screened(pipe, plan, values, screen)
        attributes["screen"] = screen
    if verify is not None:
        values = verified(pipe, plan, values, verify)
        attributes["verify"] = verify
    if plan.tokens is not None:
        values = values | {"absent": plan.absent(pipe)}
    effects = label(plan, values)
    effects.attrs = attributes | described
    warn_of_bad_rows(effects)
    return effects


def label(plan: Plan, values: dict[str, numpy.ndarray]) -> xarray.Dataset:
    """Names the dimensions of a backend's values and drops those that the plan does not have."""
    dims = DIMS | IMAGE_DIMS | CHECK_DIMS | ABSENT_DIMS
    effects = xarray.Dataset({name: (dims[name], array) for name, array in values.items()})
    absent = {"token": plan.tokens is None, "window": plan.windows is None, "metric": not plan.several_metrics}
    effects = effects.isel({dim: 0 for dim, is_absent in absent.items() if is_absent})
    effects = effects.assign_coords(
        case=numpy.arange(len(plan.cases)),
        draw=numpy.arange(plan.n_draws),
        prompt=("case", [case.prompt for case in plan.cases]),
        subject=("case", [case.subject for case in plan.cases]),
        seed=("case", seed_labels([case.seed for case in plan.cases])),
        site=[group_name(group) for group in plan.groups],
    )
    # A group is of all its networks and components, and stands where the site in its middle does.
    for field in ("network", "component"):
        kinds = ["+".join(dict.fromkeys(getattr(site, field) for site in group)) for group in plan.groups]
        effects = effects.assign_coords({field: ("site", kinds)})
    for field in ("layer", "block", "path"):
        middle = [getattr(group[len(group) // 2], field) for group in plan.groups]
        effects = effects.assign_coords({field: ("site", middle)})
    heads = [group[0].head if len(group) == 1 else None for group in plan.groups]
    if any(head is not None for head in heads):
        effects = effects.assign_coords(head=("site", [-1 if head is None else head for head in heads]))
    if plan.tokens is not None:
        # One type for all, so that files can hold them: names, or positions if there is no name among them.
        are_positions = all(isinstance(token, int) for token in plan.tokens)
        effects = effects.assign_coords(token=list(plan.tokens if are_positions else map(str, plan.tokens)))
    if plan.windows is not None:
        effects = effects.assign_coords(
            window=list(map(window_name, plan.windows)),
            window_start=("window", [start for start, _ in plan.windows]),
            window_stop=("window", [stop for _, stop in plan.windows]),
        )
    if plan.several_metrics:
        effects = effects.assign_coords(metric=[metric_name(metric) for metric in plan.metrics])
    if "restored_image" in effects:
        effects = effects.assign_coords(image_site=[group_name(plan.groups[i]) for i in plan.pictured])
    for name in IMAGE_DIMS:
        if name in effects:
            effects[name].encoding = {"dtype": "int16"}  # in files, since netCDF 3 has no unsigned bytes
    return effects


def _check_estimates(backend, metric, images, integrated, screen, verify) -> None:
    estimates = backend == "attribution_patching"
    if images is not None and (estimates or screen is not None):
        raise ValueError('estimates make no images: choose backend="restoration" without screen')
    for name, value in (("integrated", integrated), ("verify", verify)):
        if value is not None:
            checked_integer(name, value)
    if integrated != 1 and not (estimates or screen is not None):
        raise ValueError(f'integrated is for estimates, and backend="{backend}" makes none')
    if screen is not None and backend == "direct_effect":
        raise ValueError("screen puts the exact backend behind estimates, and there are none of direct effects")
    if screen is not None and not 0 < screen <= 1:
        raise ValueError(f"screen is the share of places to restore exactly, above 0 and up to 1; got {screen}")
    if verify is not None and not (estimates and screen is None):
        raise ValueError('verify is for backend="attribution_patching" without screen, where all are estimates')
    if verify is not None and verify < 2:
        raise ValueError(f"verify counts places to restore exactly, to compare them: at least 2, got {verify}")
    if (screen is not None or verify is not None) and not (metric is None or callable(metric)):
        raise ValueError("screen and verify choose places by one metric: pass a single one")


def _check_places(pipe: DiffusionPipeline, plan: Plan, verify: int | None) -> None:
    if verify is None:
        return
    places = {place for case in plan.cases for place, _ in plan.interventions(pipe, case)}
    if len(places) < 2:
        raise ValueError(
            f"verify compares places (of a site, with its token or window), and the map has {len(places)}: restore it"
            ' with backend="restoration", or name more sites'
        )


def _has_text(pipe: DiffusionPipeline, chosen) -> bool:
    """Whether sites of a text encoder are asked for by name."""
    if chosen is None:
        return False
    return any(site.network in tokenizers_of(pipe) for group in resolve(pipe, chosen) for site in group)


def plan_attributes(pipe: DiffusionPipeline, plan: Plan) -> dict[str, str | int | float]:
    """All that is needed to run a plan again, and versions, as attributes of a map."""
    scheduler = {"class": type(pipe.scheduler).__name__} | dict(pipe.scheduler.config)
    cases = [
        dataclasses.asdict(case) | {"corruption": {"class": type(case.corruption).__name__, **vars(case.corruption)}}
        for case in plan.cases
    ]
    return {
        "pipeline": str(pipe.config.get("_name_or_path") or type(pipe).__name__),
        "pipeline_class": type(pipe).__name__,
        "dtype": str(pipe.dtype),
        "device": str(pipe._execution_device),
        "scheduler": json.dumps(scheduler, default=str),
        "cases": json.dumps(cases),
        "metric": ", ".join(metric_name(metric) for metric in plan.metrics),
        "metric_options": json.dumps(
            {metric_name(metric): metric_options(metric) for metric in plan.metrics}, default=str
        ),
        "intervention": plan.mode,
        "batch_size": plan.batch_size,
        **dataclasses.asdict(plan.sampling),
        "versions": json.dumps(provenance(pipe)["versions"]),
    }
