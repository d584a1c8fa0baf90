"""Estimates: exact where all is linear, slopes everywhere, and honest about where there is none."""

import dataclasses

import numpy
import pytest
import torch

import mediation
from mediation import Case, ImageMSE, LatentDistance, ReplaceSubject
from mediation.attribution import attribution_patching, radau
from mediation.pipelines import family_of
from mediation.plans import make_plan
from mediation.sampling import Sampling
from tests import tiny
from tests.linear import linear_metric, linear_pipeline
from tests.runs import doors, double, hooks_of

CASE = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("dog"), seed=3)
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}
OWN_WEIGHT = torch.ones((), requires_grad=True)  # of a metric
ESTIMATE = {"backend": "attribution_patching", **FAST}


@pytest.fixture(scope="module")
def linear():
    return linear_pipeline()


@pytest.fixture(scope="module")
def precise():
    return double(tiny.shallow())


def indirect(effects):
    return mediation.indirect_effect(effects).squeeze(("case", "draw"), drop=True)


def test_the_default_is_every_site_of_the_denoiser_at_every_step(linear):
    estimated = mediation.trace(linear, CASE, metric=linear_metric, **ESTIMATE)
    assert estimated.window.values.tolist() == ["0–0.5", "0.5–1"]
    assert estimated.site.values.tolist() == [site.name for site in mediation.sites(linear, network="unet")]
    text = mediation.trace(linear, CASE, metric=linear_metric, sites=["text_encoder.0.mlp"], **ESTIMATE)
    assert text.restored.dims == ("case", "draw", "site")


def test_longer_windows_and_groups_are_sums(linear):
    first, second = "unet.down.0.0.resnet", "unet.up.0.0.feed_forward"
    options = {"metric": linear_metric, **ESTIMATE}
    each = indirect(mediation.trace(linear, CASE, sites=[first, second], **options))
    whole = indirect(mediation.trace(linear, CASE, sites=[[first, second]], windows=[(0, 1)], **options))
    assert float(whole.squeeze()) == pytest.approx(float(each.sum()), rel=1e-9)


def states_by_step(pipe, prompt, module, change=None):
    """Final latents of a plain run, and what a module gave at each of its calls; `change` has (call, output)."""
    given = []

    def hook(_module, _arguments, output):
        given.append(output.clone())
        return None if change is None else change(len(given) - 1, output)

    noise = torch.randn(1, *family_of(pipe).latent_shape(pipe), generator=torch.Generator().manual_seed(CASE.seed))
    handle = module.register_forward_hook(hook)
    try:
        latents = pipe(
            prompt, latents=noise.double(), num_inference_steps=2, guidance_scale=4.0, output_type="latent"
        ).images
    finally:
        handle.remove()
    return latents, given


def slope(pipe, module, call, direction, size=1e-3):
    """How fast the distance from the clean run changes as a call's output moves, by central differences."""
    clean, _ = states_by_step(pipe, CASE.prompt, module)

    def moved(by):
        change = lambda number, output: output + by * direction if number == call else output  # noqa: E731
        latents, _ = states_by_step(pipe, CASE.corrupted_prompt, module, change)
        return -float((latents - clean).square().mean().sqrt())

    return (moved(size) - moved(-size)) / (2 * size)


@pytest.mark.parametrize("component", ["resnet", "cross_attention", "feed_forward"])
def test_an_estimate_is_the_slope_towards_the_clean_activation(precise, component):
    """Restoring along the estimate's own tangent leaves no error but that of the differences."""
    site = mediation.sites(precise, network="unet", component=component)[3]
    module = site.module(precise)
    _, clean = states_by_step(precise, CASE.prompt, module)
    _, corrupted = states_by_step(precise, CASE.corrupted_prompt, module)
    estimated = indirect(mediation.trace(precise, CASE, sites=[site], metric=LatentDistance(), **ESTIMATE))
    for step in range(2):
        towards = clean[step] - corrupted[step]
        towards[0] = 0  # the unconditional half
        expected = slope(precise, module, step, towards)
        assert abs(expected) > 1e-9
        assert float(estimated[0, step]) == pytest.approx(expected, rel=1e-4)


