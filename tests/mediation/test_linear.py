"""On a linear toy denoiser every first-order backend equals restoration, whatever the scheduler."""

import diffusers
import numpy
import pytest
import torch

import mediation
from mediation import Case, ReplaceSubject
from mediation.objectives import amplify_objective, erase_objective
from mediation.parameters import locate
from mediation.sampling import Sampling
from tests.linear import linear_metric, linear_pipeline

CASE = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("dog"), seed=3)
FAST = {"metric": linear_metric, "guidance_scale": 4.0, "progress": False}
# name -> scheduler, its options, and calls of the denoiser in four steps
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}, 4),
    "euler": (diffusers.EulerDiscreteScheduler, {}, 4),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, 4),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}, 4),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, 5),
    "heun": (diffusers.HeunDiscreteScheduler, {}, 7),
}
STEPS = 4
# some of diffusers' schedulers make arrays of tensors in a way that numpy 2 deprecates
numpys = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
# what runs here is covered elsewhere, and slow to measure
pytestmark = [numpys, pytest.mark.no_cover]


@pytest.fixture(scope="module")
def linear():
    return linear_pipeline()


@pytest.fixture(params=SCHEDULERS)
def scheduled(request, linear, monkeypatch):
    """The pipeline with each scheduler, and how often that calls the denoiser."""
    scheduler, options, n_calls = SCHEDULERS[request.param]
    monkeypatch.setattr(linear, "scheduler", scheduler.from_config(linear.scheduler.config, **options))
    return linear, n_calls


def assert_equal_maps(estimate, exact):
    """Every site has an effect, and the maps agree on it."""
    assert estimate.attrs["estimate"] == "first_order"
    assert estimate.restored.dims == exact.restored.dims
    effects = mediation.indirect_effect(exact)
    floor = 1e-6 * float(abs(mediation.total_effect(exact)).max())
    assert (abs(effects).max([dim for dim in effects.dims if dim != "site"]) > floor).all()
    precision = 1e-9 if "DDIM" in exact.attrs["scheduler"] else 1e-6  # most other schedulers step in float32
    for name in ("clean", "corrupted", "sham", "restored"):
        numpy.testing.assert_allclose(estimate[name], exact[name], rtol=precision)
    largest = float(abs(effects).max())
    numpy.testing.assert_allclose(mediation.indirect_effect(estimate), effects, rtol=0, atol=precision * largest)


def measured(pipe, **options):
    return mediation.trace(pipe, CASE, **options, **FAST)


def estimated(pipe, **options):
    return mediation.trace(pipe, CASE, backend="attribution_patching", **options, **FAST)


@pytest.mark.parametrize("mode", ["restore", "knock_out"])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_estimates_are_exact_at_every_kind_of_site(linear, mode, branch):
    chosen = [*mediation.sites(linear, network="unet"), *mediation.sites(linear, network="unet", component="block")]
    chosen += mediation.sites(linear, network="unet", component="self_attention", heads=True)
    options = {"sites": chosen, "mode": mode, "branch": branch, "windows": "each", "num_inference_steps": 2}
    assert_equal_maps(estimated(linear, **options), measured(linear, **options))


def test_estimates_are_exact_for_each_call_of_any_scheduler(scheduled):
    pipe, n_calls = scheduled
    sites = ["unet.down.0.0.resnet", "unet.up.0.0.cross_attention"]
    options = {"sites": sites, "windows": "each", "num_inference_steps": STEPS}
    exact = measured(pipe, **options)
    assert exact.sizes["window"] == n_calls
    for integrated in (1, 2):
        assert_equal_maps(estimated(pipe, integrated=integrated, **options), exact)
    assert (abs(mediation.indirect_effect(exact).sel(site=sites[1])) > 0).all(), "no window goes without a call"


def test_estimates_are_exact_in_the_text_encoder(scheduled):
    pipe, _ = scheduled
    sites = ["text_encoder.0.self_attention", "text_encoder.1.mlp", "text_encoder.2.block"]
    options = {"sites": sites, "tokens": ["subject", "after", "all"], "num_inference_steps": STEPS}
    exact = measured(pipe, **options)
    for integrated in (1, 2):
        assert_equal_maps(estimated(pipe, integrated=integrated, **options), exact)


def test_hooks_of_others_on_the_denoiser_are_part_of_it(linear):
    sites, options = ["unet.down.0.0.resnet", "unet.up.0.0.feed_forward"], {"windows": "each", "num_inference_steps": 2}
    plain = mediation.trace(linear, CASE, sites=sites, **options, **FAST)
    before = linear.unet.register_forward_pre_hook(lambda module, given: (1.3 * given[0], *given[1:]))
    behind = linear.unet.register_forward_hook(lambda module, given, output: (0.8 * output[0] + given[0],))
    with before, behind:
        estimate, exact = (measure(linear, sites=sites, **options) for measure in (estimated, measured))
    assert_equal_maps(estimate, exact)
    assert (abs(exact.restored - plain.restored) > 1e-3 * abs(plain.restored)).all()


# of every kind, and in the text encoder
WEIGHTS = ["unet.conv_in.weight", "unet.down.0.0.cross_attention", "unet.up.0.0.feed_forward", "text_encoder.1.mlp"]


@pytest.mark.parametrize("objective", ["erase", "amplify"])
def test_scores_of_weights_miss_nothing_but_the_square_of_what_they_change(scheduled, objective):
    """Predictions e are linear in a weight w, so that J(w) − J(0) = w dJ/dw ∓ mean ||e(w) − e(0)||²."""
    pipe, n_calls = scheduled
    how = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    found = mediation.attribute(pipe, "a cat", objective=objective, parameters=WEIGHTS, seeds=1, progress=False, **how)
    drawn = {"seeds": [1], "sampling": Sampling(**how), "batch_size": 4, "progress": False}
    if objective == "erase":
        at, sign = erase_objective(pipe, "a cat", "", **drawn), 1
        assert len(at.latents) == n_calls, "each call of the denoiser gives an x_t"
    else:
        at, sign = amplify_objective(pipe, "a cat", None, **drawn), -1

    @torch.no_grad()
    def predictions():
        states = pipe.encode_prompt("a cat", "cpu", 1, False)[0].expand(len(at.latents), -1, -1)
        return pipe.unet(at.latents, at.timesteps, encoder_hidden_states=states)[0]

    def value(predicted):
        return sign * float((at.targets - predicted).square().sum()) / len(at.latents)

    before = predictions()
    for name, score in found.scores.items():
        place = int(score.abs().argmax())
        weight = getattr(*locate(pipe, name)).data.view(-1)
        kept = weight[place].clone()
        try:
            weight[place] = 0
            after = predictions()
        finally:
            weight[place] = kept
        square = float((before - after).square().sum()) / len(at.latents)
        expected = value(before) - value(after) + sign * square
        assert square > 0
        assert float(score.flatten()[place]) == pytest.approx(expected, rel=1e-4, abs=1e-5 * square), name
