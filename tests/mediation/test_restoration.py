"""What must hold of the exact backend on any pipeline: here on tiny random weights of the true architecture."""

import numpy
import pytest
import torch

import mediation
from mediation import Case, GaussianNoise, LatentDistance, ReplaceSubject, ZeroSubject, encoding
from mediation.cases import segments
from mediation.encoding import encode_rows
from mediation.pipelines import family_of
from mediation.plans import make_plan
from mediation.rows import CLEAN, CORRUPTED, Intervention
from mediation.sampling import Sampling, sample_rows
from mediation.tracing import label
from tests.runs import CASE, SAMPLING, doors, rms

FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


def plan(pipe, **options):
    """What `trace` would run."""
    given = {"sites": None, "metric": LatentDistance(), "tokens": None, "windows": None, "mode": "restore"}
    given |= {"sampling": SAMPLING, "batch_size": None, "images": None, "progress": False}
    return make_plan(pipe, CASE, **given | options)


def test_text_sites_cannot_undo_what_the_residual_stream_carries(tiny_pipe):
    """Noise on the embeddings passes by every layer, so restoring all outputs helps and is not the clean run."""
    sites = tuple(mediation.sites(tiny_pipe, network="text_encoder"))
    states = encode_rows(tiny_pipe, CASE, 0, [Intervention(sites), Intervention()])["prompt_embeds"]
    assert 0 < rms(states[2], states[CLEAN]) < rms(states[CORRUPTED], states[CLEAN])
    assert torch.equal(states[3], states[CORRUPTED])


def test_restoring_a_site_is_the_run_with_its_output_written_by_hand(tiny_pipe):
    """The oracle records the clean run's outputs, then feeds them to the corrupted run, one image at a time."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("strawberry"), seed=3)
    site = mediation.sites(tiny_pipe, network="unet", component="self_attention")[2]
    module = tiny_pipe.unet.get_submodule(site.path)
    noise = torch.randn(1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(3))
    options = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    outputs = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output[1].clone()))
    tiny_pipe(case.prompt, **options)
    handle.remove()
    recorded = iter(outputs)
    handle = module.register_forward_hook(lambda module, args, output: torch.stack([output[0], next(recorded)]))
    by_hand = tiny_pipe(case.corrupted_prompt, **options).images[0]
    handle.remove()
    latents = sample_rows(tiny_pipe, case, 0, [Intervention((site,))], SAMPLING)
    damage = rms(latents[CORRUPTED], latents[CLEAN])
    assert rms(latents[2], latents[CORRUPTED]) > 1e-3 * damage
    assert rms(latents[2], by_hand) < 1e-3 * damage


def test_windows_restore_for_a_while(tiny_pipe):
    site = doors(tiny_pipe)
    windows = [(0.0, 1 / 3), (1 / 3, 1.0), (0.0, 1.0)]
    latents = sample_rows(tiny_pipe, CASE, 0, [Intervention(site, window=w) for w in windows], SAMPLING)
    distances = [rms(latents[i], latents[CLEAN]) for i in (2, 3, 4)]
    assert distances[2] < 1e-3 * min(distances[:2])
    assert all(d < rms(latents[CORRUPTED], latents[CLEAN]) for d in distances)


@pytest.mark.parametrize(
    ("branch", "halves"), [("cond", (False, True)), ("uncond", (True, False)), ("both", (True, True))]
)
def test_branches_change_their_own_half(tiny_pipe, branch, halves):
    site = mediation.sites(tiny_pipe, name="unet.mid.0.resnet")[0]
    inputs = []
    behind = tiny_pipe.unet.mid_block.attentions[0]
    handle = behind.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    try:
        sample_rows(tiny_pipe, CASE, 0, [Intervention((site,))], Sampling(3, 4.0, branch))
    finally:
        handle.remove()
    # The clean run's latents differ from the second step on, so that the unconditional half too has something to
    # restore, and all rows' in the third.
    rows = inputs[2]  # clean, sham, restored: unconditional, then conditional
    assert tuple(torch.equal(rows[offset + 2], rows[offset + CLEAN]) for offset in (0, 3)) == halves


def test_the_unconditional_branch_leaves_out_what_does_not_reach_it(tiny_pipe):
    plans = {branch: plan(tiny_pipe, sampling=Sampling(2, 4.0, branch)) for branch in ("cond", "uncond", "both")}
    listed = {branch: [site for (site,) in found.groups] for branch, found in plans.items()}
    assert listed["cond"] == listed["both"] == mediation.sites(tiny_pipe)
    assert listed["uncond"] == mediation.sites(tiny_pipe, network="unet")


def test_sites_together_are_of_all_their_kinds_and_stand_in_their_middle(tiny_pipe):
    mixed = ["text_encoder.0.mlp", "unet.mid.0.resnet", "unet.mid.0.self_attention"]
    alike = ["unet.up.0.0.resnet", "unet.up.0.1.resnet", "unet.up.1.0.resnet"]
    heads = ["unet.mid.0.self_attention.head.0", "unet.mid.0.self_attention.head.1"]
    found = plan(tiny_pipe, sites=[mixed, alike, heads, heads[1]])
    effects = label(found, found.blank())
    assert effects.network.values.tolist() == ["text_encoder+unet", "unet", "unet", "unet"]
    assert effects.component.values.tolist() == ["mlp+resnet+self_attention", "resnet", *["self_attention"] * 2]
    assert effects.block.values.tolist() == ["mid", "up.0", "mid", "mid"]
    assert effects.layer.values[1] == 7
    assert effects["head"].values.tolist() == [-1, -1, -1, 1]


def test_self_patch_is_the_identity(shallow_pipe):
    """In a case whose corruption changes nothing, restoring any site changes nothing."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("CAT"))
    effects = mediation.trace(shallow_pipe, case, metric=LatentDistance(), **FAST)
    assert float(abs(effects.restored).max()) < 1e-5
    assert float(abs(effects.corrupted).max()) < 1e-5


