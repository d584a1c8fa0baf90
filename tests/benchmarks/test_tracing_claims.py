"""Verdicts on maps in which the truth was planted; estimates against the formulas typed anew."""

import json
import math
import sys

import numpy
import pytest

from benchmarks.reproduce import report, tracing
from benchmarks.reproduce.agreement import SMALL, differs, judge_gap
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Estimate, judge, random_place, shares
from benchmarks.reproduce.simultaneous import ratio_intervals
from benchmarks.reproduce.tracing_claims import (
    TEXT_STATE,
    all_claims,
    cross_attention_not_causal,
    distributed,
    first_self_attention_for_style,
    one_text_state,
)
from tests.maps import make_map

pytestmark = pytest.mark.usefixtures("few_resamples")

SITES = [
    "unet.down.0.0.self_attention",  # layer 0 of its kind
    *(f"unet.{block}.0.{kind}" for block in ("down.0", "mid", "up.0") for kind in ("cross_attention", "resnet")),
    *(f"unet.up.{i}.0.feed_forward" for i in range(9)),
]
FIRST, CROSS = SITES[0], SITES[1]
RESNETS = [site for site in SITES if site.endswith("resnet")]
TEXT_SITES = [f"text_encoder.{layer}.{kind}" for layer in range(3) for kind in ("self_attention", "mlp")]
TOKENS = ["last_subject", "after", "eos"]


def noisy(values, noise, seed, n_cases=24):
    """Cases and draws around `values`."""
    rng = numpy.random.default_rng(seed)
    return numpy.array(values) + rng.normal(0, noise, (n_cases, 2, *numpy.shape(values)))


def denoiser(planted=(), share=0.3, noise=0.03, seed=0):
    """A map of the denoiser in which the planted sites bring back `share`, and all others nothing."""
    return make_map(noisy([share * (site in planted) for site in SITES], noise, seed), sites=SITES)


def text(planted=(TEXT_STATE,), share=0.8, noise=0.03, seed=0):
    """Likewise of the text encoder."""
    values = [[share * (f"{site} at {token}" in planted) for token in TOKENS] for site in TEXT_SITES]
    return make_map(noisy(values, noise, seed), sites=TEXT_SITES, token=TOKENS)


def verdicts(claim):
    return {one.attribute: one.verdict for one in claim.findings}


def test_shares_are_ratios_of_means_over_the_runs_that_count():
    effects = denoiser(RESNETS, noise=0.2)
    rng = numpy.random.default_rng(1)
    effects["clean"][:] = rng.uniform(0.5, 2, effects.clean.shape)
    effects["corrupted"][:] = rng.normal(0, 0.1, effects.corrupted.shape)
    effects["sham"][:] = effects.corrupted + 0.01
    effects["clean"][3, 1] = effects.corrupted[3, 1] + 0.005  # below the noise floor
    found = shares(effects)
    indirect = effects.restored.values - effects.corrupted.values[..., None]
    total = effects.clean.values - effects.corrupted.values
    indirect[3, 1] = total[3, 1] = numpy.nan
    expected = numpy.nanmean(indirect, 1).mean(0) / numpy.nanmean(total, 1).mean()
    numpy.testing.assert_allclose([one.mean for one in found.estimates], expected)
    assert found.sham == pytest.approx(0.01 / numpy.nanmean(total, 1).mean())
    control = random_place(effects, [FIRST, CROSS])
    assert control.mean == pytest.approx(expected[[site not in (FIRST, CROSS) for site in SITES]].mean())
    assert control.low < control.mean < control.high


def test_an_interval_is_the_studentised_bootstraps():
    """The formula typed anew, resample by resample, with fewer of them."""
    rng = numpy.random.default_rng(7)
    x, t = rng.normal(0.3, 0.5, (24, 3)), rng.normal(1, 0.2, 24)

    def ratio_and_error(x, t):
        ratio = x.mean(0) / t.mean()
        return ratio, ((x - ratio * t[:, None]) / t.mean()).std(0, ddof=1) / len(t) ** 0.5

    ratio, error = ratio_and_error(x, t)
    largest = []
    for _ in range(4000):
        rows = rng.integers(24, size=24)
        resampled, own_error = ratio_and_error(x[rows], t[rows])
        largest.append((abs(resampled - ratio) / own_error).max())
    half = numpy.quantile(largest, 0.95) * error
    numpy.testing.assert_allclose(
        ratio_intervals(x, t, 0.95), [ratio, ratio - half, ratio + half], atol=0.05 * half.max()
    )


def test_intervals_hold_together():
    """Of 60 maps with 18 places of pure noise, one in twenty may exclude 0 somewhere: at most 7 with 99%."""
    rng = numpy.random.default_rng(8)
    maps = rng.normal(0, 1, (60, 24, 18))
    found = numpy.array([ratio_intervals(one, numpy.ones(24), 0.95) for one in maps])
    assert ((found[:, 1] > 0) | (found[:, 2] < 0)).any(1).sum() <= 7


