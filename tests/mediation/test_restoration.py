"""What must hold of the exact backend on any pipeline: here on tiny random weights of the true architecture."""

import numpy
import pytest
import torch

import mediation
from mediation import Case, GaussianNoise, LatentDistance, ReplaceSubject
from mediation.pipelines import family_of
from mediation.sampling import CLEAN, SHAM, Intervention, Sampling, encode_rows, sample_rows
from mediation.sites import Site

CASE = Case("a photo of a cat in ink style", subject="cat", seed=3)
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}
SAMPLING = Sampling(num_inference_steps=3, guidance_scale=4.0)


def rms(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def doors(pipe):
    """Every module through which the denoiser reads text, as sites."""
    paths = family_of(pipe).text_doors(pipe.unet)
    return tuple(Site(path, "unet", "text_door", i, "", path) for i, path in enumerate(paths))


def hooks_of(pipe):
    return [
        (name, module)
        for network in (pipe.unet, pipe.text_encoder, pipe.vae)
        for name, module in network.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


@pytest.mark.parametrize("corruption", [GaussianNoise(), GaussianNoise(where="output"), ReplaceSubject("strawberry")])
def test_restoring_every_text_door_is_the_clean_run(tiny_pipe, corruption):
    case = Case(CASE.prompt, subject=CASE.subject, corruption=corruption)
    rows = [Intervention(doors(tiny_pipe)), Intervention()]
    latents = sample_rows(tiny_pipe, case, 0, rows, SAMPLING)
    damage = rms(latents[SHAM], latents[CLEAN])
    assert damage > 1e-3  # there is something to restore
    assert rms(latents[2], latents[CLEAN]) < 1e-4 * damage
    assert rms(latents[3], latents[SHAM]) < 1e-4 * damage


def test_text_sites_cannot_undo_what_the_residual_stream_carries(tiny_pipe):
    """Noise on the embeddings passes by every layer, so restoring all outputs helps and is not the clean run."""
    sites = tuple(mediation.sites(tiny_pipe, network="text_encoder"))
    states = encode_rows(tiny_pipe, CASE, 0, [Intervention(sites), Intervention()])["prompt_embeds"]
    assert 0 < rms(states[2], states[CLEAN]) < rms(states[SHAM], states[CLEAN])
    assert torch.equal(states[3], states[SHAM])


def test_the_clean_row_is_what_the_pipeline_does_alone(tiny_pipe):
    noise = torch.randn(
        1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(CASE.seed)
    )
    alone = tiny_pipe(
        CASE.prompt, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    ).images
    latents = sample_rows(tiny_pipe, CASE, 0, [], SAMPLING)
    assert rms(latents[CLEAN], alone[0]) < 1e-4 * alone.std().item()


def test_replacing_the_subject_is_what_the_pipeline_does_with_the_other_prompt(tiny_pipe):
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("strawberry"), seed=3)
    noise = torch.randn(1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(3))
    alone = tiny_pipe(
        case.corrupted_prompt, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    ).images
    latents = sample_rows(tiny_pipe, case, 0, [], SAMPLING)
    assert rms(latents[SHAM], alone[0]) < 1e-4 * alone.std().item()


def test_noise_is_three_standard_deviations_of_the_embedding_table_at_the_subject_alone(tiny_pipe):
    embedded = {}
    table = tiny_pipe.text_encoder.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, args, output: embedded.update(ids=args[0], output=output))
    try:
        encode_rows(tiny_pipe, CASE, 0, [])
    finally:
        handle.remove()
    # This hook came first, so it sees the table's own output; the corrupted one reaches the encoder behind it.
    assert torch.equal(embedded["ids"][0], embedded["ids"][1])
    clean = table(embedded["ids"][0])
    corrupted = {}
    norm = dict(tiny_pipe.text_encoder.named_modules())
    embeddings = norm.get("embeddings") or norm["text_model.embeddings"]
    handle = embeddings.register_forward_hook(lambda module, args, output: corrupted.update(output=output))
    try:
        encode_rows(tiny_pipe, CASE, 0, [])
    finally:
        handle.remove()
    difference = corrupted["output"][SHAM] - corrupted["output"][CLEAN]
    tokens = tiny_pipe.tokenizer(CASE.prompt).input_ids
    subject = tiny_pipe.tokenizer("cat").input_ids[1:-1]
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(subject)] == subject)
    positions = list(range(start, start + len(subject)))
    others = [p for p in range(len(clean)) if p not in positions]
    assert torch.count_nonzero(difference[others]) == 0
    expected = 3.0 * table.weight.std() * GaussianNoise().noise((len(positions), clean.shape[-1]), 3, 0)
    torch.testing.assert_close(difference[positions], expected, atol=1e-6, rtol=1e-4)


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
    damage = rms(latents[SHAM], latents[CLEAN])
    assert rms(latents[2], latents[SHAM]) > 1e-3 * damage
    assert rms(latents[2], by_hand) < 1e-3 * damage


def test_windows_restore_for_a_while(tiny_pipe):
    site = doors(tiny_pipe)
    windows = [(0.0, 1 / 3), (1 / 3, 1.0), (0.0, 1.0)]
    latents = sample_rows(tiny_pipe, CASE, 0, [Intervention(site, window=w) for w in windows], SAMPLING)
    distances = [rms(latents[i], latents[CLEAN]) for i in (2, 3, 4)]
    assert distances[2] < 1e-3 * min(distances[:2])
    assert all(d < rms(latents[SHAM], latents[CLEAN]) for d in distances)


