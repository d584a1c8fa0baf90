"""Rows of the denoiser's batch that are still the run they start as: it computes that one for them."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from mediation.hooks import is_hooked
from mediation.rows import N_CONTROLS, Intervention


class Waiting:
    """Which rows of a batch the denoiser computes in its current call, and where they stand among those.

    In either half of guidance, a row waits for as long as nothing is changed in it, its text is that of the run that it
    starts as (its sham), and its latents are that run's, bit for bit. So nothing is presumed of the scheduler: one that
    gives each row noise of its own sets them apart, and they are computed. All rows share the unconditional text: in
    the step in which a row is first changed, that half of it still waits.

    Args:
        rows: what happens in the rows behind the controls.
        denoiser: the name of the network.
        halves: names of the halves of its batch, in their order.
        changed: which of these are changed, by their place.
        equal_halves: whether a row waits in all halves or in none.
    """

    def __init__(
        self,
        rows: Sequence[Intervention],
        denoiser: str,
        halves: Sequence[str],
        changed: Collection[int],
        *,
        equal_halves: bool,
    ):
        self._rows, self._denoiser, self._halves, self._changed = rows, denoiser, halves, changed
        self._equal_halves = equal_halves
        self._computed: list[int] = []

    def stand_ins(self, latents: torch.Tensor, fraction: float) -> list[int]:
        """For each row of the denoiser's batch the one that is computed for it, when `fraction` of sampling is done.

        Args:
            latents: (half and row, channel, height, width); the halves of guidance hold the same latents.
            fraction: of sampling, as of `Intervention.covers`.
        """
        halves = range(len(self._halves))
        chosen = list(range(self._start(len(halves))))
        for row, intervention in enumerate(self._rows, start=N_CONTROLS):
            waits = [self._may_wait(half, intervention, fraction) for half in halves]
            if self._equal_halves:
                waits = [all(waits)] * len(halves)
            if any(waits) and torch.equal(latents[row], latents[intervention.sham]):
                for half in halves:
                    chosen[self._start(half) + row] = self._start(half) + (intervention.sham if waits[half] else row)
        self._computed = sorted(set(chosen))
        return chosen

    def places(self, half: int, rows: Sequence[int]) -> list[int]:
        """Where rows of one half, which are computed, stand in what is computed."""
        return [self._computed.index(self._start(half) + row) for row in rows]

    def _start(self, half: int) -> int:
        return half * (N_CONTROLS + len(self._rows))

    def _may_wait(self, half: int, intervention: Intervention, fraction: float) -> bool:
        networks = {site.network for site in intervention.sites}
        is_changed = self._denoiser in networks and half in self._changed and intervention.covers(fraction)
        own_text = self._halves[half] == "cond" and networks != {self._denoiser}
        # a row without sites may be changed by other means, and by its number
        return bool(networks) and not is_changed and not own_text


def treats_rows_alike(denoiser: nn.Module) -> bool:
    """Whether nothing but its own code runs in a denoiser: what others added may take a batch for two equal halves."""
    own = (_is_its_own(part) for part in denoiser.modules() if part is not denoiser)
    return not is_hooked(denoiser) and all(own)


def _is_its_own(module: nn.Module) -> bool:
    """Whether a module's forward is that of its class, and its attention is computed by diffusers."""
    processor = getattr(module, "processor", None)
    return "forward" not in vars(module) and (processor is None or type(processor).__module__.startswith("diffusers."))