def test_too_few_cases_tell_nothing():
    assert numpy.isnan(ratio_intervals(numpy.ones((1, 1)), numpy.ones(1), 0.95)[1:]).all()
    assert numpy.isinf(ratio_intervals(numpy.array([[1.0], [2.0]]), numpy.ones(2), 0.95)[1:]).all()
    (one, other) = ratio_intervals(numpy.array([[1.0, 1.0], [numpy.nan, 1.0], [numpy.nan, 1.0]]), numpy.ones(3), 0.95).T
    assert one[0] == 1
    assert numpy.isnan(one[1:]).all()
    assert other.tolist() == [1, 1, 1]


def test_a_place_that_no_case_has_is_no_place():
    effects = text()
    effects["restored"].loc[{"token": "after"}] = numpy.nan
    effects["sham"].loc[{"token": "after"}] = numpy.nan
    assert not any("after" in place for place in shares(effects).places)
    assert one_text_state({"object": effects}).verdict == REPRODUCED


@pytest.mark.parametrize(
    ("causal", "negligible", "expected"),
    [
        ([(0.2, 0.4)], [(-0.05, 0.05)], REPRODUCED),
        ([(0.2, 0.4)], [(-0.05, 0.15)], INCONCLUSIVE),
        ([(0.0, 0.4)], [(-0.05, 0.05)], INCONCLUSIVE),
        ([(-0.05, 0.05)], [], NOT_REPRODUCED),
        ([(0.2, 0.4)], [(0.2, 0.4)], NOT_REPRODUCED),
        ([(0.2, 0.4)], [(-0.4, -0.2)], NOT_REPRODUCED),
        ([(0.0, 0.4)], [(0.2, 0.4)], NOT_REPRODUCED),
        ([(math.nan, math.nan)], [], INCONCLUSIVE),
        ([], [], INCONCLUSIVE),
    ],
)
def test_the_rule(causal, negligible, expected):
    made = [[Estimate((low + high) / 2, low, high) for low, high in one] for one in (causal, negligible)]
    assert judge(*made) == expected


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        (text(), REPRODUCED),
        (text([TEXT_STATE, "text_encoder.2.mlp at eos"]), NOT_REPRODUCED),
        (text(["text_encoder.2.mlp at eos"]), NOT_REPRODUCED),
        (text([]), NOT_REPRODUCED),
        (text(noise=1.0), INCONCLUSIVE),
    ],
)
def test_one_text_state(effects, expected):
    claim = one_text_state({"object": text(seed=1), "style": effects})
    assert verdicts(claim) == {"object": REPRODUCED, "style": expected}
    assert claim.verdict == expected


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        (denoiser(RESNETS), REPRODUCED),
        (denoiser(RESNETS, share=0.9), NOT_REPRODUCED),
        (denoiser(RESNETS[:1], share=0.9), NOT_REPRODUCED),
        (denoiser([]), NOT_REPRODUCED),
        (denoiser(RESNETS, noise=1.0), INCONCLUSIVE),
    ],
)
def test_distributed(effects, expected):
    assert distributed({"object": effects}).verdict == expected


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        (denoiser(RESNETS), REPRODUCED),
        (denoiser([*RESNETS, CROSS]), NOT_REPRODUCED),
        (denoiser([CROSS], share=-0.3), NOT_REPRODUCED),
        (denoiser(RESNETS, noise=1.0), INCONCLUSIVE),
    ],
)
def test_cross_attention(effects, expected):
    assert cross_attention_not_causal({"object": effects}).verdict == expected


def test_cross_attention_is_not_told_apart_where_nothing_is_causal():
    effects = denoiser()
    effects["restored"] = effects.restored - abs(effects.restored)  # nothing above 0 anywhere
    claim = cross_attention_not_causal({"object": effects})
    assert claim.verdict == INCONCLUSIVE
    assert "of 13 other sites, 0 are above the sham" in claim.findings[0].reason


@pytest.mark.parametrize(
    ("style", "other", "expected"),
    [
        ([FIRST], [], REPRODUCED),
        ([FIRST], [FIRST], NOT_REPRODUCED),
        ([], [], NOT_REPRODUCED),
    ],
)
def test_first_self_attention(style, other, expected):
    maps = {"style": denoiser(style), "object": denoiser(other, seed=1)}
    assert first_self_attention_for_style(maps).verdict == expected


@pytest.mark.parametrize("attribute", ["style", "object"])
def test_only_for_style_needs_style_and_another(attribute):
    maps = {attribute: denoiser([FIRST] if attribute == "style" else [])}
    assert first_self_attention_for_style(maps).verdict == INCONCLUSIVE


def patterned(pattern, noise, seed):
    return make_map(noisy(pattern, noise, seed), sites=SITES)