def test_sham_is_corrupted_and_effects_are_above_the_noise_floor(shallow_pipe):
    effects = mediation.trace(shallow_pipe, CASE, metric=LatentDistance(), batch_size=8, **FAST)
    floor = float(abs(effects.sham - effects.corrupted).max())
    assert floor < 1e-4 * float(mediation.total_effect(effects).max())
    assert float(abs(mediation.indirect_effect(effects)).max()) > 100 * floor


def test_the_map_does_not_depend_on_batch_size_or_company(shallow_pipe):
    chosen = mediation.sites(shallow_pipe, component="resnet")
    options = {"metric": LatentDistance(), **FAST}
    other = Case("a dog", subject="dog", seed=9)
    together = mediation.trace(shallow_pipe, [CASE, other], sites=chosen, batch_size=16, **options)
    alone = mediation.trace(shallow_pipe, CASE, sites=chosen[:3], batch_size=3, **options)
    numpy.testing.assert_allclose(together.restored[0, :, :3], alone.restored[0], rtol=1e-3)
    numpy.testing.assert_allclose(together.corrupted[0], alone.corrupted[0], rtol=1e-3)


def test_token_restorations_have_their_causal_direction(tiny_pipe):
    tokens = ["bos", "before", "subject", "last_subject", "after", "eos", "padding", "all"]
    first = mediation.sites(tiny_pipe, network="text_encoder", layer=0)
    effects = mediation.trace(tiny_pipe, CASE, sites=first, tokens=tokens, metric=LatentDistance(), **FAST)
    assert effects.restored.dims == ("case", "draw", "site", "token")
    indirect = mediation.indirect_effect(effects).isel(case=0, draw=0)
    # A causal encoder computes nothing before the subject that the noise could reach.
    assert float(abs(indirect.sel(token=["bos", "before"])).max()) < 1e-5
    assert float(abs(indirect.sel(token="subject")).max()) > 1e-3


def test_each_position_is_a_token(tiny_pipe):
    effects = mediation.trace(
        tiny_pipe, CASE, sites=["text_encoder.0.mlp"], tokens="each", metric=LatentDistance(), **FAST
    )
    n_tokens = len(tiny_pipe.tokenizer(CASE.prompt).input_ids)
    assert effects.token.values.tolist() == list(range(n_tokens))


