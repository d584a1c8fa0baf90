"""Which latents mediate an effect: causal maps in which single latents of an autoencoder are restored or ablated."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import numpy
import torch
import xarray
from diffusers import DiffusionPipeline

from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.places import Moment, find_site
from mediation.autoencoders.splicing import check_spliceable, spliced
from mediation.badrows import warn_of_bad_rows, without_bad_rows
from mediation.cases import Case
from mediation.effects import indirect_effect
from mediation.metrics import Metric
from mediation.plans import Plan, checked_integer, make_plan
from mediation.restoration import restoration
from mediation.rows import N_CONTROLS, Intervention
from mediation.sampling import Progress, Sampling, sample_rows
from mediation.schema import check
from mediation.tracing import label, plan_attributes
from mediation.windows import WHOLE

LATENT_MODES = ("restore", "knock_out", "ablate")


def trace_latents(
    pipe: DiffusionPipeline,
    sae: SparseAutoencoder,
    cases: Case | Sequence[Case],
    *,
    latents: Sequence[int] | None = None,
    mode: str = "restore",
    metric: Metric | Sequence[Metric] | None = None,
    windows: str | Sequence[tuple[float, float]] | None = None,
    branch: str = "cond",
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> xarray.Dataset:
    """Measures what single latents carry of a corrupted subject, as `mediation.trace` does for whole sites.

    In a row of its own, one latent c of the activation x takes another value, at all positions:

        x + (z'_c − z_c) f_c       z'_c of the clean run (restore), of the corrupted run (knock_out), or 0 (ablate)

    with f_c the latent's direction. All other latents stay as they are, and so does what the autoencoder misses.
    Restoring asks whether a latent is sufficient; to knock it out of the clean run, or to ablate it there, asks whether
    it is necessary.

    Args:
        pipe: a diffusers pipeline of a supported family.
        sae: an autoencoder that knows its place.
        cases: what to corrupt, one case or several.
        latents: which ones; None is all of them. Each is a row of sampling, for every case, draw and window.
        mode: "restore", "knock_out" or "ablate".
        metric: as of `mediation.trace`.
        windows: (start, stop) fractions of sampling in which to change latents, or "each" for one per step; adds a
            `window` dimension. None is all of sampling, whatever steps the autoencoder was trained on.
        branch: half of the guided batch that is changed in the denoiser: "cond", "uncond" or "both".
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: as of `mediation.trace`.
        progress: shows a progress bar on a terminal.

    Returns:
        A map as of `mediation.trace`, with a dimension `latent` in place of tokens, which `mediation.summarize`,
        `compare`, `plot_effects` and files take. The attribute `latent_mode` is the mode; `autoencoder` says how the
        autoencoder was made, and `autoencoder_fingerprint` which one it is.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline or the autoencoder.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> sae = mediation.SparseAutoencoder(192, 384, k=8, place=mediation.Place("unet.mid.0"))
        >>> case = mediation.Case("a cat in the style of ink", subject="ink")
        >>> effects = mediation.trace_latents(pipe, sae, case, latents=[3, 5], num_inference_steps=2)
        >>> dict(effects.sizes)
        {'case': 1, 'draw': 1, 'site': 1, 'latent': 2}
    """
    check_spliceable(pipe, sae, branch)
    if mode not in LATENT_MODES:
        raise ValueError(f"mode must be one of {', '.join(LATENT_MODES)}; got {mode!r}")
    chosen = tuple(sae.check_latents(range(sae.n_latents) if latents is None else latents))
    plan = make_plan(
        pipe,
        cases,
        sites=[find_site(pipe, sae.place.site)],
        metric=metric,
        tokens=None,
        windows=windows,
        mode="restore" if mode == "restore" else "knock_out",
        sampling=Sampling(checked_integer("num_inference_steps", num_inference_steps), guidance_scale, branch),
        batch_size=batch_size,
        images=None,
        progress=progress,
    )
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    # latents stand where tokens do in maps of text encoders
    plan = LatentPlan(**fields | {"tokens": chosen, "sae": sae, "ablates": mode == "ablate"})
    attributes = {"backend": "latents", "latent_mode": mode, "autoencoder": json.dumps(sae.config)}
    attributes |= {"autoencoder_fingerprint": sae.fingerprint, **plan_attributes(pipe, plan)}
    effects = label(plan, restoration(pipe, plan)).rename(token="latent")
    effects.attrs = attributes
    warn_of_bad_rows(effects)
    return effects


def top_latents(effects: xarray.Dataset, k: int = 5) -> list[int]:
    """The k latents with the largest mean indirect effect, largest first; over windows, at their best.

    Those of which some row is not finite are left out, with a warning.

    Raises:
        ValueError: if k is not positive, or `effects` is no map of latents, or one of several metrics.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check(effects, one_metric=True)
    if "latent" not in effects.dims:
        raise ValueError("expected a map that mediation.trace_latents returns, but it has no dimension 'latent'")
    mean = indirect_effect(without_bad_rows(effects)).mean(("case", "draw"))
    best = mean.max([dim for dim in mean.dims if dim != "latent"])
    order = numpy.argsort(-best.values, kind="stable")
    return [int(best.latent.values[i]) for i in order[:k] if not numpy.isnan(best.values[i])]


@dataclasses.dataclass(frozen=True)
class LatentIntervention(Intervention):
    """One latent that a row takes from another, or loses; no whole site.

    Attributes:
        latent: which one.
    """

    latent: int = 0


@dataclasses.dataclass(frozen=True)
class LatentPlan(Plan):
    """A plan whose interventions change single latents of an autoencoder.

    Attributes:
        sae: the autoencoder.
        ablates: whether latents are set to 0.
    """

    sae: SparseAutoencoder | None = None
    ablates: bool = False

    def interventions(
        self, pipe: DiffusionPipeline, case: Case
    ) -> Iterator[tuple[tuple[int, int, int], LatentIntervention]]:
        """Every intervention by its index (site, latent, window)."""
        for j, latent in enumerate(self.tokens):
            for k, window in enumerate(self.windows or (WHOLE,)):
                yield (0, j, k), LatentIntervention(window=window, mode=self.mode, latent=latent)

    def sample(self, pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention]) -> torch.Tensor:
        """Final latents, as of `Plan.sample`; the rows' latents are changed on the way."""
        numbered, progress = enumerate(rows, start=N_CONTROLS), Progress(pipe)
        latent_rows = {row: one for row, one in numbered if isinstance(one, LatentIntervention)}

        def edit(latents: torch.Tensor, _activations: torch.Tensor, _moment: Moment) -> torch.Tensor:
            now = {row: one for row, one in latent_rows.items() if one.covers(progress.fraction)}
            changed = latents.clone() if now else latents
            for row, one in now.items():
                changed[row, ..., one.latent] = 0.0 if self.ablates else latents[one.donor, ..., one.latent]
            return changed

        with spliced(pipe, self.sae, edit, branch=self.sampling.branch):
            return sample_rows(pipe, case, draw, rows, self.sampling, progress=progress)
