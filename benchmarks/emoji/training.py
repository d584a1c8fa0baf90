"""What the training scripts share: precision, the learning-rate schedule, checkpoints that resume, the log."""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Iterable

import torch

# Processors without instructions for bfloat16 emulate it, many times slower than float32.
_BFLOAT16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
BFLOAT16_IS_FAST = any(map(torch.cpu.get_capabilities().get, _BFLOAT16_FEATURES))


def fast_arithmetic() -> torch.autocast:
    """A context in which torch computes in bfloat16 where this processor is fast in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16_IS_FAST)


def arguments(description: str, **defaults) -> argparse.Namespace:
    """Parses the options common to every training script; `defaults` adds numeric options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def warmup_cosine(step: int, n_steps: int, n_warmup: int = 100) -> float:
    """The learning rate's factor at `step`: linear warm-up, then a half cosine down to 2%."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def descend(
    loss: torch.Tensor,
    model: torch.nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    lr: float,
    max_norm: float = 1.0,
) -> None:
    """Steps `optimizers` at the learning rate `lr` along the gradient of `loss` in `model`, clipped to `max_norm`."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


class Run:
    """A training run in a folder: `state` (modules and optimizers) saved to one file, and a JSON-lines log."""

    def __init__(self, folder: pathlib.Path, name: str, state: dict, every_seconds: float = 600.0):
        self.name, self.state, self.every_seconds = name, state, every_seconds
        self.checkpoint = folder / f"{name}.checkpoint.pt"
        self.log_file = folder / f"{name}.log.jsonl"
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            for key, holder in state.items():
                holder.load_state_dict(saved[key])
            self.step, self.seconds = saved["step"], saved["seconds"]
            torch.manual_seed(torch.initial_seed() + self.step)  # not the noise that the first steps had
        self._started = self._saved = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self.seconds + time.monotonic() - self._started

    def due(self) -> bool:
        """Whether the last checkpoint is older than `every_seconds`."""
        return time.monotonic() - self._saved > self.every_seconds

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then replaces that."""
        payload = {key: holder.state_dict() for key, holder in self.state.items()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**payload, "step": self.step, "seconds": self.elapsed()}, temporary)
        temporary.replace(self.checkpoint)
        self._saved = time.monotonic()

    def log(self, **values) -> None:
        """Appends a line of figures to the log, and prints it."""
        record = {"step": self.step, "seconds": round(self.elapsed(), 1)}
        record |= {key: round(float(torch.as_tensor(value).detach()), 5) for key, value in values.items()}
        with self.log_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(self.name, record, flush=True)
