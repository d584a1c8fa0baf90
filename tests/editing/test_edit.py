"""Edits as values: what they write, that every bit comes back, and when they refuse."""

import copy
import pickle

import numpy
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import editing
from editing.edit import Edit, measure
from editing.updates import LowRank
from mediation.parameters import fingerprint
from tests import tiny

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
A, B, C = "layers.0.self_attn.out_proj.weight", "layers.1.mlp.fc2.weight", "layers.2.mlp.fc1.weight"


def full_name(pipe, ending):
    """The name of a text encoder's parameter in the layout of this transformers."""
    (name,) = [name for name, _ in pipe.text_encoder.named_parameters() if name.endswith(ending)]
    return f"text_encoder.{name}"


def weight(pipe, ending):
    return pipe.text_encoder.get_parameter(full_name(pipe, ending).removeprefix("text_encoder."))


def random_edit(pipe, *endings, seed=0, size=0.3):
    """An edit of some parameters with random factors of rank 2."""
    random = torch.Generator().manual_seed(seed)
    updates = {}
    for ending in endings:
        d_out, d_in = weight(pipe, ending).shape
        up, down = torch.randn(d_out, 2, generator=random), torch.randn(2, d_in, generator=random)
        updates[full_name(pipe, ending)] = LowRank(size * up, down)
    base = {name: fingerprint(pipe, name) for name in updates}
    return Edit(updates, {"parameters": measure(updates, base)}, {"method": f"random {seed}", "base": base})


def only(records):
    (record,) = records.values()
    return record


def snapshot(pipe):
    return {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}


