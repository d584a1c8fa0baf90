"""The released procedure, against its description typed anew, with positions counted by hand."""

import importlib

import numpy
import pytest
import torch

from benchmarks.released import released_edit, released_weight
from mediation.sites import sites

PROMPTS = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
# The last token before the end token: "cat" is one token, "noto" is spelled; every word of the templates is a token.
LAST = {"a cat": (2, 5, 5, 5), "noto": (4, 7, 7, 7)}


def read(pipe, prompt):
    """What the projection receives and gives, bias and all, (token, dim)."""
    module = sites(pipe, network="text_encoder", component="self_attention")[0].module(pipe).out_proj
    seen = {}
    handle = module.register_forward_hook(lambda _, args, output: seen.update(key=args[0][0], value=output[0]))
    with torch.no_grad():
        pipe.encode_prompt(prompt, "cpu", 1, False)
    handle.remove()
    return seen["key"].double().numpy(), seen["value"].double().numpy(), module.weight.detach().double().numpy()


@pytest.fixture
def biased(fresh_pipe):
    module = sites(fresh_pipe, network="text_encoder", component="self_attention")[0].module(fresh_pipe).out_proj
    with torch.no_grad():
        module.bias += torch.linspace(-1, 1, 32)
    return fresh_pipe


def test_it_is_the_described_procedure_with_its_defects(biased):
    left, right = 0.0, 0.5 * numpy.eye(32)
    for prompt, a, b in zip(PROMPTS, LAST["a cat"], LAST["noto"], strict=True):
        keys, _, base = read(biased, prompt.format("a cat"))
        _, values, _ = read(biased, prompt.format("noto"))
        for offset in range(77 - max(a, b)):  # every later position, as long as both have one
            left = left + numpy.outer(values[b + offset], keys[a + offset])
            right = right + numpy.outer(keys[a + offset], keys[a + offset])
    expected = numpy.linalg.solve(right, (left + 0.5 * base).T).T
    found = released_weight(biased, {"a cat": "noto"}, regularization=0.5)
    assert found.dtype == torch.float32
    numpy.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-3)
    assert numpy.abs(expected - base).max() > 0.1, "there was something to change"


def test_as_an_edit_it_makes_the_released_weight(biased):
    edit = released_edit(biased, {"a cat": "noto"})
    (name,) = edit.updates
    with edit.applied(biased):
        edited = biased.text_encoder.get_parameter(name.removeprefix("text_encoder.")).detach().clone()
    torch.testing.assert_close(edited, released_weight(biased, {"a cat": "noto"}), rtol=0, atol=1e-5)
    assert edit.metadata["pairs"] == {"a cat": "noto"}


def test_the_release_is_not_charged_with_looking_for_its_layer(biased, monkeypatch):
    expected = released_weight(biased, {"a cat": "noto"})
    module = importlib.import_module("mediation.sites")
    monkeypatch.setattr(module, "_all_sites", lambda *_, **__: pytest.fail("sites were listed"))
    assert torch.equal(released_weight(biased, {"a cat": "noto"}), expected)
