"""Ablations of the same weights: 0 is 0, whatever else took them, and every bit comes back."""

import contextlib

import pytest
import torch

import editing
import mediation
from editing.ablation import control
from tests import tiny
from tests.editing.test_ablation import CHOSEN, weights


def attributed(dtype=torch.float32):
    pipe = tiny.stable_diffusion().to(dtype)
    return pipe, mediation.attribute(pipe, "a ink cat", parameters=CHOSEN, num_inference_steps=1, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_ablations_share_are_0_and_every_bit_comes_back(dtype, tmp_path):
    pipe, found = attributed(dtype)
    a = editing.cad_erase(found, ratio=0.05)
    b = editing.cad_erase(control(found, "random"), ratio=0.3)
    both = {name: {*one.indices.tolist()} & {*b.updates[name].indices.tolist()} for name, one in a.updates.items()}
    assert sum(map(len, both.values())) > 10
    for edit in (a, b):
        edit.save(tmp_path / f"{edit is a}.safetensors")
    loaded = [editing.load(tmp_path / f"{name}.safetensors") for name in (True, False)]
    (loaded[0] + loaded[1]).save(tmp_path / "sum.safetensors")
    before = weights(pipe)
    expected = {name: value.flatten().clone() for name, value in before.items()}
    for edit in (a, b):
        for name, update in edit.updates.items():
            expected[name][update.indices] = 0
    total = editing.load(tmp_path / "sum.safetensors")
    assert total.report == (a + b).report
    for stack in ([a, b], [b, a], loaded, [a + b], [total], [total, b], [a.scaled(0.3), total]):
        with contextlib.ExitStack() as applied:
            for edit in stack:
                applied.enter_context(edit.applied(pipe))
            now = weights(pipe)
            if len(stack) > 1:
                with pytest.raises(RuntimeError, match=r"another edit was applied to .* later"):
                    stack[0].revert(pipe)
        for name, value in now.items():
            assert torch.equal(value.flatten(), expected[name]), name
        assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_ablations_are_read_from_files_that_tell_no_shares(tmp_path, monkeypatch):
    edit = editing.cad_erase(attributed()[1])
    whole = editing.Sparse.tensors.fget
    silent = property(lambda update: {name: whole(update)[name] for name in ("indices", "values")})
    monkeypatch.setattr(editing.Sparse, "tensors", silent)
    for one, share in ((edit, 1.0), (edit.scaled(0.5), 0.0)):
        one.save(tmp_path / "edit.safetensors")
        for name, update in editing.load(tmp_path / "edit.safetensors").updates.items():
            assert torch.equal(update.values, one.updates[name].values)
            assert (update.shares == share).all()
