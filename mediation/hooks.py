"""Forward hooks: the only file that registers them, and it always removes them."""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree

Change = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def hooked(
    outputs: Iterable[tuple[nn.Module, Change]] = (), *, inputs: Iterable[tuple[nn.Module, Change]] = ()
) -> Iterator[collections.Counter]:
    """Passes what modules give, or receive, through functions for a while.

    These hooks sit next to the module: hooks that others left on it see the changed output, and have already seen the
    input.

    Args:
        outputs: (module, function) pairs; a function returns the tensor that takes the place of the module's output. Of
            a tuple, the first entry is the output; tensors in an inner tuple, as a U-Net block's skip connections, go
            through the function too.
        inputs: likewise for the module's first positional argument.

    Yields:
        How often each module has run so far.

    Example:
        >>> layer = nn.Identity()
        >>> with hooked([(layer, lambda output: output + 1)]) as n_calls:
        ...     layer(torch.zeros(2)), n_calls[layer]
        (tensor([1., 1.]), 1)
        >>> layer(torch.zeros(2))
        tensor([0., 0.])
    """
    n_calls = collections.Counter()
    with contextlib.ExitStack() as stack:
        for module, function in outputs:
            # First, since transformers leaves a hook on every layer that records hidden states.
            stack.callback(module.register_forward_hook(_on_output(function, n_calls), prepend=True).remove)
        for module, function in inputs:
            stack.callback(module.register_forward_pre_hook(_on_input(function, n_calls)).remove)
        yield n_calls


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


@contextlib.contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[Callable[[], object]]]:
    """Keeps every call of a module, to be made again; of its results, nothing is kept.

    Arguments are kept as the caller gave them, before hooks that others left on the module: these run again.

    Yields:
        The calls so far: functions without arguments.

    Example:
        >>> layer = nn.Identity()
        >>> with recorded_calls(layer) as calls:
        ...     _ = layer(torch.ones(1))
        >>> calls[0]()
        tensor([1.])
    """
    calls = []

    def record(module, arguments, options):
        calls.append(functools.partial(module, *arguments, **options))

    handle = module.register_forward_pre_hook(record, prepend=True, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def represented(module: nn.Module, choose: Callable[[torch.Tensor], Sequence[int]]) -> Iterator[None]:
    """Lets a module compute some rows of its batch, which stand for the others in its output.

    Hooks that others left on the module see the rows that are computed.

    Args:
        module: called with tensors of as many rows as its first argument, and whatever else; returns such tensors.
        choose: given the first argument, says of each row which one stands for it: itself, if it is to be computed.

    Example:
        >>> layer = nn.Identity()
        >>> with represented(layer, lambda rows: [0, 0, 2]):
        ...     layer(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 1., 3.])
    """
    places = None

    def select(_module, arguments, options):
        nonlocal places
        n_rows = len(arguments[0])
        computed, places = torch.tensor(choose(arguments[0])).unique(return_inverse=True)
        if len(computed) == n_rows:
            places = None
            return None
        return pytree.tree_map(lambda leaf: leaf[computed] if _has_rows(leaf, n_rows) else leaf, (arguments, options))

    def repeat(_module, _arguments, output):
        return output if places is None else pytree.tree_map(lambda rows: rows[places], output)

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(select, prepend=True, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(repeat).remove)
        yield


@contextlib.contextmanager
def announced(module: nn.Module, receive: Callable[..., None]) -> Iterator[None]:
    """Passes the arguments of every call of a module to a function, before the call, as the caller gave them.

    Example:
        >>> layer = nn.Identity()
        >>> with announced(layer, print):
        ...     _ = layer(torch.ones(1))
        tensor([1.])
    """

    def tell(_module, arguments, options):
        receive(*arguments, **options)

    handle = module.register_forward_pre_hook(tell, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def is_hooked(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has forward hooks of whomever.

    Example:
        >>> layer = nn.Identity()
        >>> with hooked([(layer, torch.neg)]):
        ...     is_hooked(nn.Sequential(layer))
        True
        >>> is_hooked(nn.Sequential(layer))
        False
    """
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def watched(tensor: torch.Tensor, receive: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The same tensor; its gradient is passed to `receive` on the way back, and the hook goes with the graph.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> (3 * watched(x, print)).sum().backward()
        tensor([3.])
    """
    # A view of its own, since one tensor can leave a module twice, as a block's output and its last skip connection.
    view = tensor.view_as(tensor)
    view.register_hook(receive)
    return view


class _Reached(Exception):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value


def _has_rows(leaf: object, n_rows: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == n_rows


def _on_output(function: Change, n_calls: collections.Counter):
    def hook(module, _arguments, output):
        n_calls[module] += 1
        if not isinstance(output, tuple):
            return function(output)
        first, *others = output
        return function(first), *(tuple(map(function, one)) if isinstance(one, tuple) else one for one in others)

    return hook


def _on_input(function: Change, n_calls: collections.Counter):
    def hook(module, arguments):
        n_calls[module] += 1
        return function(arguments[0]), *arguments[1:]

    return hook
