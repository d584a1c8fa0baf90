"""Comparisons against scipy on the means, against enumeration, and against numbers worked out by hand."""

import itertools

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from scipy import stats

import mediation
from tests.maps import make_map

FAST = {"n_resamples": 200}


def draws(seed, n_cases=8, n_sites=4, spread=1.0):
    """Effects (case, draw, site) around 0, 1, 2, …"""
    return numpy.random.default_rng(seed).normal(0, spread, (n_cases, 2, n_sites)) + numpy.arange(n_sites)


def names(n):
    return [f"unet.mid.{i}.resnet" for i in range(n)]


def test_ranks_are_those_of_the_means_over_the_common_sites():
    a, b = draws(0, n_sites=9, spread=4), draws(1, n_cases=5, n_sites=9, spread=4)
    first = make_map(a, sites=names(9))
    second = make_map(b, sites=names(9)).isel(site=[8, 3, 4, 0, 1, 2, 7])
    found = mediation.compare(first, second, k=3, **FAST)
    shared = [0, 1, 2, 3, 4, 7, 8]
    x, y = a.mean((0, 1))[shared], b.mean((0, 1))[shared]
    top = [{shared[i] for i in sorted(range(7), key=lambda i: -values[i])[:3]} for values in (x, y)]
    expected = [stats.spearmanr(x, y)[0], stats.kendalltau(x, y)[0], len(top[0] & top[1]) / 3]
    numpy.testing.assert_allclose(found.estimate, expected)
    assert found.chance.values.tolist() == [0, 0, 3 / 7]
    assert (found.attrs["n_places"], found.attrs["n_cases"], found.attrs["paired"]) == (7, [8, 5], 0)


@settings(max_examples=10)
@given(values=numpy_st.arrays(float, (2, 1, 4), elements=st.integers(-50, 50).map(float), unique=True))
def test_only_ranks_count(values):
    one = make_map(values)
    assume(len(set(values.mean((0, 1)))) == 4)
    same = mediation.compare(one, make_map(3 * values + 1), k=2, n_resamples=2)
    opposite = mediation.compare(one, make_map(-values), k=2, n_resamples=2)
    numpy.testing.assert_allclose(same.estimate, [1, 1, 1])
    numpy.testing.assert_allclose(opposite.estimate, [-1, -1, 0])


def test_the_interval_resamples_the_cases_of_each_map():
    a, b = draws(2, n_cases=10, spread=3), draws(3, n_cases=7, spread=3)
    found = mediation.compare(make_map(a), make_map(b), k=1, n_resamples=400, confidence=0.8)
    rng = numpy.random.default_rng(5)
    resampled = [
        stats.kendalltau(*(x.mean(1)[rng.integers(len(x), size=len(x))].mean(0) for x in (a, b)))[0] for _ in range(400)
    ]
    low, high = numpy.quantile(resampled, [0.1, 0.9])
    kendall = found.sel(statistic="kendall")
    # tau of four sites moves in steps of a third
    assert float(kendall.low) == pytest.approx(low, abs=0.34)
    assert float(kendall.high) == pytest.approx(high, abs=0.34)


def test_maps_of_the_same_cases_are_resampled_together_whatever_their_order():
    values = draws(4, spread=5)
    prompts = [f"cat {i}" for i in range(8)]
    one = make_map(values, prompts=prompts)
    again = make_map(values, prompts=prompts).isel(case=[3, 1, 0, 2, 7, 6, 5, 4])
    together = mediation.compare(one, again, k=2, **FAST)
    assert together.attrs["paired"] == 1
    numpy.testing.assert_allclose([together.low, together.high], 1)
    apart = mediation.compare(one, make_map(values, prompts=[f"dog {i}" for i in range(8)]), k=2, **FAST)
    assert apart.attrs["paired"] == 0
    assert (apart.low < 1).all()


def test_places_are_tokens_too_and_those_that_never_ran_are_left_out():
    values = numpy.arange(8.0).reshape(1, 1, 4, 2)
    values[..., 3, 1] = numpy.nan
    tokens = ["subject", "eos"]
    one = make_map(values, token=tokens)
    found = mediation.compare(one, make_map(values[..., ::-1], token=tokens[::-1]), k=2)
    assert found.attrs["n_places"] == 7
    assert found.estimate.values.tolist() == pytest.approx([1, 1, 1])
    assert numpy.isnan(found.low).all()  # a single case


