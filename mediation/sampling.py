"""One call of the pipeline with every run of an experiment as a row: clean, sham, then one row per intervention.

All rows share the starting latent and, with stochastic samplers, the noise of every step. The pipeline's own
`__call__` is the sampler.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from mediation import interventions
from mediation.cases import Case, GaussianNoise, align, group_positions, segments
from mediation.hooks import hooked
from mediation.pipelines import family_of, quiet
from mediation.sites import Site

CLEAN, SHAM = 0, 1
N_CONTROLS = 2


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What one row restores: sites together, at some token positions, in some window of sampling.

    Attributes:
        sites: restored together; none for the corrupted run itself.
        pairs: (clean position, corrupted position) of each token restored in text encoders; None is all of them.
        window: fractions (start, stop) of sampling within which sites of the denoiser are restored.
    """

    sites: tuple[Site, ...] = ()
    pairs: tuple[tuple[int, int], ...] | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def covers(self, fraction: float) -> bool:
        """Whether the window is open when this fraction of sampling is done."""
        return self.window[0] <= fraction < self.window[1]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled, the same for every row.

    Attributes:
        num_inference_steps: steps of the pipeline's scheduler.
        guidance_scale: classifier-free guidance; at 1 or below there is no unconditional half.
        branch: the half of the denoiser's batch that is restored: "cond", "uncond" or "both".
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    branch: str = "cond"

    def __post_init__(self):
        if self.branch not in ("cond", "uncond", "both"):
            raise ValueError(f'branch must be "cond", "uncond" or "both", got {self.branch!r}')
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.branch != "cond" and not self.guided:
            raise ValueError(f"at guidance_scale={self.guidance_scale} there is no unconditional branch to restore")

    @property
    def guided(self) -> bool:
        """Whether the denoiser sees an unconditional half."""
        return self.guidance_scale > 1


@torch.no_grad()
def sample_rows(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention], sampling: Sampling
) -> torch.Tensor:
    """Samples the clean row, the sham row, and one row per intervention.

    Returns:
        Final latents, (row, channel, height, width): row 0 is the clean run, row 1 the corrupted run, nothing restored.
    """
    family = family_of(pipe)
    n_rows = N_CONTROLS + len(rows)
    conditioning = encode_rows(pipe, case, draw, rows)
    if sampling.guided:
        for name, value in family.encode(pipe, [""]).items():
            conditioning[f"negative_{name}"] = value.expand(n_rows, *value.shape[1:])
    noise = torch.randn((1, *family.latent_shape(pipe)), generator=torch.Generator().manual_seed(case.seed))
    denoiser = getattr(pipe, family.denoiser)
    latents = noise.expand(n_rows, -1, -1, -1).to(pipe._execution_device, denoiser.dtype)
    progress = _Progress(pipe)
    halves = family.guidance_halves if sampling.guided else ("cond",)
    offsets = [i * n_rows for i, half in enumerate(halves) if sampling.branch in (half, "both")]
    changes = [
        (module, _denoiser_restoration(targets, offsets, progress))
        for module, targets in _by_module(pipe, rows, lambda site: site.network == family.denoiser).items()
    ]
    with hooked(changes), quiet(pipe):
        output = pipe(
            **conditioning,
            latents=latents,
            generator=[torch.Generator().manual_seed(case.seed + 1) for _ in range(n_rows)],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="latent",
            callback_on_step_end=progress.advance,
        )
    return output.images


@torch.no_grad()
def encode_rows(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention]
) -> dict[str, torch.Tensor]:
    """What the denoiser reads in the clean row, the sham row and one row per intervention."""
    family = family_of(pipe)
    n_rows = N_CONTROLS + len(rows)
    corrupted_rows = range(SHAM, n_rows)
    noise = case.corruption if isinstance(case.corruption, GaussianNoise) else None
    changes = [
        (module, _text_restoration(targets))
        for module, targets in _by_module(pipe, rows, lambda site: site.network != family.denoiser).items()
    ]
    if noise and noise.where == "input":
        for encoder, tokenizer in family.text_encoders:
            table = getattr(pipe, encoder).get_input_embeddings()
            positions = clean_groups(getattr(pipe, tokenizer), case)["subject"]
            values = noise.scale * table.weight.float().std() * _noise(noise, case, draw, positions, table.weight)
            changes.append((table, _addition(corrupted_rows, positions, values)))
    with hooked(changes):
        conditioning = family.encode(pipe, [case.prompt] + [case.corrupted_prompt] * (n_rows - 1))
    if noise and noise.where == "output":
        states = conditioning["prompt_embeds"]
        positions = clean_groups(getattr(pipe, family.text_encoders[0][1]), case)["subject"]
        values = noise.scale * states[CLEAN].float().std() * _noise(noise, case, draw, positions, states)
        conditioning["prompt_embeds"] = interventions.add(states, corrupted_rows, positions, values)
    return conditioning


def clean_groups(tokenizer, case: Case) -> dict[str, tuple[int, ...]]:
    """Token positions of the clean prompt by group name."""
    return group_positions(segments(tokenizer, case.prompt, case.spans))


def token_pairs(tokenizer, case: Case, positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(clean position, corrupted position) for those of `positions` that have a partner in the corrupted prompt."""
    partners = align(
        segments(tokenizer, case.prompt, case.spans),
        segments(tokenizer, case.corrupted_prompt, case.corrupted_spans),
    )
    return tuple((position, partners[position]) for position in positions if position in partners)


def _noise(noise: GaussianNoise, case: Case, draw: int, positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return noise.noise((len(positions), like.shape[-1]), case.seed, draw).to(like.device)


def _by_module(
    pipe: DiffusionPipeline, rows: Sequence[Intervention], belongs: Callable[[Site], bool]
) -> dict[nn.Module, list[tuple[int, Intervention]]]:
    """The rows that each module's hook must change."""
    targets = defaultdict(list)
    for row, intervention in enumerate(rows, start=N_CONTROLS):
        for site in intervention.sites:
            if belongs(site):
                targets[site.module(pipe)].append((row, intervention))
    return targets


def _text_restoration(targets: list[tuple[int, Intervention]]) -> Callable[[torch.Tensor], torch.Tensor]:
    copies = {row: intervention.pairs for row, intervention in targets}
    return lambda output: interventions.restore(output, CLEAN, copies)


def _denoiser_restoration(
    targets: list[tuple[int, Intervention]], offsets: list[int], progress: "_Progress"
) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(output: torch.Tensor) -> torch.Tensor:
        active = [row for row, intervention in targets if intervention.covers(progress.fraction)]
        for offset in offsets if active else ():
            output = interventions.restore(output, offset + CLEAN, {offset + row: None for row in active})
        return output

    return change


def _addition(rows: Sequence[int], positions: Sequence[int], values: torch.Tensor):
    return lambda output: interventions.add(output, rows, positions, values)


class _Progress:
    """How much of sampling is done, told by the pipeline itself: denoiser calls are not steps."""

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe, self._n_done = pipe, 0

    @property
    def fraction(self) -> float:
        return self._n_done / self._pipe.num_timesteps

    def advance(self, _pipe, index: int, _timestep, tensors: dict) -> dict:
        self._n_done = index + 1
        return tensors