def test_tokens_are_paired_with_what_stands_in_their_place(tiny_pipe, monkeypatch):
    """The replacement takes more tokens than the subject; each prompt is split into tokens once, for all of them."""
    case = Case("a cat in ink", subject="cat", corruption=ReplaceSubject("strawberry"))
    texts = []
    monkeypatch.setattr(encoding, "segments", lambda *given: texts.append(given[1]) or segments(*given))
    subject, last, *each = encoding.token_pairs(tiny_pipe.tokenizer, case, ["subject", "last_subject", 0, 1, 2, 3, 4])
    assert texts == ["a cat in ink", "a strawberry in ink"]
    ids, others = (tiny_pipe.tokenizer(prompt).input_ids for prompt in texts)
    grown = len(others) - len(ids)
    assert grown > 0
    assert subject == last == ((2, 2 + grown),)
    assert each == [((0, 0),), ((1, 1),), ((2, 2 + grown),), ((3, 3 + grown),), ((4, 4 + grown),)]
    assert [ids[a] == others[b] for ((a, b),) in each] == [True, True, False, True, True]


def test_positions_may_come_in_an_array(tiny_pipe):
    found = plan(tiny_pipe, tokens=numpy.arange(3))
    assert found.tokens == plan(tiny_pipe, tokens=[0, 1, 2]).tokens == (0, 1, 2)
    assert {type(token) for token in found.tokens} == {int}
    assert plan(tiny_pipe, tokens=numpy.int64(4)).tokens == (4,)


def test_a_group_without_tokens_is_missing_and_not_zero(tiny_pipe):
    case = Case("cat", subject="cat")
    effects = mediation.trace(
        tiny_pipe, case, sites=["text_encoder.0.mlp"], tokens=["before", "subject"], metric=LatentDistance(), **FAST
    )
    assert numpy.isnan(effects.restored.values).ravel().tolist() == [True, False]


def test_several_metrics_come_from_the_same_runs(tiny_pipe):
    def brightness(images, latents, cases):
        assert images.shape[0] == latents.shape[0] == len(cases)
        assert 0 <= images.min() <= images.max() <= 1
        return images.mean((1, 2, 3))

    both = mediation.trace(tiny_pipe, CASE, sites=["unet.mid.0.resnet"], metric=[LatentDistance(), brightness], **FAST)
    one = mediation.trace(tiny_pipe, CASE, sites=["unet.mid.0.resnet"], metric=brightness, **FAST)
    assert both.metric.values.tolist() == ["latent_distance", "brightness"]
    assert both.restored.sel(metric="brightness").values == pytest.approx(one.restored.values)


def test_knocking_out_is_the_run_with_the_corrupted_output_written_by_hand(tiny_pipe):
    """The oracle records the corrupted run's outputs, then feeds them to the clean run, one image at a time."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("strawberry"), seed=3)
    site = mediation.sites(tiny_pipe, network="unet", component="self_attention")[2]
    module = site.module(tiny_pipe)
    noise = torch.randn(1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(3))
    options = {"latents": noise, "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    clean = tiny_pipe(case.prompt, **options).images[0]
    outputs = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output[1].clone()))
    corrupted = tiny_pipe(case.corrupted_prompt, **options).images[0]
    handle.remove()
    recorded = iter(outputs)
    handle = module.register_forward_hook(lambda module, args, output: torch.stack([output[0], next(recorded)]))
    by_hand = tiny_pipe(case.prompt, **options).images[0]
    handle.remove()
    effects = mediation.trace(
        tiny_pipe, case, sites=[site], mode="knock_out", metric=lambda images, latents, cases: latents.mean((1, 2, 3)),
        num_inference_steps=2, guidance_scale=4.0, progress=False,
    )  # fmt: skip
    assert effects.attrs["intervention"] == "knock_out"
    total = float((clean - corrupted).mean())
    assert float(mediation.total_effect(effects).squeeze()) == pytest.approx(total, rel=1e-2)
    assert abs(total) > 1e-3
    assert float(mediation.indirect_effect(effects).squeeze()) == pytest.approx(
        float((clean - by_hand).mean()), abs=1e-3 * abs(total)
    )


def test_tokens_are_knocked_out_where_they_stand_in_the_clean_prompt(tiny_pipe):
    """The replacement takes more tokens than the subject, so that all behind it stand elsewhere."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("strawberry"))
    layers = mediation.sites(tiny_pipe, network="text_encoder", component="block")
    effects = mediation.trace(
        tiny_pipe, case, sites=[layers[-1]], tokens=["bos", "subject", "after", "all"], mode="knock_out",
        metric=LatentDistance(), **FAST,
    )  # fmt: skip
    necessity = mediation.indirect_effect(effects, normalize=True).squeeze()
    assert abs(float(necessity.sel(token="bos"))) < 1e-4
    assert float(necessity.sel(token="subject")) > 0.01
    assert float(necessity.sel(token="after")) > 0.01