@pytest.mark.parametrize(
    ("branch", "halves"), [("cond", (False, True)), ("uncond", (True, False)), ("both", (True, True))]
)
def test_branches_change_their_own_half(tiny_pipe, branch, halves):
    site = mediation.sites(tiny_pipe, name="unet.mid.0.resnet")[0]
    inputs = []
    behind = tiny_pipe.unet.mid_block.attentions[0]
    handle = behind.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    try:
        sample_rows(tiny_pipe, CASE, 0, [Intervention((site,))], Sampling(2, 4.0, branch))
    finally:
        handle.remove()
    # In the second step latents differ, so the unconditional half too has something to restore.
    rows = inputs[1]  # clean, sham, restored: unconditional, then conditional
    assert tuple(torch.equal(rows[offset + 2], rows[offset + CLEAN]) for offset in (0, 3)) == halves


def test_self_patch_is_the_identity(tiny_pipe):
    """In a case whose corruption changes nothing, restoring any site changes nothing."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("CAT"))
    effects = mediation.trace(tiny_pipe, case, metric=LatentDistance(), **FAST)
    assert float(abs(effects.restored).max()) < 1e-5
    assert float(abs(effects.corrupted).max()) < 1e-5


def test_sham_is_corrupted_and_effects_are_above_the_noise_floor(tiny_pipe):
    effects = mediation.trace(tiny_pipe, CASE, metric=LatentDistance(), batch_size=8, **FAST)
    floor = float(abs(effects.sham - effects.corrupted).max())
    assert floor < 1e-4 * float(mediation.total_effect(effects).max())
    assert float(abs(mediation.indirect_effect(effects)).max()) > 100 * floor


def test_the_map_does_not_depend_on_batch_size_or_company(tiny_pipe):
    chosen = mediation.sites(tiny_pipe, component="resnet")
    options = {"metric": LatentDistance(), **FAST}
    other = Case("a dog", subject="dog", seed=9)
    together = mediation.trace(tiny_pipe, [CASE, other], sites=chosen, batch_size=16, **options)
    alone = mediation.trace(tiny_pipe, CASE, sites=chosen[:3], batch_size=3, **options)
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


@pytest.mark.parametrize("failing", ["unet", "text_encoder", "metric"])
def test_nothing_is_left_behind_after_an_error(tiny_pipe, failing):
    before = hooks_of(tiny_pipe)
    progress_before = getattr(tiny_pipe, "_progress_bar_config", None)

    def fail(*args):
        raise RuntimeError("on purpose")

    handle = None
    metric = LatentDistance()
    if failing == "metric":
        metric = fail
    else:
        network = getattr(tiny_pipe, failing)
        path = mediation.sites(tiny_pipe, network=failing)[-1].path
        handle = network.get_submodule(path).register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            mediation.trace(tiny_pipe, CASE, metric=metric, **FAST)
    finally:
        if handle:
            handle.remove()
    assert hooks_of(tiny_pipe) == before
    assert getattr(tiny_pipe, "_progress_bar_config", None) == progress_before


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"backend": "magic"}, ValueError, "no backend"),
        ({"sites": ["unet.nowhere"]}, KeyError, "no site 'unet.nowhere'"),
        ({"sites": []}, ValueError, "no sites were given"),
        ({"sites": [3]}, TypeError, "Site objects or names"),
        ({"branch": "left"}, ValueError, "branch must be"),
        ({"branch": "uncond", "guidance_scale": 1.0}, ValueError, "no unconditional branch"),
        ({"tokens": "verb"}, ValueError, "no token group"),
        ({"tokens": [500]}, ValueError, "outside the window"),
        ({"tokens": ["eos"], "sites": ["unet.mid.0.resnet"]}, ValueError, "has none"),
        ({"windows": [(0.5, 0.5)]}, ValueError, "a window is"),
        ({"windows": [(0, 1)], "sites": ["text_encoder.0.mlp"]}, ValueError, "runs only once"),
        ({"tokens": ["eos"], "windows": [(0, 1)]}, ValueError, "runs once"),
        ({"batch_size": 2}, ValueError, "at least 3"),
        ({"num_inference_steps": 0}, ValueError, "at least 1"),
        ({"metric": "clip"}, TypeError, "a metric is a function"),
    ],
)
def test_bad_arguments_are_errors_before_any_work(tiny_pipe, monkeypatch, wrong, error, message):
    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(tiny_pipe.unet, "forward", no_work)
    monkeypatch.setattr(tiny_pipe.text_encoder, "forward", no_work)
    with pytest.raises(error, match=message):
        mediation.trace(tiny_pipe, CASE, **{**FAST, **wrong})


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
    with pytest.raises(ValueError, match="behind the text encoder"):
        mediation.trace(tiny_pipe, Case("a cat", subject="cat", corruption=GaussianNoise(where="output")), **FAST)
    with pytest.raises(ValueError, match="one number for each"):
        mediation.trace(tiny_pipe, CASE, sites=["unet.mid.0.resnet"], metric=lambda i, z, c: [1.0], **FAST)