def test_maps_that_cannot_be_compared_are_refused():
    one = make_map(draws(0))
    with pytest.raises(ValueError, match="different dims"):
        mediation.compare(
            one, one.expand_dims(token=["eos"]).transpose(..., "token").assign(one[["clean", "corrupted"]])
        )
    with pytest.raises(ValueError, match=r"needs at least 5 places.*share 4"):
        mediation.compare(one, one)
    with pytest.raises(ValueError, match="share 0"):
        mediation.compare(one, make_map(draws(0), sites=["a", "b", "c", "d"]), k=1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        mediation.compare(one, one, k=0)
    with pytest.raises(ValueError, match="confidence"):
        mediation.compare(one, one, k=1, confidence=95)


def test_p_values_are_exact_shares_of_sign_flips():
    values = draws(6, n_cases=6, n_sites=3)
    found = mediation.contrast(make_map(values), "unet.mid.0.resnet")
    assert found.site.values.tolist() == ["unet.down.0.0.resnet", "unet.down.0.0.cross_attention"]
    for i in range(2):
        differences = (values[..., i] - values[..., 2]).mean(1)
        flipped = [
            abs(numpy.mean(numpy.multiply(signs, differences))) for signs in itertools.product((1, -1), repeat=6)
        ]
        expected = numpy.mean(numpy.array(flipped) >= abs(differences.mean()) - 1e-12)
        assert float(found.p[i]) == pytest.approx(expected)
        assert float(found.difference[i]) == pytest.approx(differences.mean())
        assert float(found.low[i]) < float(found.difference[i]) < float(found.high[i])


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    values = numpy.zeros((10, 1, 4))
    signs = numpy.ones((10, 3))
    signs[:4, 1] = signs[:2, 2] = -1  # consistent in all cases, in six, in eight of ten
    values[:, 0, 1:] = signs
    found = mediation.contrast(make_map(values), "unet.down.0.0.resnet")
    tail = [2 * stats.binom.cdf(m, 10, 0.5) for m in (0, 4, 2)]  # the two-sided sign test
    assert found.p.values.tolist() == pytest.approx(tail)
    assert found.p_holm.values.tolist() == pytest.approx([3 * tail[0], tail[1], 2 * tail[2]])


def test_one_place_can_be_compared_with_all_others():
    values = numpy.random.default_rng(0).normal(size=(8, 1, 2, 2))
    values[..., 0, 0] += 10
    values[..., 1, 1] = numpy.nan
    effects = make_map(values, token=["subject", "eos"])
    found = mediation.contrast(effects, {"site": "unet.down.0.0.resnet", "token": "subject"})
    missing = [[True, False], [False, True]]  # the reference, and what never ran
    assert numpy.isnan(found.p_holm).values.tolist() == missing
    assert numpy.isnan(found.difference).values.tolist() == missing
    assert found.attrs["n_tests"] == 2
    numpy.testing.assert_allclose(found.p.values[~numpy.array(missing)], 2 / 2**8)
    numpy.testing.assert_allclose(found.p_holm.values[~numpy.array(missing)], 4 / 2**8)
    by_token = mediation.contrast(effects, "unet.down.0.0.resnet")
    numpy.testing.assert_allclose(by_token.difference[0, 0], (values[:, 0, 1, 0] - values[:, 0, 0, 0]).mean())


def test_a_single_case_proves_nothing():
    found = mediation.contrast(make_map([[[1.0, 2.0]]]), "unet.down.0.0.resnet")
    assert (found.p.item(), found.p_holm.item(), found.difference.item()) == (1, 1, 1)


def test_a_reference_that_is_not_there_is_named():
    with pytest.raises(KeyError, match=r"no site 'unet\.nowhere'"):
        mediation.contrast(make_map(draws(0)), "unet.nowhere")
    with pytest.raises(KeyError, match="no token 'eos'"):
        mediation.contrast(make_map(draws(0)), {"token": "eos"})
    with pytest.raises(ValueError, match="nothing but the reference"):
        mediation.contrast(make_map([[[1.0]]]), "unet.down.0.0.resnet")