def test_running_out_of_memory_halves_the_chunk_and_keeps_the_map(shallow_pipe, monkeypatch):
    chosen = mediation.sites(shallow_pipe, network="unet")[:9]
    options = {"sites": chosen, "metric": LatentDistance(), "batch_size": 12, **FAST}
    expected = mediation.trace(shallow_pipe, [CASE, CASE], **options)
    n_rows, raised = [], []

    def sample_few_rows(pipe, case, draw, rows, sampling):
        n_rows.append(len(rows))
        if len(rows) > 5:
            raise raised[-1]
        return sample_rows(pipe, case, draw, rows, sampling)

    monkeypatch.setattr("mediation.plans.sample_rows", sample_few_rows)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ):
        n_rows.clear()
        raised.append(error)
        with pytest.warns(UserWarning, match="out of memory with batch_size=12: going on with at most 7 rows"):
            effects = mediation.trace(shallow_pipe, [CASE, CASE], **options)
        assert n_rows == [10, 5, 5, 5, 5]
        for name, values in expected.items():
            assert float(abs(effects[name] - values).max()) < 1e-4 * float(mediation.total_effect(expected).max())


@pytest.mark.parametrize("message", ["CUDA out of memory", "a bug"])
def test_errors_that_fewer_rows_cannot_mend_are_raised(tiny_pipe, monkeypatch, message):
    def fail(*args):
        raise RuntimeError(message)

    monkeypatch.setattr("mediation.plans.sample_rows", fail)
    with pytest.raises(RuntimeError, match=message):
        mediation.trace(tiny_pipe, CASE, sites=["unet.mid.0.resnet"], metric=LatentDistance(), batch_size=3, **FAST)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"backend": "magic"}, ValueError, "no backend"),
        ({"sites": ["unet.nowhere"]}, KeyError, "no site 'unet.nowhere'"),
        ({"sites": []}, ValueError, "no sites were given"),
        (
            {"sites": [["unet.mid.0.resnet", "unet.mid.0.resnet"]]},
            ValueError,
            "each named once, got 'unet.mid.0.resnet",
        ),
        (
            {"sites": [["unet.mid.0.resnet", "unet.mid.1.resnet"], ["unet.mid.1.resnet", "unet.mid.0.resnet"]]},
            ValueError,
            "the same sites are given twice: unet.mid.1.resnet",
        ),
        ({"sites": [3]}, TypeError, "Site objects or names"),
        ({"mode": "delete"}, ValueError, "mode must be 'restore' or 'knock_out'"),
        ({"branch": "left"}, ValueError, "branch must be"),
        ({"branch": "uncond", "guidance_scale": 1.0}, ValueError, "no unconditional branch"),
        ({"branch": "uncond", "sites": ["text_encoder.0.mlp"]}, ValueError, "feed the conditional half only"),
        ({"branch": "uncond", "tokens": ["eos"]}, ValueError, 'branch must be "cond" or "both"'),
        ({"tokens": "verb"}, ValueError, "no token group"),
        ({"tokens": [500]}, ValueError, "outside the window"),
        ({"tokens": [numpy.int64(500)]}, ValueError, "outside the window"),
        ({"tokens": [2.5]}, TypeError, "positions, which are integers; got 2.5"),
        ({"tokens": ["eos", None]}, TypeError, "positions, which are integers; got None"),
        ({"tokens": [True]}, TypeError, "positions, which are integers; got True"),
        ({"tokens": 2.5}, TypeError, "positions, which are integers; got 2.5"),
        ({"tokens": [3, numpy.int64(3)]}, ValueError, "each once"),
        ({"tokens": numpy.array([], int)}, ValueError, "at least one group or position"),
        ({"tokens": ["eos"], "sites": ["unet.mid.0.resnet"]}, ValueError, "has none"),
        ({"windows": [(0.5, 0.5)]}, ValueError, "a window is"),
        ({"windows": [(0.6, 0.7)]}, ValueError, "nothing happens in the window"),
        ({"windows": [(0, 0.5), (0, 0.5)]}, ValueError, "windows are given twice"),
        ({"windows": [(0, 1)], "sites": ["text_encoder.0.mlp"]}, ValueError, "runs only once"),
        ({"tokens": ["eos"], "windows": [(0, 1)]}, ValueError, "runs once"),
        ({"batch_size": 2}, ValueError, "at least 3"),
        ({"batch_size": "8"}, TypeError, "batch_size is a whole number, got '8'"),
        ({"batch_size": 8.0}, TypeError, "batch_size is a whole number, got 8.0"),
        ({"num_inference_steps": 0}, ValueError, "at least 1"),
        ({"num_inference_steps": 2.0}, TypeError, "num_inference_steps is a whole number, got 2.0"),
        ({"num_inference_steps": "2"}, TypeError, "num_inference_steps is a whole number, got '2'"),
        ({"metric": "clip"}, TypeError, "a metric is a function"),
        ({"metric": []}, ValueError, "metric is an empty list"),
        ({"metric": [LatentDistance(), LatentDistance()]}, ValueError, "several metrics are called latent_distance"),
    ],
)
def test_bad_arguments_are_errors_before_any_work(tiny_pipe, monkeypatch, wrong, error, message):
    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(tiny_pipe.unet, "forward", no_work)
    monkeypatch.setattr(tiny_pipe.text_encoder, "forward", no_work)
    with pytest.raises(error, match=message):
        mediation.trace(tiny_pipe, CASE, **{**FAST, **wrong})


