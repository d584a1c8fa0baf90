"""Training an autoencoder on windows of activations, in steps that can be interrupted after each window."""

import dataclasses
import json
import math
import os
import pathlib

import numpy
import torch
from tqdm import tqdm

from mediation import tensorfiles
from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.objective import PART, explained_variance, geometric_median, losses
from mediation.autoencoders.sources import Source

_AUXILIARY_WEIGHT = 1 / 32
_N_STEP = 4096  # positions, unless a recipe says otherwise
_N_MEDIAN = 16_384  # positions that the bias is first found from, at most
_WORTHWHILE = 1e-3  # gain in explained variance that counts as progress
_KIND = "mediation.training/1"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an autoencoder is trained: Adam on reconstruction + AuxK / 32 (Gao et al. 2024, arXiv:2406.04093).

    Args:
        n_positions: activations to train on, of one position each.
        batch_size: positions of a step, no more than a window of activations holds; None is 4096, or as many as there
            are if a window holds fewer, or training is to see fewer.
        learning_rate: None is 2e-4 √(2¹⁴ / n_latents), the law of Gao et al.; Tinaz et al. use 1e-4. It falls to 0
            over the last fifth of training.
        n_auxiliary: dead latents that each position may use for what is left of it (AuxK); 0 leaves dead latents alone.
        dead_after: positions without activity after which a latent counts as dead.
        max_gradient_norm: gradients of all parameters together are shortened to this length, as dictionary-learning and
            SAELens do; None leaves them alone.
        patience: stops after this many windows without progress in explained variance on what is held out; None goes
            on to the end.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> Recipe(n_positions=10_000).resolved(n_window=5000).batch_size
        4096
    """

    n_positions: int = 1_000_000
    batch_size: int | None = None
    learning_rate: float | None = None
    n_auxiliary: int = 256
    dead_after: int = 200_000
    max_gradient_norm: float | None = 1.0
    patience: int | None = None

    def __post_init__(self):
        for name in ("n_positions", "batch_size", "dead_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size > self.n_positions:
            raise ValueError(f"a step of batch_size={self.batch_size} is more than n_positions={self.n_positions}")
        if self.n_auxiliary < 0:
            raise ValueError(f"n_auxiliary must be at least 0, got {self.n_auxiliary}")
        for name in ("learning_rate", "max_gradient_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience counts windows, at least 1; got {self.patience}")

    def resolved(self, n_window: int) -> "Recipe":
        """The same with a number for the batch size, where windows hold at least `n_window` positions.

        Raises:
            ValueError: if a step takes more.
        """
        size = min(_N_STEP, self.n_positions, n_window) if self.batch_size is None else self.batch_size
        if size > n_window:
            raise ValueError(
                f"a step takes batch_size={size} positions, and a window holds {n_window}: pass a larger buffer, a"
                " smaller batch_size, or more activations"
            )
        return dataclasses.replace(self, batch_size=size)


class Trainer:
    """Takes steps, and knows which latents are dead.

    Attributes:
        sae: what is trained, in place.
        recipe: how.
        n_seen: positions so far.
        silent_for: (latent,), positions since each was last active.
    """

    def __init__(self, sae: SparseAutoencoder, recipe: Recipe):
        self.sae, self.recipe, self.n_seen = sae.requires_grad_(True), recipe, 0
        self.silent_for = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.bias.device)
        self._rate = recipe.learning_rate or 2e-4 * (2**14 / sae.n_latents) ** 0.5
        self._optimizer = torch.optim.Adam(sae.parameters(), lr=self._rate, fused=True)

    @property
    def dead(self) -> torch.Tensor:
        """(latent,), which latents have not been active for long."""
        return self.silent_for >= self.recipe.dead_after

    @torch.no_grad()
    def prepare(self, activations: torch.Tensor) -> None:
        """Sets scale and bias by activations (position, feature): mean square 1, and their geometric median.

        Raises:
            ValueError: if the activations are all alike, or not finite.
        """
        parts = activations.split(PART)
        scale = (sum(part.double().square().sum() for part in parts) / activations.numel()).sqrt()
        if not torch.isfinite(scale) or not any((part != activations[:1]).any() for part in parts):
            raise ValueError("activations must be finite, and not all alike: there is nothing to learn from these")
        self.sae.scale.copy_(scale)
        some = activations[:: math.ceil(len(activations) / _N_MEDIAN)]
        self.sae.bias.copy_(geometric_median(self.sae.normalize(some)))

    def step(self, activations: torch.Tensor) -> float:
        """Takes a step with activations (position, feature), and returns the reconstruction loss before it."""
        found = losses(self.sae, activations, self.dead, self.recipe.n_auxiliary)
        self._optimizer.zero_grad()
        (found.reconstruction + _AUXILIARY_WEIGHT * found.auxiliary).backward()
        remaining = 1 - self.n_seen / self.recipe.n_positions
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, 5 * remaining)
        with torch.no_grad():
            directions = self.sae.decoder
            # what would only lengthen a direction is taken back below, and would mislead Adam's averages
            along = (directions.grad * directions).sum(1, keepdim=True)
            directions.grad -= along * directions
            if self.recipe.max_gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.recipe.max_gradient_norm)
            self._optimizer.step()
            directions /= directions.norm(dim=1, keepdim=True)
            if self.sae.activation == "batch_topk":
                n_steps = int(self._optimizer.state[self.sae.bias]["step"])
                self.sae.threshold.lerp_(found.smallest, max(0.01, 1 / n_steps))
            self.silent_for += len(activations)
            self.silent_for[found.fired] = 0
        self.n_seen += len(activations)
        return float(found.reconstruction.detach())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that `restore` needs but `n_seen`."""
        found = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()} | {
            "silent_for": self.silent_for
        }
        for number, state in self._optimizer.state_dict()["state"].items():
            found |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor], n_seen: int) -> None:
        """Goes back to where `tensors` was called."""
        parts: dict[str, dict] = {"sae": {}, "adam": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "sae":
                parts["sae"][rest] = tensor
            elif kind == "adam":
                number, _, moment = rest.partition(".")
                parts["adam"].setdefault(int(number), {})[moment] = tensor
        self.sae.load_state_dict(parts["sae"])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": parts["adam"], "param_groups": groups})
        self.silent_for, self.n_seen = tensors["silent_for"].to(self.silent_for.device), n_seen


def train(
    sae: SparseAutoencoder,
    source: Source,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> SparseAutoencoder:
    """Trains an autoencoder in place, and notes in its metadata how that went.

    Args:
        sae: the autoencoder, as it was made.
        source: of the activations; one of its windows is in memory at a time, beside what is held out.
        recipe: how to train.
        seed: of the order of activations within windows.
        checkpoint: a .safetensors file, written after each window; if it is there, training goes on from it, and ends
            where an uninterrupted one would have ended.
        progress: shows a progress bar on a terminal.

    Returns:
        The autoencoder, its weights frozen.

    Raises:
        ValueError: before any step, if widths differ, or a step takes more than a window holds, or the checkpoint is of
            another training, or there is nothing to learn from, or to judge by, in what is held out.
        ValueError: after some steps, if the loss is not finite; the checkpoint is of the window before.
    """
    if source.n_features != sae.n_features:
        raise ValueError(f"the source has {source.n_features} features, and the autoencoder reads {sae.n_features}")
    recipe = recipe.resolved(source.n_positions)
    path = None if checkpoint is None else tensorfiles.checked_path(checkpoint)
    told = {
        "autoencoder": sae.config,
        "recipe": dataclasses.asdict(recipe),
        "source": source.describe(),
        "seed": seed,
    }
    told = json.loads(json.dumps(told))
    trainer, history = Trainer(sae, recipe), []
    if path is not None and path.exists():
        history = _resume(trainer, path, told)
    held_out = source.held_out()
    if not torch.isfinite(held_out).all() or not (held_out != held_out[:1]).any():
        raise ValueError(f"the {len(held_out)} activations that are held out must be finite, and not all alike")
    options = {"unit": "position", "unit_scale": True, "disable": None if progress else True}
    with tqdm(total=recipe.n_positions, initial=trainer.n_seen, desc="training", **options) as bar:
        while trainer.n_seen < recipe.n_positions and not _has_stalled(history, recipe.patience):
            activations = source.window(len(history))
            if not history:
                trainer.prepare(activations)
            n_before = trainer.n_seen
            loss = _train_on(trainer, activations, seed=seed, window=len(history))
            del activations  # before anything else is measured, or drawn
            history.append(
                {
                    "n_positions": trainer.n_seen,
                    "loss": loss,
                    "explained_variance": explained_variance(sae, held_out),
                    "n_dead": int(trainer.dead.sum()),
                }
            )
            if path is not None:
                _save(trainer, path, told, history)
            bar.update(trainer.n_seen - n_before)
            bar.set_postfix(explained=f"{history[-1]['explained_variance']:.1%}", dead=history[-1]["n_dead"])
    sae.metadata |= {"training": {name: told[name] for name in ("recipe", "source", "seed")} | {"history": history}}
    return sae.requires_grad_(False)


def _train_on(trainer: Trainer, activations: torch.Tensor, *, seed: int, window: int) -> float:
    """Trains on a window in an order of its own, and returns the mean loss; an incomplete batch is left out."""
    state = int(numpy.random.SeedSequence([seed, window]).generate_state(1)[0])
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(state))
    device, size, found = trainer.sae.bias.device, trainer.recipe.batch_size, []
    for batch in order.split(size):
        if len(batch) < size or trainer.n_seen >= trainer.recipe.n_positions:
            break
        n_before, loss = trainer.n_seen, trainer.step(activations[batch].to(device))
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} after {n_before} positions: there are activations that are not finite among the"
                " next, or the learning rate is too high; a checkpoint, if there is one, is of the window before"
            )
        found.append(loss)
    return sum(found) / len(found)


def _has_stalled(history: list[dict], patience: int | None) -> bool:
    """Whether the last windows explain no more than those before."""
    if patience is None or len(history) <= patience:
        return False
    found = [entry["explained_variance"] for entry in history]
    return max(found[-patience:]) < max(found[:-patience]) + _WORTHWHILE


def _save(trainer: Trainer, path: pathlib.Path, told: dict, history: list[dict]) -> None:
    """Writes a checkpoint; whoever interrupts this leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.unfinished.safetensors")
    tensorfiles.write(unfinished, trainer.tensors(), {"training": told, "progress": {"history": history}}, _KIND)
    unfinished.replace(path)


def _resume(trainer: Trainer, path: pathlib.Path, told: dict) -> list[dict]:
    tensors, header = tensorfiles.read(path, _KIND)
    if differing := sorted(name for name in told if header["training"].get(name) != told[name]):
        raise ValueError(
            f"{path} is of another training ({', '.join(differing)} differ): choose another file, or remove it"
        )
    history = header["progress"]["history"]
    trainer.restore(tensors, history[-1]["n_positions"])
    return history
