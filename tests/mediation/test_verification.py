"""Estimates that are checked, and what the check says of them."""

import numpy
import pytest
import xarray
from scipy import stats

import mediation
from mediation import Case, LatentDistance, ReplaceSubject
from tests.linear import linear_metric, linear_pipeline
from tests.maps import make_map

CASE = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("dog"), seed=3)
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


@pytest.fixture(scope="module")
def linear():
    return linear_pipeline()


@pytest.fixture(params=["cases paired", "cases unknown"])
def checked(request):
    """Three cases, six sites of which four were drawn and five measured."""
    generator = numpy.random.default_rng(0)
    exact = generator.normal(size=(3, 1, 6))
    effects = make_map(
        exact + 0.2 * generator.normal(size=exact.shape) + 0.1,
        sites=[f"unet.{i}.resnet" for i in range(6)],
        prompts=["a cat", "a dog", "an owl"] if request.param == "cases paired" else None,
    )
    exact[:, :, 5] = numpy.nan
    drawn = ("site", [1, 0, 1, 1, 1, 0])
    return effects.assign(exact=(("case", "draw", "site"), exact), sampled=drawn)


def test_the_report_is_what_scipy_makes_of_the_places(checked):
    report = mediation.verification(checked, k=2, n_resamples=200)
    estimated, exact = (checked[name].mean(("case", "draw")).values for name in ("restored", "exact"))
    drawn = [0, 2, 3, 4]
    value = report.estimate.to_series()
    assert value["spearman"] == pytest.approx(stats.spearmanr(estimated[drawn], exact[drawn]).statistic)
    assert value["bias"] == pytest.approx((estimated - exact)[drawn].mean())
    top = [set(numpy.argsort(-values[:5])[:2]) for values in (estimated, exact)]
    assert value["recall"] == len(top[0] & top[1]) / 2
    assert (report.low <= report.estimate).all()
    assert (report.estimate <= report.high).all()
    assert (report.attrs["n_drawn"], report.attrs["n_measured"]) == (4, 5)


def test_perfect_estimates_are_told_from_reversed_ones(checked):
    variants = {
        "same": checked.assign(restored=checked.exact.fillna(0)),
        "opposite": checked.assign(restored=-checked.exact.fillna(0)),
        "shifted": checked.assign(restored=checked.exact.fillna(0) + 3),
    }
    found = {
        name: mediation.verification(variant, k=2, n_resamples=2).estimate.values for name, variant in variants.items()
    }
    assert found["same"].tolist() == [1, 0, 1]
    assert found["opposite"][0] == -1
    assert found["shifted"] == pytest.approx([1, 3, 1])


def test_a_map_without_exact_values_is_refused(checked):
    with pytest.raises(ValueError, match="was not verified"):
        mediation.verification(checked.drop_vars("exact"))


@pytest.fixture(scope="module")
def maps(linear):
    """The exact map and the estimated one of a metric that curves, by step."""

    def curved(images, latents, cases):
        values = linear_metric(images, latents, cases)
        return values + 0.05 * values.square()

    curved.needs_images = False
    options = {"metric": curved, **FAST}
    exact = mediation.trace(linear, CASE, windows="each", sites=mediation.sites(linear, network="unet"), **options)
    return exact, mediation.trace(linear, CASE, backend="attribution_patching", **options), options


def places(effects):
    return mediation.indirect_effect(effects).isel(case=0, draw=0).transpose("site", "window")


def test_verifying_measures_the_best_and_as_many_at_random(linear, maps):
    exact, estimated, options = maps
    found = mediation.trace(linear, CASE, backend="attribution_patching", verify=5, **options)
    xarray.testing.assert_equal(found.restored, estimated.restored)
    is_measured = found.exact.notnull().isel(case=0, draw=0).transpose("site", "window").values
    best = numpy.argsort(-places(estimated).values, axis=None, kind="stable")[:5]
    drawn = found.sampled.transpose("site", "window").values
    assert is_measured.ravel()[best].all()
    assert drawn.sum() == 5
    assert (is_measured == (drawn == 1) | numpy.isin(numpy.arange(drawn.size).reshape(drawn.shape), best)).all()
    measured = found.exact.transpose(*exact.restored.dims)
    numpy.testing.assert_allclose(
        measured.values[measured.notnull().values], exact.restored.values[measured.notnull().values], rtol=1e-9
    )
    assert float(abs(found.exact - found.restored).max()) > 1e-3
    report = mediation.verification(found, k=3)
    assert numpy.isnan(report.low).all()  # a single case
    assert found.attrs["verify"] == 5


@pytest.mark.parametrize("backend", ["attribution_patching", "restoration"])
def test_screening_makes_the_best_exact_and_keeps_the_others(linear, maps, backend):
    exact, estimated, options = maps
    chosen = mediation.sites(linear, network="unet")
    found = mediation.trace(linear, CASE, backend=backend, sites=chosen, windows="each", screen=0.3, **options)
    n_places = places(estimated).size
    best = numpy.zeros(n_places, bool)
    best[numpy.argsort(-places(estimated).values, axis=None, kind="stable")[: -int(-0.3 * n_places // 1)]] = True
    values, wanted, kept = (places(x).values.ravel() for x in (found, exact, estimated))
    numpy.testing.assert_allclose(values[best], wanted[best], rtol=1e-9)
    numpy.testing.assert_allclose(values[~best], kept[~best], rtol=1e-9)
    assert (found.exact.notnull().isel(case=0, draw=0).transpose("site", "window").values.ravel() == best).all()
    assert 0 < best.sum() < n_places
    assert found.attrs["estimate"] == "first_order"


def test_screening_all_is_the_exact_map(linear, maps):
    exact, _, options = maps
    chosen = mediation.sites(linear, network="unet")
    found = mediation.trace(linear, CASE, sites=chosen, windows="each", screen=1.0, **options)
    numpy.testing.assert_allclose(found.restored, exact.restored, rtol=1e-9)


def test_tokens_without_a_place_are_not_measured(linear):
    case = Case("cat", subject="cat", corruption=ReplaceSubject("dog"))
    found = mediation.trace(
        linear, case, sites=["text_encoder.0.mlp"], tokens=["before", "subject", "eos"], screen=1.0,
        metric=LatentDistance(), **FAST,
    )  # fmt: skip
    assert numpy.isnan(found.restored.values).ravel().tolist() == [True, False, False]