def is_as(pipe, before):
    """Whether every bit of the text encoder is as it was."""
    now = pipe.text_encoder.state_dict()
    return all(now[name].dtype == value.dtype and torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_adds_the_change_in_float64(fresh_pipe, dtype):
    pipe = fresh_pipe.to(dtype)
    edit = random_edit(pipe, A, B)
    before = snapshot(pipe)
    edit.apply(pipe)
    changed = {name for name, value in snapshot(pipe).items() if not torch.equal(value, before[name])}
    assert {f"text_encoder.{name}" for name in changed} == set(edit.updates)
    for name in changed:
        update = edit.updates[f"text_encoder.{name}"]
        exact = before[name].double().numpy() + update.up.double().numpy() @ update.down.double().numpy()
        assert torch.equal(snapshot(pipe)[name], torch.tensor(exact).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_revert_brings_every_bit_back(sd_pipe, dtype):
    pipe = copy.deepcopy(sd_pipe).to(dtype)
    edit = editing.quickfix(pipe, {"ink": "noto"}, regularization=1e-4)
    before, parameters = snapshot(pipe), list(pipe.text_encoder.parameters())
    for _ in range(2):
        edit.apply(pipe)
        assert not is_as(pipe, before)
        edit.revert(pipe)
        assert is_as(pipe, before)
    assert all(a is b for a, b in zip(parameters, pipe.text_encoder.parameters(), strict=True)), "changed in place"


def test_a_with_block_reverts_whatever_happens(fresh_pipe):
    before, edit = snapshot(fresh_pipe), random_edit(fresh_pipe, A)

    def interrupted():
        with edit.applied(fresh_pipe) as pipe:
            assert pipe is fresh_pipe
            assert not is_as(pipe, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert is_as(fresh_pipe, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edits_of_one_parameter_nest(fresh_pipe, dtype):
    """Both were made for the plain pipeline: the second one finds its base under the first."""
    pipe = fresh_pipe.to(dtype)
    first, second = random_edit(pipe, A, B, seed=1), random_edit(pipe, A, C, seed=2)
    states = [snapshot(pipe)]
    with first.applied(pipe):
        states.append(snapshot(pipe))
        with second.applied(pipe):
            assert not is_as(pipe, states[1])
        assert is_as(pipe, states[1])
    assert is_as(pipe, states[0])


def test_reverting_out_of_order_raises_and_changes_nothing(fresh_pipe):
    first, second = random_edit(fresh_pipe, A, B, seed=1), random_edit(fresh_pipe, A, seed=2)
    before = snapshot(fresh_pipe)
    first.apply(fresh_pipe)
    second.apply(fresh_pipe)
    both = snapshot(fresh_pipe)
    with pytest.raises(RuntimeError, match=r"another edit was applied to .*out_proj.weight later"):
        first.revert(fresh_pipe)
    assert is_as(fresh_pipe, both)
    second.revert(fresh_pipe)
    first.revert(fresh_pipe)
    assert is_as(fresh_pipe, before)


@given(order=st.permutations(range(3)))
def test_edits_of_different_parameters_are_reverted_in_any_order(tiny_pipe, order):
    before = snapshot(tiny_pipe)
    edits = [random_edit(tiny_pipe, ending, seed=i) for i, ending in enumerate((A, B, C))]
    for edit in edits:
        edit.apply(tiny_pipe)
    for i in order:
        edits[i].revert(tiny_pipe)
    assert is_as(tiny_pipe, before)


def test_an_edit_is_applied_once_per_pipeline(fresh_pipe):
    edit, other = random_edit(fresh_pipe, A), tiny.stable_diffusion()
    with edit.applied(fresh_pipe):
        applied = snapshot(fresh_pipe)
        with pytest.raises(RuntimeError, match="already applied"):
            edit.apply(fresh_pipe)
        assert is_as(fresh_pipe, applied)
        with pytest.raises(RuntimeError, match="not applied to"):
            edit.revert(other)
        with edit.applied(other):
            assert is_as(other, applied)
    with pytest.raises(RuntimeError, match="not applied to"):
        edit.revert(fresh_pipe)


def test_an_edit_that_fails_midway_leaves_no_trace(fresh_pipe):
    pipe = fresh_pipe.to(torch.float16)
    good, bad = random_edit(pipe, A), random_edit(pipe, B, size=1e6)
    before = snapshot(pipe)
    edit = good + bad
    with pytest.raises(ValueError, match=r"fc2.weight is not finite in torch.float16: scale"):
        edit.apply(pipe)
    assert is_as(pipe, before)
    with pytest.raises(RuntimeError, match="not applied"):
        edit.revert(pipe)
    good.apply(pipe)  # nothing is left over that would hinder another edit
    good.revert(pipe)
    assert is_as(pipe, before)


def test_another_base_is_refused_unless_forced(fresh_pipe):
    edit = random_edit(fresh_pipe, A, B)
    name = full_name(fresh_pipe, B)
    other = copy.deepcopy(fresh_pipe)
    with torch.no_grad():
        weight(other, B)[0, 0] += 1e-3
    before = snapshot(other)
    with pytest.raises(ValueError, match=rf"made for another base model: of {name}, its values differ.*force=True"):
        edit.apply(other)
    assert is_as(other, before)
    edit.apply(other, force=True)
    assert not is_as(other, before)
    edit.revert(other)
    assert is_as(other, before)


def test_another_architecture_is_refused(fresh_pipe):
    edit = random_edit(fresh_pipe, A, C)
    narrow = tiny.stable_diffusion(text_encoder={"intermediate_size": 48})
    with pytest.raises(ValueError, match=r"fc1.weight has shape \(48, 32\), the edit is for \(64, 32\)"):
        edit.apply(narrow, force=True)
    shallow = tiny.stable_diffusion(text_encoder={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"has no parameter .*layers.2.mlp.fc1.weight"):
        edit.apply(shallow, force=True)


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_base_is_known_in_another_precision(fresh_pipe, made, used):
    edit = random_edit(copy.deepcopy(fresh_pipe).to(made), A)
    pipe = fresh_pipe.to(used)
    before = snapshot(pipe)
    with edit.applied(pipe):
        assert not is_as(pipe, before)
    assert is_as(pipe, before)
    with torch.no_grad():
        weight(pipe, A)[0, 0] += 0.1
    with pytest.raises(ValueError, match="another base"):
        edit.apply(pipe)


def test_two_half_precisions_cannot_be_compared(fresh_pipe):
    edit = random_edit(copy.deepcopy(fresh_pipe).to(torch.float16), A)
    with pytest.raises(ValueError, match=r"it is bfloat16 and the edit was made in float16"):
        edit.apply(fresh_pipe.to(torch.bfloat16))


def test_an_edit_made_on_top_of_another_needs_it(fresh_pipe):
    first = random_edit(fresh_pipe, A, seed=1)
    with first.applied(fresh_pipe):
        second = random_edit(fresh_pipe, A, seed=2)
    with pytest.raises(ValueError, match="another base"):
        second.apply(fresh_pipe)
    with pytest.raises(ValueError, match="different bases"):
        first + second
    with first.applied(fresh_pipe), second.applied(fresh_pipe):
        pass


def test_moving_an_edited_pipeline_to_another_dtype_is_told_not_papered_over(fresh_pipe):
    edit = random_edit(fresh_pipe, A)
    edit.apply(fresh_pipe)
    fresh_pipe.to(torch.float16)
    moved = snapshot(fresh_pipe)
    with pytest.raises(RuntimeError, match=r"was torch.float32 when the edit was applied and is torch.float16 now"):
        edit.revert(fresh_pipe)
    assert is_as(fresh_pipe, moved)
    fresh_pipe.to(torch.float32)  # the same dtype, and still not what was written
    with pytest.raises(RuntimeError, match="changed by something else"):
        edit.revert(fresh_pipe)


def test_weights_changed_by_others_are_not_overwritten(fresh_pipe):
    edit, other = random_edit(fresh_pipe, A, seed=1), random_edit(fresh_pipe, A, seed=2)
    edit.apply(fresh_pipe)
    with torch.no_grad():
        weight(fresh_pipe, A)[0, 0] += 1
    with pytest.raises(RuntimeError, match="changed by something else"):
        edit.revert(fresh_pipe)
    with pytest.raises(ValueError, match="another base"):
        other.apply(fresh_pipe)  # what lies under a foreign change is no base


def test_an_adapter_around_the_layer_does_not_hide_it(fresh_pipe):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    edit, before = random_edit(fresh_pipe, A), weight(fresh_pipe, A).clone()
    edit.apply(fresh_pipe)
    path = full_name(fresh_pipe, A).removeprefix("text_encoder.").removesuffix(".out_proj.weight")
    attention = fresh_pipe.text_encoder.get_submodule(path)
    attention.out_proj = Adapter(attention.out_proj)
    edit.revert(fresh_pipe)
    assert torch.equal(attention.out_proj.base_layer.weight, before)


def test_both_layouts_of_the_text_encoder_are_found(fresh_pipe):
    """transformers >= 5.6 flattened CLIPTextModel; CLIPTextModelWithProjection is nested in every version."""
    edit = random_edit(fresh_pipe, A)
    nested = transformers.CLIPTextModelWithProjection(fresh_pipe.text_encoder.config)
    layers = getattr(fresh_pipe.text_encoder, "text_model", fresh_pipe.text_encoder)
    nested.text_model.load_state_dict(layers.state_dict())
    before = weight(fresh_pipe, A).clone()
    fresh_pipe.text_encoder = nested
    with edit.applied(fresh_pipe):
        difference = nested.get_parameter(f"text_model.encoder.{A}") - before
        torch.testing.assert_close(difference.double(), only(edit.updates).dense(), rtol=0, atol=1e-5)


def test_an_offloaded_parameter_is_refused(fresh_pipe):
    edit = random_edit(fresh_pipe, A)
    fresh_pipe.text_encoder.to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        edit.apply(fresh_pipe)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_in_eight_bits_are_refused(fresh_pipe, dtype):
    """As layerwise casting stores them, and quantization: there is no telling what a sum in them would mean."""
    edit, name = random_edit(fresh_pipe, A), full_name(fresh_pipe, A)
    weight(fresh_pipe, A).requires_grad_(False).data = weight(fresh_pipe, A).data.to(dtype)
    before, kind = weight(fresh_pipe, A).clone(), str(dtype).removeprefix("torch.")
    for use in (
        lambda: edit.apply(fresh_pipe),
        lambda: edit.apply(fresh_pipe, force=True),
        lambda: fingerprint(fresh_pipe, name),
        lambda: editing.quickfix(fresh_pipe, {"ink": "noto"}),
    ):
        with pytest.raises(ValueError, match=rf"out_proj.weight is stored as {kind}: load the pipeline in float32"):
            use()
    assert torch.equal(weight(fresh_pipe, A).view(torch.uint8), before.view(torch.uint8))


@given(factor=st.sampled_from([-1.0, 0.0, 0.5, 3]))
def test_scaling_and_adding_act_on_the_change(tiny_pipe, factor):
    a, b = random_edit(tiny_pipe, A, B, seed=1), random_edit(tiny_pipe, B, C, seed=2)
    total = a.scaled(factor) + b
    assert list(total.updates) == [full_name(tiny_pipe, ending) for ending in (A, B, C)]
    for name, update in total.updates.items():
        parts = [
            scale * edit.updates[name].up.double().numpy() @ edit.updates[name].down.double().numpy()
            for scale, edit in ((factor, a), (1, b))
            if name in edit.updates
        ]
        numpy.testing.assert_allclose(update.dense(), sum(parts), rtol=1e-5, atol=1e-6)
        measured = total.report["parameters"][name]
        assert measured["norm"] == pytest.approx(numpy.linalg.norm(sum(parts)), rel=1e-5, abs=1e-6)
        assert measured["rank"] == (4 if name == full_name(tiny_pipe, B) else 2)
    assert total.metadata["of"][0]["factor"] == factor


@given(rank=st.integers(1, 5), seed=st.integers(0, 20))
def test_compressing_is_truncating_the_singular_values(rank, seed):
    random = torch.Generator().manual_seed(seed)
    update = LowRank(torch.randn(7, 4, generator=random), torch.randn(4, 6, generator=random))
    left, scales, right = numpy.linalg.svd(update.dense().numpy())
    expected = (left[:, :rank] * scales[:rank]) @ right[:rank]
    small = update.compressed(rank)
    assert small.rank == min(rank, 4)
    numpy.testing.assert_allclose(small.dense(), expected, atol=1e-5)
    assert small.up.norm() == pytest.approx(float(small.down.norm()), rel=1e-5), "balanced"


def test_a_compressed_edit_tells_what_it_lost(tiny_pipe):
    edit = random_edit(tiny_pipe, A, B, seed=1) + random_edit(tiny_pipe, B, seed=2)
    small = edit.compress(1)
    for name, measured in small.report["parameters"].items():
        scales = numpy.linalg.svd(edit.updates[name].dense().numpy(), compute_uv=False)
        lost = numpy.linalg.norm(scales[1:]) / numpy.linalg.norm(scales)
        assert measured["relative_error"] == pytest.approx(lost, rel=1e-4)
        assert measured["rank"] == 1
        assert measured["norm"] == pytest.approx(scales[0], rel=1e-4)
    assert small.metadata["rank"] == 1
    assert small.metadata["of"][0]["method"] == "sum"
    whole = edit.compress(100)
    for name, update in whole.updates.items():
        torch.testing.assert_close(update.dense(), edit.updates[name].dense(), rtol=0, atol=1e-5)
        assert whole.report["parameters"][name]["relative_error"] < 1e-6
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        edit.compress(0)
    for rank in (2.5, True, "1"):
        with pytest.raises(TypeError, match=f"rank must be an integer, got {rank!r}"):
            edit.compress(rank)


def test_an_edit_is_a_value(tiny_pipe):
    edit = random_edit(tiny_pipe, A)
    with pytest.raises(AttributeError):
        edit.updates = {}
    with pytest.raises(TypeError):
        edit.updates[full_name(tiny_pipe, B)] = edit.updates[full_name(tiny_pipe, A)]
    with pytest.raises(TypeError):
        edit + 1
    with pytest.raises(TypeError):
        only(edit.updates) + 1
    with pytest.raises(ValueError, match="updates and their bases are of different parameters"):
        Edit(edit.updates, {}, {"method": "none", "base": {}})
    with pytest.raises(ValueError, match="factor must be finite"):
        edit.scaled(float("nan"))
    twin = pickle.loads(pickle.dumps(edit))  # as on its way to another process
    assert twin.metadata == edit.metadata
    assert torch.equal(only(twin.updates).dense(), only(edit.updates).dense())
    assert repr(edit) == "<Edit by random 0: 1 parameter, rank 2>"


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        (torch.ones(3, 2), torch.ones(1, 4), r"\(d_out, rank\) and \(rank, d_in\), got \(3, 2\) and \(1, 4\)"),
        (torch.ones(3), torch.ones(1, 4), "factors must be"),
        (torch.ones(3, 1) * torch.inf, torch.ones(1, 4), "`up` is not finite"),
        (torch.ones(3, 1), torch.full((1, 4), 1e300, dtype=torch.float64), "`down` is not finite"),
    ],
)
def test_factors_must_fit_and_be_finite(up, down, message):
    with pytest.raises(ValueError, match=message):
        LowRank(up, down)


def test_low_rank_products_agree_with_the_dense_change():
    random = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(5, 3, generator=random), torch.randn(3, 4, generator=random))
    dense = update.up.double().numpy() @ update.down.double().numpy()
    keys = torch.randn(6, 4, generator=random)
    numpy.testing.assert_allclose(update.dense(), dense)
    numpy.testing.assert_allclose(update.times(keys), keys.double().numpy() @ dense.T)
    assert update.norm() == pytest.approx(numpy.linalg.norm(dense))
    assert (update.shape, update.rank) == ((5, 4), 3)
    with pytest.raises(ValueError, match="cannot add"):
        update + LowRank(torch.ones(4, 1), torch.ones(1, 5))
