"""Ablations: which weights they take, counted by hand, and that every bit of every weight comes back."""

import copy

import numpy
import pytest
import torch

import editing
import mediation
from editing.ablation import CONTROLS, control
from mediation import Attribution, Site
from mediation.objectives import amplify_objective, erase_objective
from mediation.sampling import Sampling
from tests import tiny
from tests.runs import double

SCORES = {
    "unet.a.weight": [[0.5, -0.9, 0.1, 0.4], [-0.1, -0.2, -0.3, -0.4], [0.9, 0.8, 0.0, -0.7]],
    "unet.b.weight": [[0.7, 0.6, 0.3, 0.2, 0.15]],
}
CHOSEN = ["unet.down.0.0.*", "text_encoder.0.mlp", "unet.conv_in.weight"]


def made(objective="erase", scores=SCORES):
    """An attribution of small numbers; each weight is 1 more than its place."""
    scores = {name: torch.tensor(score) for name, score in scores.items()}
    weights = {name: torch.arange(1.0, score.numel() + 1).view_as(score) for name, score in scores.items()}
    site = Site("unet.x", "unet", "other", -1, "", "x")
    base = {name: {"norm": float(weight.norm())} for name, weight in weights.items()}
    return Attribution(
        scores, weights, dict.fromkeys(scores, site), base, {"objective": objective, "concept": "ink", "value": 10.0}
    )


def taken(edit):
    """Flat places of what an edit changes, by the last but one part of the parameter's name."""
    return {name.split(".")[1]: update.indices.tolist() for name, update in edit.updates.items()}


@pytest.mark.parametrize(
    ("ratio", "per", "expected"),
    [
        (0.25, "row", {"a": [0, 8], "b": [0]}),
        (0.5, "row", {"a": [0, 3, 8, 9], "b": [0, 1]}),
        (0.001, "row", {"a": [0, 8], "b": [0]}),  # rows narrower than 1/ratio are not left out
        (1.0, "row", {"a": [0, 2, 3, 8, 9], "b": [0, 1, 2, 3, 4]}),  # never one of the other sign, nor a zero
        (0.25, "matrix", {"a": [0, 8, 9], "b": [0]}),
        (0.001, "matrix", {"a": [8], "b": [0]}),
        (0.4, "matrix", {"a": [0, 3, 8, 9], "b": [0, 1]}),
        (0.2, "model", {"a": [8, 9], "b": [0]}),  # 3 of 17
        (0.1, "model", {"a": [8]}),
        (0.001, "model", {"a": [8]}),
    ],
)
def test_counts_by_hand(ratio, per, expected):
    edit = editing.cad_erase(made(), ratio=ratio, per=per)
    assert taken(edit) == expected
    for name, update in edit.updates.items():
        assert update.values.tolist() == [-(place + 1.0) for place in update.indices.tolist()], "what makes it 0"
        assert edit.report["parameters"][name]["n_changed"] == len(update.indices)
    scores = [numpy.ravel(SCORES[f"unet.{name}.weight"])[places].sum() for name, places in expected.items()]
    assert edit.report["objective"]["predicted"] == pytest.approx(10 - sum(scores))
    assert edit.report["n_changed"] == sum(map(len, expected.values()))
    assert edit.report["n_weights"] == 17
    assert (edit.metadata["ratio"], edit.metadata["per"], edit.metadata["concept"]) == (ratio, per, "ink")


def test_ratios_are_not_rounded_below_what_they_mean():
    assert int(0.29 * 100) == 28
    edit = editing.cad_erase(made(scores={"unet.a.weight": [[1.0 + i for i in range(100)]]}), ratio=0.29)
    assert len(taken(edit)["a"]) == 29


def test_a_row_of_a_convolution_is_an_output_channel_and_a_vector_is_one_row():
    scores = {"unet.a.weight": [[[[0.1, 0.3]]], [[[0.4, 0.2]]]], "unet.b.bias": [0.1, 0.2, 0.3]}
    assert taken(editing.cad_erase(made(scores=scores), ratio=0.5)) == {"a": [1, 2], "b": [2]}


def test_amplifying_takes_the_most_negative():
    edit = editing.cad_amplify(made("amplify"), ratio=0.25)
    assert taken(edit) == {"a": [1, 7, 11]}, "nothing of b is negative"
    assert edit.report["objective"]["predicted"] == pytest.approx(10 + 0.9 + 0.4 + 0.7)


@pytest.mark.parametrize("objective", ["erase", "amplify"])
@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_take_as_many_weights_per_matrix(objective, kind):
    found = made(objective)
    ablate = editing.cad_erase if objective == "erase" else editing.cad_amplify
    other = control(found, kind, seed=3)
    for name, score in found.scores.items():
        expected = -score if kind == "sign_flipped" else score
        assert torch.equal(other.scores[name].flatten().sort().values, expected.flatten().sort().values)
    edit = ablate(other, per="model")
    assert other.metadata["control"] == edit.metadata["control"] == kind
    assert "objective" not in edit.report, "scores that are not those of the weights predict nothing"
    if kind != "sign_flipped":
        counts = [
            {name: len(places) for name, places in taken(ablate(one, ratio=0.3, per="matrix")).items()}
            for one in (found, other)
        ]
        assert counts[0] == counts[1]