def test_estimates_go_back_through_the_text_encoder_to_each_token(precise):
    """The oracle moves one position of the encoder's own run; the empty prompt's run comes after it."""
    site = mediation.sites(precise, network="text_encoder", component="mlp")[0]
    module = site.module(precise)
    _, clean = states_by_step(precise, CASE.prompt, module)
    _, corrupted = states_by_step(precise, CASE.corrupted_prompt, module)
    tokens = {"subject": 5, "eos": len(precise.tokenizer(CASE.prompt).input_ids) - 1}
    options = {"sites": [site], "tokens": ["subject", "eos", "bos"], "metric": LatentDistance()}
    estimated = indirect(mediation.trace(precise, CASE, **options, **ESTIMATE))
    for token, position in tokens.items():
        towards = torch.zeros_like(clean[0])
        towards[:, position] = (clean[0] - corrupted[0])[:, position]
        expected = slope(precise, module, 0, towards)
        assert abs(expected) > 1e-7
        assert float(estimated.sel(token=token).squeeze()) == pytest.approx(expected, rel=1e-4)
    assert abs(float(estimated.sel(token="bos").squeeze())) < 1e-12  # the encoder is causal


def test_averaged_gradients_account_for_the_total_effect(precise):
    """Text doors read nothing but text, so that the gradient along the way adds up to all of the effect."""
    sampling = Sampling(2, 4.0)
    plan = make_plan(
        precise, CASE, sites=["unet.mid.0.resnet"], metric=LatentDistance(), tokens=None, windows=None, mode="restore",
        sampling=sampling, batch_size=None, images=None, progress=False,
    )  # fmt: skip
    # not from the very end of the way, where the distance has a kink
    metric = lambda images, latents, cases: latents.square().mean((1, 2, 3)) + latents.sin().mean((1, 2, 3))  # noqa: E731
    plan = dataclasses.replace(plan, groups=(doors(precise),), metrics=(metric,))
    errors = []
    for n_points in (1, 2, 4):
        values = attribution_patching(precise, plan, integrated=n_points)
        clean, corrupted, restored = (float(values[name].squeeze()) for name in ("clean", "corrupted", "restored"))
        errors.append(abs((restored - clean) / (clean - corrupted)))
    assert errors[0] > 10 * errors[1] > 10 * errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("n_points", [1, 2, 5])
def test_radau_points_average_polynomials(n_points):
    points, weights = radau(n_points)
    assert points[0] == 0
    assert (numpy.diff(points) > 0).all()
    for degree in range(2 * n_points - 1):
        assert weights @ points**degree == pytest.approx(1 / (degree + 1))


def test_few_rows_at_a_time_give_the_same_averages(precise):
    options = {"sites": ["unet.mid.0.resnet"], "metric": LatentDistance(), "integrated": 4, **ESTIMATE}
    together = mediation.trace(precise, CASE, batch_size=4, **options)
    apart = mediation.trace(precise, CASE, batch_size=3, **options)
    numpy.testing.assert_allclose(apart.restored, together.restored, rtol=1e-9)
    plain = mediation.trace(precise, CASE, **options | {"integrated": 1})
    assert float(abs(plain.restored - together.restored).max()) > 1e-6


def test_images_are_differentiated_through_the_decoder(precise):
    """Two metrics at once, one of them of images, whose slope comes from single-metric central differences."""

    def brightness(images, latents, cases):
        return images.square().mean((1, 2, 3))

    site = mediation.sites(precise, name="unet.mid.0.resnet")[0]
    module = site.module(precise)
    both = mediation.trace(precise, CASE, sites=[site], metric=[LatentDistance(), brightness], **ESTIMATE)
    one = mediation.trace(precise, CASE, sites=[site], metric=LatentDistance(), **ESTIMATE)
    numpy.testing.assert_allclose(both.restored.sel(metric="latent_distance"), one.restored, rtol=1e-12)
    _, clean = states_by_step(precise, CASE.prompt, module)
    _, corrupted = states_by_step(precise, CASE.corrupted_prompt, module)
    towards = clean[1] - corrupted[1]
    towards[0] = 0

    @torch.no_grad()
    def moved(by):
        change = lambda number, output: output + by * towards if number == 1 else output  # noqa: E731
        latents, _ = states_by_step(precise, CASE.corrupted_prompt, module, change)
        return float(brightness(family_of(precise).decode(precise, latents), None, None))

    expected = (moved(1e-3) - moved(-1e-3)) / 2e-3
    found = indirect(both).sel(metric="brightness")
    assert abs(expected) > 1e-9
    assert float(found[0, 1]) == pytest.approx(expected, rel=1e-3)


