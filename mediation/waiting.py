"""Rows that wait for their window are still the run that they start as, and the denoiser computes that one for them."""

from collections.abc import Sequence

import torch

from mediation.rows import N_CONTROLS, Intervention


class Waiting:
    """Which rows of a batch the denoiser computes in its current call, and where they stand among those.

    A row waits for as long as nothing is changed in it, its text is that of the run that it starts as (its sham), and
    its latents are that run's, bit for bit. So nothing is presumed of the scheduler: one that gives each row noise of
    its own sets them apart, and they are computed.

    Args:
        rows: what happens in the rows behind the controls.
        denoiser: the name of the network.
    """

    def __init__(self, rows: Sequence[Intervention], denoiser: str):
        self._rows, self._denoiser = rows, denoiser
        self._computed: list[int] = []

    def stand_ins(self, latents: torch.Tensor, fraction: float) -> list[int]:
        """For each row of the denoiser's batch the one that is computed for it, when `fraction` of sampling is done.

        Args:
            latents: (half and row, channel, height, width); the halves of guidance hold the same latents.
            fraction: of sampling, as of `Intervention.covers`.
        """
        chosen = list(range(N_CONTROLS))
        for row, intervention in enumerate(self._rows, start=N_CONTROLS):
            waits = self._may_wait(intervention, fraction) and torch.equal(latents[row], latents[intervention.sham])
            chosen.append(intervention.sham if waits else row)
        self._computed = sorted(set(chosen))
        return [start + row for start in range(0, len(latents), len(chosen)) for row in chosen]

    def places(self, half: int, rows: Sequence[int]) -> list[int]:
        """Where rows that are computed stand in one half of what is computed."""
        start = half * len(self._computed)
        return [start + self._computed.index(row) for row in rows]

    def _may_wait(self, intervention: Intervention, fraction: float) -> bool:
        # a row without sites may be changed by other means, and by its number
        same_text = bool(intervention.sites) and all(site.network == self._denoiser for site in intervention.sites)
        return same_text and not intervention.covers(fraction)
