"""Gradients through sampling equal those of autograd over the whole loop, and take no more memory for more steps."""

import contextlib
import copy
import weakref

import diffusers
import pytest
import torch

from mediation.adjoint import differentiable, frozen, recomputing
from mediation.pipelines import family_of
from mediation.sampling import Sampling, denoise, starting_latents
from tests import tiny
from tests.runs import CASE, double, hooks_of

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


@pytest.fixture(scope="module")
def pipe():
    return double(tiny.shallow())


def use(pipe, name, monkeypatch):
    options = {"skip_prk_steps": True} if name == "pndm" else {}
    monkeypatch.setattr(pipe, "scheduler", SCHEDULERS[name].from_config(pipe.scheduler.config, **options))


def inputs_of(pipe, n_rows=2):
    prompts = ["a red cat", "a dog in ink style"][:n_rows]
    with torch.no_grad():
        doors = family_of(pipe).encode(pipe, prompts)
    start = starting_latents(pipe, CASE, n_rows).clone().requires_grad_()
    return start, {name: value.requires_grad_() for name, value in doors.items()}


def outcome(latents):
    return latents.square().mean() + latents.sin().sum()


def gradients(pipe, context, n_steps):
    start, doors = inputs_of(pipe)
    with context:
        latents = denoise(pipe, CASE, doors, start, Sampling(n_steps, 4.0))
    return torch.autograd.grad(outcome(latents), [start, *doors.values()])


# some of diffusers' schedulers make arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_adjoint_is_autograd_over_the_whole_loop(pipe, name, monkeypatch):
    """Six steps, so that multistep schedulers reach their full order."""
    use(pipe, name, monkeypatch)
    scheduler, hooks = pipe.scheduler, hooks_of(pipe)
    with frozen(pipe):
        found = gradients(pipe, differentiable(pipe), 6)
    assert pipe.scheduler is scheduler
    copy.deepcopy(pipe.scheduler)  # which a graph in its memory would forbid
    assert hooks_of(pipe) == hooks
    assert not {"forward", "_call_impl"} & set(vars(pipe.unet))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    expected = gradients(pipe, contextlib.nullcontext(), 6)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))


def test_hooks_of_others_on_the_denoiser_are_differentiated_once(pipe):
    """Neither hook commutes with the network, so that one that runs twice changes every gradient."""
    before = pipe.unet.register_forward_pre_hook(lambda module, given: (1.3 * given[0], *given[1:]))
    behind = pipe.unet.register_forward_hook(lambda module, given, output: (output[0] + 0.1 * output[0].square(),))
    with before, behind:
        with frozen(pipe):
            found = gradients(pipe, differentiable(pipe), 3)
        expected = gradients(pipe, contextlib.nullcontext(), 3)
    plain = gradients(pipe, contextlib.nullcontext(), 3)
    for one, other, without in zip(found, expected, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))
        assert (other - without).abs().max() > 0.01 * without.abs().max()


def test_the_adjoint_is_the_slope_of_the_outcome(pipe):
    """Central differences along one direction know nothing of autograd."""
    start, doors = inputs_of(pipe)
    (name,) = doors
    with frozen(pipe):
        with differentiable(pipe):
            latents = denoise(pipe, CASE, doors, start, Sampling(3, 4.0))
        (slope,) = torch.autograd.grad(outcome(latents), [doors[name]])
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0), dtype=slope.dtype)

    @torch.no_grad()
    def moved(size):
        return outcome(denoise(pipe, CASE, {name: doors[name] + size * direction}, start, Sampling(3, 4.0)))

    expected = float(moved(1e-4) - moved(-1e-4)) / 2e-4
    assert abs(expected) > 0.01
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-5)


class Held:
    """Numbers that autograd keeps for the way back."""

    def __init__(self):
        self.n_now = self.n_most = 0

    def pack(self, tensor):
        kept = [tensor]
        owner = _Kept(kept)
        self.n_now += tensor.numel()
        self.n_most = max(self.n_most, self.n_now)
        weakref.finalize(owner, self._drop, tensor.numel())
        return owner

    def _drop(self, n):
        self.n_now -= n


class _Kept:
    def __init__(self, kept):
        self.kept = kept


def most_held(pipe, context, n_steps):
    held = Held()
    with frozen(pipe), torch.autograd.graph.saved_tensors_hooks(held.pack, lambda owner: owner.kept[0]):
        gradients(pipe, context, n_steps)
    return held.n_most


def test_memory_does_not_grow_with_steps(pipe):
    """A step adds its inputs: latents of two rows in two halves, and the prompts' states, which all steps share."""
    few, many = (most_held(pipe, differentiable(pipe), n_steps) for n_steps in (2, 6))
    start, doors = inputs_of(pipe)
    shared = 2 * sum(value.numel() for value in doors.values())
    per_step = (many - few) / 4 - shared
    assert 0 <= per_step <= 10 * start.numel()
    # the control: without recomputing, every step keeps its graph
    assert most_held(pipe, contextlib.nullcontext(), 6) > 4 * many


def test_what_a_module_is_given_by_name_has_gradients_too():
    class Product(torch.nn.Module):
        def forward(self, x, *, added):
            return (x * added["y"] * added["factor"],)

    product, seen = Product(), []
    x, y = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))

    @contextlib.contextmanager
    def around(number):
        seen.append(number)
        yield

    with recomputing(product, around):
        (first,) = product(x, added={"y": y, "factor": 2})
        (second,) = product(first, added={"y": y, "factor": torch.tensor(10.0)})
        assert not seen
    found = torch.autograd.grad(second, [x, y])  # 20 x y²
    assert [value.item() for value in found] == [500, 600]
    assert seen == [1, 0]


def test_gradients_inside_are_an_error_and_not_an_endless_recursion():
    class Square(torch.nn.Module):
        def forward(self, x):
            return (x * x,)

    square, x = Square(), torch.tensor(3.0, requires_grad=True)
    with recomputing(square), pytest.raises(RuntimeError, match="outside of this context"):
        torch.autograd.grad(square(x)[0], x)