def test_sdxl_text_sites_reach_the_pooled_embedding():
    """The last layer of the second encoder counts through it alone, and that of the first for nothing."""
    pipe = double(tiny.shallow("sdxl"))
    sites = ["text_encoder.2.mlp", "text_encoder_2.2.mlp", "text_encoder_2.0.mlp"]
    estimated = indirect(mediation.trace(pipe, CASE, sites=sites, tokens="all", metric=LatentDistance(), **ESTIMATE))
    unread, pooled, both = estimated.values.ravel()
    assert unread == 0
    assert abs(pooled) > 1e-9
    assert abs(both) > 1e-9


def test_nothing_is_left_behind(precise):
    hooks, scheduler = hooks_of(precise), precise.scheduler

    def fail(images, latents, cases):
        if latents.shape[0] == 2 and not torch.is_grad_enabled():
            raise ArithmeticError
        return latents.mean((1, 2, 3))

    with pytest.raises(ArithmeticError):
        mediation.trace(precise, CASE, sites=["unet.mid.0.resnet"], metric=fail, **ESTIMATE)
    assert hooks_of(precise) == hooks
    assert precise.scheduler is scheduler
    assert all(parameter.requires_grad for parameter in precise.unet.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "knock_out", "metric": LatentDistance()}, "latent_distance is least at the clean run"),
        ({"mode": "knock_out", "metric": ImageMSE()}, "image_mse is least at the clean run"),
        ({"metric": lambda images, latents, cases: latents.detach().mean((1, 2, 3))}, "gives no gradient"),
        ({"metric": lambda images, latents, cases: numpy.zeros(len(latents))}, "gives no gradient"),
        ({"images": "all"}, "make no images"),
        ({"integrated": 0}, "at least 1"),
        ({"verify": 1}, "at least 2"),
        ({"verify": 2, "sites": ["unet.mid.0.resnet"], "num_inference_steps": 1}, "and the map has 1: restore it"),
        ({"verify": 2, "sites": ["text_encoder.0.mlp"], "tokens": [2]}, "and the map has 1: restore it"),
        ({"verify": 2, "screen": 0.5}, "without screen"),
        ({"verify": 2, "backend": "restoration"}, "verify is for"),
        ({"screen": 1.5}, "above 0 and up to 1"),
        ({"screen": 0.5, "backend": "direct_effect"}, "none of direct effects"),
        ({"screen": 0.5, "metric": [LatentDistance()]}, "one metric"),
        ({"integrated": 2, "backend": "restoration"}, "makes none"),
        ({"windows": "all"}, 'windows is "each"'),
        ({"metric": lambda images, latents, cases: OWN_WEIGHT * latents.detach().mean((1, 2, 3))}, "gives no gradient"),
        ({"metric": lambda images, latents, cases: OWN_WEIGHT.expand(2)}, "gives no gradient"),
        ({"integrated": 2.5}, "integrated is a whole number, got 2.5"),
        ({"verify": 2.5}, "verify is a whole number, got 2.5"),
        ({"verify": True}, "verify is a whole number, got True"),
    ],
)
def test_bad_arguments_are_errors_before_any_work(precise, monkeypatch, wrong, message):
    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(precise.unet, "forward", no_work)
    monkeypatch.setattr(precise.text_encoder, "forward", no_work)
    with pytest.raises((ValueError, TypeError), match=message):
        mediation.trace(precise, CASE, **{"metric": LatentDistance(), **ESTIMATE, **wrong})


def test_half_precision_is_refused_wherever_gradients_pass():
    pipe = tiny.shallow("sdxl")
    options = {"metric": LatentDistance(), **ESTIMATE}
    pipe.text_encoder.half()
    with pytest.raises(ValueError, match="underflow in float16, which the text_encoder is in"):
        mediation.trace(pipe, CASE, sites=["text_encoder.0.mlp"], **options)
    mediation.trace(pipe, CASE, sites=["unet.mid.0.resnet"], **options)
    pipe.unet.half()
    with pytest.raises(ValueError, match="underflow in float16, which the unet is in"):
        mediation.trace(pipe, CASE, sites=["unet.mid.0.resnet"], **options)


def test_inference_mode_is_refused_by_name_and_no_grad_is_not(precise):
    options = {"sites": ["unet.mid.0.resnet"], "metric": LatentDistance(), **ESTIMATE}
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of it, or use torch\.no_grad"):
        mediation.trace(precise, CASE, **options)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of it, or use torch\.no_grad"):
        mediation.attribute(precise, "a cat", num_inference_steps=1)
    with torch.no_grad():
        inside = mediation.trace(precise, CASE, **options)
    numpy.testing.assert_array_equal(inside.restored, mediation.trace(precise, CASE, **options).restored)