def test_controls_take_other_weights():
    found = made()
    assert taken(editing.cad_erase(control(found, "magnitude"), ratio=0.25, per="matrix")) == {
        "a": [9, 10, 11],
        "b": [4],
    }
    flipped = editing.cad_erase(control(found, "sign_flipped"), ratio=0.25)
    assert taken(flipped) == taken(editing.cad_amplify(made("amplify"), ratio=0.25))
    random = [taken(editing.cad_erase(control(found, "random", seed=seed), ratio=0.25)) for seed in (1, 1, 2, 3)]
    assert random[0] == random[1], "the seed decides"
    assert len({str(places) for places in random}) > 1
    with pytest.raises(ValueError, match="kind must be one of random, magnitude, sign_flipped; got 'none'"):
        control(found, "none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio is a share of the weights, above 0 and at most 1; got 0"),
        ({"ratio": 1.5}, ValueError, "ratio is a share"),
        ({"ratio": float("nan")}, ValueError, "ratio is a share"),
        ({"per": "layer"}, ValueError, "per must be one of row, matrix, model; got 'layer'"),
        ({"attribution": made("amplify")}, ValueError, "of the objective 'amplify': use editing.cad_amplify"),
        ({"attribution": made(scores={"unet.a.weight": [[-1.0, 0.0]]})}, ValueError, "no score is positive"),
        ({"attribution": {}}, TypeError, "expected what mediation.attribute returns, got dict"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        editing.cad_erase(**{"attribution": made()} | options)


def weights(pipe):
    return {
        f"{network}.{name}": parameter.detach().clone()
        for network in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, network).named_parameters()
    }


@pytest.fixture(scope="module")
def attributions():
    """Of the same tiny pipeline in each precision."""
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = tiny.stable_diffusion().to(dtype)
        options = {"parameters": CHOSEN, "num_inference_steps": 1, "progress": False}
        found[dtype] = pipe, mediation.attribute(pipe, "a ink cat", **options)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ablated_weights_are_0_and_every_bit_comes_back(attributions, dtype):
    pipe, found = attributions[dtype]
    edit, before = editing.cad_erase(found, ratio=0.05), weights(pipe)
    assert set(edit.updates) == set(found.scores), "some of every parameter"
    for _ in range(2):
        with edit.applied(pipe):
            now = weights(pipe)
        assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    for name, value in now.items():
        expected = before[name].flatten()
        if name in edit.updates:
            expected[edit.updates[name].indices] = 0
        assert torch.equal(value.flatten(), expected), name


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def alike():
    """A pipeline in each precision, with weights that no narrower one holds, and what was attributed in it."""
    exact = double(tiny.stable_diffusion())
    with torch.no_grad():
        for weight in exact.unet.parameters():
            weight.mul_(1 + 1e-12 + 1e-5)
    pipes = {dtype: copy.deepcopy(exact).to(dtype) for dtype in DTYPES}
    options = {"parameters": CHOSEN[0], "num_inference_steps": 1, "progress": False}
    return {dtype: (pipe, mediation.attribute(pipe, "a ink cat", **options)) for dtype, pipe in pipes.items()}


