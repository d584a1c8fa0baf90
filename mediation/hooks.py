"""Forward hooks: the only file that registers them, and it always removes them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def hooked(changes: Iterable[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]]) -> Iterator[None]:
    """Passes modules' outputs through functions for a while; of a tuple, the first entry is the output.

    Args:
        changes: (module, function) pairs. A function returns the tensor that takes the place of the module's output.

    Example:
        >>> layer = nn.Identity()
        >>> with hooked([(layer, lambda output: output + 1)]):
        ...     layer(torch.zeros(2))
        tensor([1., 1.])
        >>> layer(torch.zeros(2))
        tensor([0., 0.])
    """
    with contextlib.ExitStack() as stack:
        for module, function in changes:
            stack.callback(module.register_forward_hook(_on_output(function)).remove)
        yield


def input_of(module: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """The tensor that `module` receives in `run()`, which is stopped there: nothing behind the module is computed.

    Raises:
        RuntimeError: if the run ends without reaching the module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> input_of(model[1], lambda: model(torch.zeros(1, 2))).shape
        torch.Size([1, 3])
    """

    def stop(_module, arguments):
        raise _Reached(arguments[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise RuntimeError(f"the run never reached the {type(module).__name__} whose input was asked for")


class _Reached(Exception):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value


def _on_output(function: Callable[[torch.Tensor], torch.Tensor]):
    def hook(_module, _arguments, output):
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    return hook