def test_attributes_differ_only_if_their_patterns_do():
    rng = numpy.random.default_rng(3)
    a, b = rng.normal(0, 1, (2, len(SITES)))
    different = differs({"object": patterned(a, 1, 0), "style": patterned(b, 1, 1)})
    assert different.verdict == REPRODUCED
    same = differs({"object": patterned(a, 0.2, 0), "style": patterned(5 * a, 0.2, 1)})
    assert same.verdict == NOT_REPRODUCED
    noise = differs({"object": patterned(0 * a, 1, 0), "style": patterned(0 * a, 1, 1)})
    assert noise.verdict == INCONCLUSIVE


@pytest.mark.parametrize("noise", [1.0, 3.0, 6.0])
def test_noise_alone_makes_no_difference(noise):
    """One pattern, measured twice as precisely for one attribute: agreement drops, the gap does not open."""
    pattern = numpy.random.default_rng(4).normal(0, 1, len(SITES))
    wrong = [
        differs({"object": patterned(pattern, noise, seed), "style": patterned(pattern, noise / 2, 100 + seed)}).verdict
        for seed in range(3)
    ]
    assert REPRODUCED not in wrong


def test_agreement_is_spearmans_between_halves():
    """Halves of 1, 2, 3 and of 3, 2, 1, without noise: ρ is 1 within, −1 across, and the gap 2."""
    sites = SITES[:3]
    maps = {
        name: make_map(numpy.broadcast_to(values, (4, 1, 3)), sites=sites)
        for name, values in (("object", [1, 2, 3]), ("style", [3, 2, 1]))
    }
    claim = differs(maps)
    assert list(verdicts(claim)) == ["object", "style", "all"]
    for one in claim.findings:
        assert one.estimate == Estimate(-1, -1, -1)
        assert one.control == Estimate(1, 1, 1)
        assert "gap 2.00 [2.00, 2.00]" in one.reason


@pytest.mark.parametrize("maps", [{}, {"object": denoiser()}, {a: denoiser().isel(case=[0]) for a in ("a", "b")}])
def test_attributes_cannot_differ_without_halves_of_two(maps):
    assert differs(maps).verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("within", "gap", "expected"),
    [
        ((-0.1, 0.5), (0.1, 0.2), INCONCLUSIVE),
        ((0.5, 0.6), (0.01, 0.2), REPRODUCED),
        ((0.5, 0.6), (-0.1, 0.9 * SMALL), NOT_REPRODUCED),
        ((0.5, 0.6), (-0.1, 1.1 * SMALL), INCONCLUSIVE),
    ],
)
def test_the_rule_of_gaps(within, gap, expected):
    assert judge_gap(Estimate(0, *within), Estimate(0, *gap))[0] == expected


def without_effect(effects):
    effects["clean"][:] = numpy.random.default_rng(0).normal(0, 0.1, effects.clean.shape)
    return effects


def test_without_a_total_effect_shares_say_nothing():
    for claim in all_claims({"style": without_effect(denoiser(RESNETS))}, {"style": without_effect(text())}):
        assert claim.verdict == INCONCLUSIVE
        assert all("no total effect" in one.reason for one in claim.findings)


def test_every_claim_says_what_it_tells_of_the_paper_s_model():
    claims = all_claims({"style": denoiser(RESNETS)}, {"style": text()})
    sentences = [tracing._CLAIM_SCOPES[claim.name] for claim in claims]
    assert len(set(sentences)) == len(tracing._CLAIM_SCOPES) == len(claims)
    assert all("tests whether" in one and "it does not say" in one for one in sentences)


def test_the_device_is_for_other_models(monkeypatch, capsys):
    given = ["tracing", "--device", "cuda", "--dtype", "float16"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        tracing.parse()
    assert "--device and --dtype are for --model" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*given, "--model", "sd", "--cases", "cases.csv"])
    options = tracing.parse()
    assert (options.device, options.dtype) == ("cuda", "float16")


def test_reports_say_what_the_claims_say(tmp_path):
    """A single case has no interval: NaN, which JSON lacks."""
    maps = {"style": denoiser(RESNETS), "object": denoiser(RESNETS, seed=1).isel(case=[0])}
    claims = all_claims(maps, {"style": text()})
    scopes = {claims[1].name: "What this claim says."}
    report.write(claims, tmp_path, {"steps": 5}, "What this says.", scopes=scopes)
    page = (tmp_path / "claims.md").read_text()
    data = json.loads((tmp_path / "claims.json").read_text())
    assert data["scopes"] == scopes
    (section,) = [part for part in page.split("## ") if "What this claim says." in part]
    assert section.startswith(claims[1].statement)
    assert [one["verdict"] for one in data["claims"]] == [one.verdict for one in claims]
    for claim, record in zip(claims, data["claims"], strict=True):
        assert f"| {claim.statement} | **{claim.verdict}** |" in page
        assert (tmp_path / f"{claim.name}.png").exists()
        for one, row in zip(claim.findings, record["findings"], strict=True):
            assert f"| {one.place} | {one.estimate} | {one.control} |" in page
            assert row["estimate"]["low"] == (None if math.isnan(one.estimate.low) else one.estimate.low)