def test_a_textual_inversion_token_of_several_vectors_is_an_error(fresh_pipe):
    fresh_pipe.tokenizer.add_tokens(["<owl>", "<owl>_1"])  # as textual inversion with two vectors does
    case = mediation.Case("a photo of <owl> in ink", subject="ink")
    with pytest.raises(ValueError, match="of several vectors, which shifts all others"):
        mediation.trace(fresh_pipe, case, metric=LatentDistance(), **FAST)


def test_bad_cases_are_errors(tiny_pipe):
    with pytest.raises(ValueError, match="no cases"):
        mediation.trace(tiny_pipe, [], **FAST)
    with pytest.raises(TypeError, match=r"mediation\.Case"):
        mediation.trace(tiny_pipe, ["a cat"], **FAST)
    twice = Case("a cat", subject="cat", corruption=GaussianNoise(draws=2))
    with pytest.raises(ValueError, match="different numbers of draws"):
        mediation.trace(tiny_pipe, [CASE, twice], **FAST)
    with pytest.raises(ValueError, match="truncated"):
        mediation.trace(tiny_pipe, Case("cat " * 90 + "ink", subject="ink"), **FAST)
    with pytest.raises(TypeError, match="must be a GaussianNoise, ReplaceSubject or ZeroSubject, got str"):
        Case("a cat", subject="cat", corruption="zero")
    with pytest.raises(ValueError, match="behind the text encoder"):
        mediation.trace(tiny_pipe, Case("a cat", subject="cat", corruption=ZeroSubject(where="output")), **FAST)
    with pytest.raises(ValueError, match="behind the text encoder"):
        mediation.trace(tiny_pipe, Case("a cat", subject="cat", corruption=GaussianNoise(where="output")), **FAST)
    with pytest.raises(ValueError, match="one number for each"):
        mediation.trace(tiny_pipe, CASE, sites=["unet.mid.0.resnet"], metric=lambda i, z, c: [1.0], **FAST)
