"""Gradients through sampling, exact for any scheduler, with the graph of one denoiser call at a time.

The pipeline's own loop runs with gradients on, but each call of the denoiser keeps its inputs only. On the way back
they are visited last to first: each is computed again, now with its graph, which the gradient crosses and leaves
behind. What stays in memory meanwhile are latents, with the scheduler's own arithmetic on them as autograd recorded
it. So multistep schedulers need no adjoint of their own.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from mediation.pipelines import family_of

# Entered with the number of a call while it is computed again and its gradient is taken.
Around = Callable[[int], contextlib.AbstractContextManager]


@contextlib.contextmanager
def differentiable(pipe: DiffusionPipeline, around: Around = contextlib.nullcontext) -> Iterator[None]:
    """Lets gradients flow through what the pipeline samples inside; they are to be taken outside.

    The pipeline's scheduler keeps what it has seen for the next step. A copy takes its place meanwhile, so that no
    graph is left in the pipeline.

    Args:
        pipe: the pipeline; its weights should be `frozen` until gradients are taken.
        around: makes the context in which one call of the denoiser, by its number from 0, is computed again.

    Example:
        >>> import mediation
        >>> from mediation.sampling import Sampling, denoise
        >>> pipe = mediation.load_pipeline()
        >>> x = torch.zeros(1, *family_of(pipe).latent_shape(pipe), requires_grad=True)
        >>> case, sampling = mediation.Case("a cat", subject="cat"), Sampling(num_inference_steps=2)
        >>> with frozen(pipe), differentiable(pipe):
        ...     latents = denoise(pipe, case, family_of(pipe).encode(pipe, ["a cat"]), x, sampling)
        >>> torch.autograd.grad(latents.mean(), x)[0].shape
        torch.Size([1, 4, 16, 16])
    """
    scheduler = pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)
    try:
        with recomputing(getattr(pipe, family_of(pipe).denoiser), around):
            yield
    finally:
        pipe.scheduler = scheduler


def rows_with_graph(pipe: DiffusionPipeline) -> int:
    """Rows whose graph takes as much memory as 16 rows of 16×16 latents, within reason: what may run at once."""
    _, height, width = family_of(pipe).latent_shape(pipe)
    return max(1, min(16, 16 * 16 * 16 // (height * width)))


@contextlib.contextmanager
def frozen(pipe: DiffusionPipeline) -> Iterator[None]:
    """Records no operation for the sake of weights, for a while: their gradients would take the most memory."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    tracked = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in tracked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in tracked:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def uncheckpointed(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps whole graphs of networks for a while, where gradient checkpointing would run them, and hooks, once more."""
    every = [module for network in networks for module in network.modules()]
    switched = [module for module in every if vars(module).get("gradient_checkpointing")]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


@contextlib.contextmanager
def recomputing(module: nn.Module, around: Around = contextlib.nullcontext) -> Iterator[None]:
    """Keeps the inputs of a module's calls inside in place of their graphs; gradients are to be taken outside.

    A call is made again with the hooks that it had, which belong to what is differentiated.

    Args:
        module: computes a tuple of tensors, the same each time.
        around: as of `differentiable`.

    Example:
        >>> class Square(nn.Module):
        ...     def forward(self, x):
        ...         return (x * x,)
        >>> square, x = Square(), torch.tensor(3.0, requires_grad=True)
        >>> with recomputing(square):
        ...     y = square(square(x)[0])[0]
        >>> torch.autograd.grad(y, x)[0].item()  # 4 x³
        108.0
    """
    # All of a call, hooks included, where torch.nn.Module looks for it: a lean `forward` would run between the module's
    # own hooks, and these once more in each call that is made again.
    whole, own = module._call_impl, vars(module).get("_call_impl")
    numbers = itertools.count()

    def lean(*arguments, **options):
        leaves, structure = pytree.tree_flatten((arguments, options))
        tracked = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        others = [None if i in tracked else leaf for i, leaf in enumerate(leaves)]

        def call(function: Callable, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            given = dict(zip(tracked, inputs, strict=True))
            positional, named = pytree.tree_unflatten([given.get(i, x) for i, x in enumerate(others)], structure)
            return function(*positional, **named)

        def again(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if vars(module).get("_call_impl") is lean:
                raise RuntimeError("gradients are to be taken outside of this context")
            return call(module, inputs)

        inputs = [leaves[i] for i in tracked]
        return _Recomputed.apply(functools.partial(call, whole), again, around, next(numbers), *inputs)

    module._call_impl = lean
    try:
        yield
    finally:
        if own is None:
            del module._call_impl
        else:
            module._call_impl = own


class _Recomputed(torch.autograd.Function):
    """A call that is made again to take its gradient."""

    @staticmethod
    def forward(ctx, once: Callable, again: Callable, around: Around, number: int, *inputs: torch.Tensor):
        ctx.again, ctx.around, ctx.number = again, around, number
        ctx.save_for_backward(*inputs)
        return once(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor):
        inputs = tuple(x.detach().requires_grad_(True) for x in ctx.saved_tensors)
        with torch.enable_grad(), ctx.around(ctx.number):
            found = torch.autograd.grad(ctx.again(inputs), inputs, gradients, allow_unused=True)
        return None, None, None, None, *found