@pytest.mark.parametrize(
    ("made_in", "applied_in"),
    [(a, b) for a in DTYPES for b in DTYPES if a != b and {a, b} != {torch.float16, torch.bfloat16}],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_ablated_weights_are_0_in_a_precision_that_scores_were_not_made_in(alike, made_in, applied_in):
    """And only those: edits of single weights that take nothing away leave what is left of them."""
    (_, found), (applied, _) = alike[made_in], alike[applied_in]
    edit, before = editing.cad_erase(found, ratio=0.05), weights(applied)
    with edit.applied(applied):
        whole = weights(applied)
    with edit.scaled(0.9).applied(applied):
        most = weights(applied)
    for name, update in edit.updates.items():
        expected = before[name].flatten()
        expected[update.indices] = 0
        assert torch.equal(whole[name].flatten(), expected), name
        assert most[name].flatten()[update.indices].all(), name


def test_ablations_compose_with_low_rank_edits_and_are_saved(attributions, tmp_path):
    pipe, found = attributions[torch.float32]
    (site,) = mediation.sites(pipe, name="text_encoder.0.mlp")
    low_rank = editing.quickfix(pipe, {"ink": "cat"}, site=site)
    both = editing.cad_erase(found, ratio=0.05).scaled(0.5) + low_rank
    (name,) = low_rank.updates
    assert isinstance(both.updates[name], editing.Mixed)
    before = weights(pipe)
    both.save(tmp_path / "both.safetensors")
    loaded = editing.load(tmp_path / "both.safetensors")
    assert (loaded.metadata, loaded.report) == (both.metadata, both.report)
    assert repr(loaded) == repr(both)
    with loaded.applied(pipe):
        now = weights(pipe)
    for name, value in now.items():
        exact = before[name].double()
        if name in both.updates:
            update = editing.cad_erase(found, ratio=0.05).updates[name]
            exact = exact.flatten()
            exact[update.indices] /= 2
            exact = exact.view_as(value)
        if name in low_rank.updates:
            exact = exact + low_rank.updates[name].dense()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    with pytest.raises(ValueError, match="has no low-rank factors, and is of nearly full rank"):
        both.compress(2)
    with pytest.raises(ValueError, match=r"has no low-rank factors: use editing.export_pipeline"):
        both.export_lora(tmp_path / "lora.safetensors")


def test_a_file_of_an_ablation_is_as_large_as_what_it_takes(attributions, tmp_path):
    found = attributions[torch.float32][1]
    sizes = []
    for ratio in (0.1, 0.2):
        edit = editing.cad_erase(found, ratio=ratio, per="matrix")
        edit.save(tmp_path / "edit.safetensors")
        loaded = editing.load(tmp_path / "edit.safetensors")
        assert {name: update.shape for name, update in loaded.updates.items()} == {
            name: tuple(found.scores[name].shape) for name in loaded.updates
        }
        sizes.append((edit.report["n_changed"], (tmp_path / "edit.safetensors").stat().st_size))
    (n_small, small), (n_large, large) = sizes
    assert large - small < 8.5 * (n_large - n_small)


def test_scores_of_a_saved_attribution_make_the_same_edit(attributions, tmp_path):
    pipe, found = attributions[torch.float16]
    found.save(tmp_path / "scores.safetensors")
    edits = [editing.cad_erase(one) for one in (found, Attribution.load(tmp_path / "scores.safetensors"))]
    states = []
    for edit in edits:
        with edit.applied(copy.deepcopy(pipe)) as edited:
            states.append(weights(edited))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, weights(pipe)[name]) for name, value in states[0].items())


def test_weights_may_lie_in_memory_channels_last(attributions, tmp_path):
    pipe, found = attributions[torch.float32]
    last = copy.deepcopy(pipe)
    last.unet.to(memory_format=torch.channels_last)
    assert not last.unet.conv_in.weight.is_contiguous()
    same = mediation.attribute(last, "a ink cat", parameters=CHOSEN, num_inference_steps=1, progress=False)
    same.save(tmp_path / "scores.safetensors")
    loaded, before = Attribution.load(tmp_path / "scores.safetensors"), weights(last)
    for name, score in found.scores.items():
        torch.testing.assert_close(loaded.scores[name], score, rtol=1e-3, atol=1e-6)
        assert torch.equal(loaded.weights[name], found.weights[name])
        assert loaded.base[name]["sha256"] == found.base[name]["sha256"]
    edit = editing.cad_erase(loaded)
    with edit.applied(last):
        now = weights(last)
    for name, update in edit.updates.items():
        expected = before[name].flatten().clone()
        expected[update.indices] = 0
        assert torch.equal(now[name].flatten(), expected), name
    assert all(torch.equal(value, before[name]) for name, value in weights(last).items())


def test_another_model_is_refused(attributions):
    edit = editing.cad_erase(attributions[torch.float32][1])
    with pytest.raises(ValueError, match="another base model"):
        edit.apply(tiny.stable_diffusion(seed=1))


def test_erasing_lowers_the_objective_and_amplifying_raises_it():
    """The point of it: J itself, evaluated again at the same latents, and against a control of as many weights."""
    pipe = tiny.stable_diffusion()
    options = {"seeds": [0], "sampling": Sampling(2, 3.0), "batch_size": 4, "progress": False}
    for objective, ablate in (("erase", editing.cad_erase), ("amplify", editing.cad_amplify)):
        found = mediation.attribute(pipe, "a ink cat", objective=objective, num_inference_steps=2, progress=False)
        if objective == "erase":
            j = erase_objective(pipe, "a ink cat", "", **options)
        else:
            j = amplify_objective(pipe, "a ink cat", None, **options)
        before = j.value(pipe)
        assert before == pytest.approx(found.metadata["value"], rel=1e-5)
        after = {}
        for name, scores in (("cad", found), ("random", control(found, "random"))):
            with ablate(scores, ratio=3e-4, per="model").applied(pipe):  # few, since scores are of the first order
                after[name] = j.value(pipe)
        change = {name: value - before for name, value in after.items()}
        wanted = -1 if objective == "erase" else 1
        assert wanted * change["cad"] > 3 * abs(change["random"])
