"""Runs are rows of one batch: the clean one, the corrupted one, and one for each intervention."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from mediation.hooks import Change, hooked
from mediation.interventions import Copy, restore
from mediation.sites import Site

CLEAN, CORRUPTED = 0, 1
N_CONTROLS = 2
MODES = ("restore", "knock_out")


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What one row takes from another run: sites together, at some token positions, in some window of sampling.

    Attributes:
        sites: changed together; none for an untouched run.
        pairs: by text encoder, the (clean position, corrupted position) of each token that is changed; an encoder that
            is absent is changed at all positions.
        window: fractions (start, stop) of sampling within which sites of the denoiser are changed.
        mode: "restore" puts the clean run's activations into a corrupted run, "knock_out" the corrupted run's into a
            clean one.
    """

    sites: tuple[Site, ...] = ()
    pairs: Mapping[str, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)
    window: tuple[float, float] = (0.0, 1.0)
    mode: str = "restore"

    @property
    def donor(self) -> int:
        """The row that activations are taken from."""
        return CLEAN if self.mode == "restore" else CORRUPTED

    @property
    def sham(self) -> int:
        """The row that this one equals as long as nothing is changed in it."""
        return CORRUPTED if self.mode == "restore" else CLEAN

    def covers(self, fraction: float) -> bool:
        """Whether the window is open when this fraction of sampling is done."""
        return self.window[0] <= fraction < self.window[1]

    def positions(self, network: str) -> tuple[tuple[int, int], ...] | None:
        """(position in the donor, position in this row) of each token to copy in a text encoder; None is all."""
        pairs = self.pairs.get(network)
        if pairs is None or self.mode == "restore":
            return pairs
        return tuple((corrupted, clean) for clean, corrupted in pairs)


@dataclasses.dataclass(frozen=True)
class Target:
    """A site that an intervention changes, and the row in which it does."""

    row: int
    intervention: Intervention
    site: Site


# what a target asks for at this moment; the slice is its part of the activation's last dimension
Copies = Callable[[Target, slice], Iterable[Copy]]


def intervening(
    pipe: DiffusionPipeline,
    rows: Sequence[Intervention],
    networks: Collection[str],
    copies: Copies,
    also: Iterable[tuple[nn.Module, Change]] = (),
) -> contextlib.AbstractContextManager[None]:
    """Changes the rows of whatever runs inside, at those of their sites that are in `networks`.

    Args:
        pipe: the pipeline.
        rows: what happens in the rows behind the controls.
        networks: names of networks.
        copies: what a target asks for, decided each time its module runs.
        also: further changes of modules' outputs.

    Raises:
        RuntimeError: as `changing` does.
    """
    return changing(pipe, rows, networks, functools.partial(_change, copies=copies), also)


@contextlib.contextmanager
def changing(
    pipe: DiffusionPipeline,
    rows: Sequence[Intervention],
    networks: Collection[str],
    change: Callable[[list[Target]], Change],
    also: Iterable[tuple[nn.Module, Change]] = (),
) -> Iterator[None]:
    """Passes the activations of sites in `networks` through functions, whatever runs inside.

    Args:
        pipe: the pipeline.
        rows: which sites, and for the sake of which row behind the controls.
        networks: names of networks.
        change: makes the function of one module, of all that rows want of it.
        also: further changes of modules' outputs.

    Raises:
        RuntimeError: at the end, if a module ran less often than its network, so that a change was skipped.
    """
    by_module = collections.defaultdict(list)
    for row, intervention in enumerate(rows, start=N_CONTROLS):
        for site in intervention.sites:
            if site.network in networks:
                by_module[site.network, site.path].append(Target(row, intervention, site))
    outputs = [*also, *((getattr(pipe, network), lambda output: output) for network in networks)]
    inputs = []
    for targets in by_module.values():
        site = targets[0].site
        (outputs if site.head is None else inputs).append((site.module(pipe), change(targets)))
    with hooked(outputs, inputs=inputs) as n_calls:
        yield
    for (network, path), (target, *_) in by_module.items():
        n_runs, expected = n_calls[target.site.module(pipe)], n_calls[getattr(pipe, network)]
        if n_runs != expected:
            raise RuntimeError(
                f"{network}.{path} ran {n_runs} times while the {network} ran {expected} times, so interventions at"
                f" {target.site.name} were skipped: turn off whatever caches or compiles parts of this pipeline"
            )


def _change(targets: list[Target], copies: Copies) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        wanted = [copy for one in targets for copy in copies(one, one.site.features(tensor.shape[-1]))]
        return restore(tensor, wanted) if wanted else tensor

    return change
