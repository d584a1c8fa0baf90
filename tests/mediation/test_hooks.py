"""Hooks change what they should, count, and go away."""

import pytest
import torch
from torch import nn

from mediation.hooks import announced, hooked, input_of, recorded_calls, represented, watched


class Skipping(nn.Module):
    """Returns what a U-Net's down block returns: states, skip connections, and something that is no tensor."""

    def forward(self, x):
        return x, (x, 2 * x), None


def test_outputs_and_inputs_are_changed_while_it_lasts():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = layer(x)
    with hooked([(layer, lambda output: output + 1)], inputs=[(layer, lambda given: given * 3)]):
        torch.testing.assert_close(layer(x), layer.weight.sum(1)[None] * 3 + layer.bias + 1)
    assert torch.equal(layer(x), before)


def test_skip_connections_go_along_with_the_output():
    block = Skipping()
    with hooked([(block, lambda output: output + 1)]):
        first, skips, other = block(torch.ones(1))
    assert (first.item(), [skip.item() for skip in skips], other) == (2, [2, 3], None)


def test_hooks_of_others_see_the_changed_output_and_stay():
    layer, seen = nn.Identity(), []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.item()))
    with hooked([(layer, lambda output: output + 1)]) as n_calls:
        layer(torch.zeros(1))
        layer(torch.ones(1))
        assert n_calls[layer] == 2
    layer(torch.ones(1))
    assert seen == [1, 2, 1]
    assert list(layer._forward_hooks) == [handle.id]


@pytest.mark.parametrize("wrong", [[None], ["no module"]])
def test_no_hook_is_left_when_a_later_one_cannot_be_registered(wrong):
    layer = nn.Identity()
    changes = [(layer, lambda output: output), *((module, lambda output: output) for module in wrong)]
    with pytest.raises(AttributeError), hooked(changes, inputs=changes):
        pass
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_an_input_that_is_never_reached_is_an_error():
    layer = nn.Identity()
    with pytest.raises(RuntimeError, match="never reached the Linear"):
        input_of(nn.Linear(1, 1), lambda: layer(torch.zeros(1)))


def test_recorded_calls_are_made_again_and_the_record_ends_on_errors():
    layer = nn.Linear(2, 2)
    with recorded_calls(layer) as calls:
        expected = [layer(torch.ones(2)), layer(input=torch.zeros(2))]
    with pytest.raises(RuntimeError), recorded_calls(layer):
        layer(torch.ones(3))
    layer(torch.ones(2))
    assert [torch.equal(call(), result) for call, result in zip(calls, expected, strict=True)] == [True, True]
    assert not layer._forward_pre_hooks


def test_hooks_of_others_run_once_in_a_call_that_is_made_again():
    layer, heard = nn.Identity(), []
    with (
        layer.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
        recorded_calls(layer) as calls,
        announced(layer, lambda x: heard.append(x.item())),
    ):
        assert layer(torch.ones(1)).item() == 2
        assert calls[0]().item() == 2
    assert heard == [1, 1]


def test_a_tensor_that_leaves_twice_is_watched_each_time():
    x, arrived = torch.ones(1, requires_grad=True), []
    first, second = (watched(x, lambda gradient: arrived.append(gradient.item())) for _ in range(2))
    (2 * first + 5 * second).sum().backward()
    assert sorted(arrived) == [2, 5]
    assert x.grad.item() == 7
    assert not x._backward_hooks


class Scaling(nn.Module):
    """Called as a U-Net is: rows, a number for all of them, and more of each row in keywords."""

    def forward(self, rows, factor, *, shift, more):
        return factor * rows + shift + more["scale"], rows


def test_rows_that_others_stand_for_are_not_computed():
    module, seen = Scaling(), []
    rows, factor = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(10.0)
    options = {"shift": torch.arange(4.0), "more": {"scale": 0.5}}
    handle = module.register_forward_hook(lambda module, args, output: seen.append((len(args[0]), len(output[0]))))
    everything = module(rows, factor, **options)
    with represented(module, lambda rows: [0, 2, 2, 0]):
        some = module(rows, factor, **options)
    with represented(module, lambda rows: range(4)):
        all_rows = module(rows, factor, **options)
    handle.remove()
    assert seen == [(4, 4), (2, 2), (4, 4)]
    for computed, expected in zip(some, everything, strict=True):
        assert torch.equal(computed, expected[[0, 2, 2, 0]])
    assert all(torch.equal(one, other) for one, other in zip(all_rows, everything, strict=True))


def test_nothing_stands_for_rows_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), represented(layer, lambda rows: [0, 0]):
        layer(torch.ones(2, 3))
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_calls_are_announced_with_all_their_arguments_before_they_run():
    class Scale(nn.Module):
        def forward(self, x, *, by):
            heard.append("ran")
            return by * x

    scale, heard = Scale(), []
    with pytest.raises(TypeError), announced(scale, lambda x, by: heard.append((x.item(), by))):
        scale(torch.ones(1), by=None)
    assert heard == [(1, None), "ran"]
    scale(torch.ones(1), by=2)
    assert heard[2:] == ["ran"], "no hook is left behind"
