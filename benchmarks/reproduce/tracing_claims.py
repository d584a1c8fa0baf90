"""What Basu et al. (ICLR 2024, arXiv:2310.13730) claim of where knowledge is in Stable Diffusion, put to maps.

Every function takes one map of one metric per attribute, as `mediation.trace` returns it, and returns a claim with its
verdict. See `claims` for the rule.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import xarray

from benchmarks.reproduce.agreement import differs
from benchmarks.reproduce.claims import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Estimate,
    Finding,
    Shares,
    judge,
    random_place,
    shares,
    together,
)

Maps = Mapping[str, xarray.Dataset]

TEXT_STATE = "text_encoder.0.self_attention at last_subject"
# a site that brings back more than this carries most of what was lost
MOST = 0.5
# fewer sites cannot be called distributed
SEVERAL = 3
_SHARE = "share of the total effect that is restored, IE / TE"


def all_claims(denoiser: Maps, text: Maps) -> list[Claim]:
    """Every claim, by maps of the denoiser's sites and of the text encoders' sites at tokens."""
    return [
        one_text_state(text),
        distributed(denoiser),
        differs(denoiser),
        cross_attention_not_causal(denoiser),
        first_self_attention_for_style(denoiser),
    ]


def one_text_state(maps: Maps) -> Claim:
    """That layer-0 self-attention at the last subject token is the text encoder's only causal state."""
    findings = []
    for attribute, effects in maps.items():
        found = shares(effects)
        others = found.but([TEXT_STATE])
        state = found.of(TEXT_STATE)
        reason = f"the state is {state.kind}; of {len(others)} others, {_counts(others.values())}; {_largest(others)}"
        verdict = judge([state], list(others.values()))
        findings.append(found.finding(attribute, TEXT_STATE, random_place(effects, [TEXT_STATE]), verdict, reason))
    return _claim(
        "one_text_state",
        "The text encoder has one causal state: self-attention of layer 0 at the last subject token.",
        "a random other place in the text encoder",
        "the state is causal and every other place, each site at each token group, is negligible",
        findings,
    )


def distributed(maps: Maps) -> Claim:
    """That knowledge is spread over the denoiser: several sites bring something back, and none brings back most."""
    findings = []
    for attribute, effects in maps.items():
        found = shares(effects)
        n_positive = sum(one.low > found.sham for one in found.estimates)
        largest = max(found.but([]), key=lambda place: found.of(place).mean)
        reason = f"{n_positive} of {len(found.places)} sites are above the sham; {_largest(found.but([]))}"
        control = random_place(effects, [largest])
        findings.append(found.finding(attribute, largest, control, _is_distributed(found, n_positive), reason))
    return _claim(
        "distributed",
        "Knowledge in the U-Net is distributed over many sites.",
        "a random other site of the U-Net",
        f"the intervals of at least {SEVERAL} sites lie above the sham, and those of all sites below {MOST}; not"
        f" reproduced if one lies above {MOST}, or if fewer than {SEVERAL} are above the sham and none can be causal",
        findings,
    )


def _is_distributed(found: Shares, n_positive: int) -> str:
    if any(one.low > MOST for one in found.estimates):
        return NOT_REPRODUCED
    if n_positive >= SEVERAL:
        return REPRODUCED if all(one.high < MOST for one in found.estimates) else INCONCLUSIVE
    nothing = all(one.kind in ("negligible", "adverse") for one in found.estimates)
    return NOT_REPRODUCED if nothing else INCONCLUSIVE


def cross_attention_not_causal(maps: Maps) -> Claim:
    """That no cross-attention is causal, although other sites of the denoiser are found to matter."""
    findings = []
    for attribute, effects in maps.items():
        found = shares(effects)
        names = _sites(effects, component="cross_attention")
        others = found.but(names)
        chosen = found.but(list(others))
        place = max(chosen, key=lambda name: abs(chosen[name].mean))
        verdict = judge([], list(chosen.values()))
        n_positive = sum(one.low > found.sham for one in others.values())
        if verdict == REPRODUCED and not n_positive:
            verdict = INCONCLUSIVE  # nothing tells cross-attention from the rest
        reason = (
            f"of {len(chosen)} cross-attentions, {_counts(chosen.values())}; of {len(others)} other sites, {n_positive}"
            " are above the sham"
        )
        findings.append(found.finding(attribute, place, random_place(effects, names), verdict, reason))
    return _claim(
        "cross_attention_not_causal",
        "Cross-attention layers are not causal.",
        "a random site of another kind in the U-Net",
        "every cross-attention is negligible, while the interval of at least one other site lies above the sham",
        findings,
    )


def first_self_attention_for_style(maps: Maps) -> Claim:
    """That the first self-attention of the denoiser is causal for style, and for nothing else."""
    findings = []
    for attribute, effects in maps.items():
        (place,) = _sites(effects, component="self_attention", layer=0)
        found = shares(effects, [place], confidence=1 - 0.05 / len(maps))
        state = found.of(place)
        verdict = judge([state], []) if attribute == "style" else judge([], [state])
        reason = f"it is {state.kind}, and is claimed to be {'causal' if attribute == 'style' else 'negligible'}"
        findings.append(found.finding(attribute, place, random_place(effects, [place]), verdict, reason))
    claim = _claim(
        "first_self_attention_for_style",
        "The first self-attention of the U-Net is causal for style, and only for style.",
        "a random other site of the U-Net",
        "it is causal for style; it is negligible for any other attribute; both must have been measured (intervals hold"
        " together over attributes)",
        findings,
    )
    if claim.verdict == REPRODUCED and not {"style"} < set(maps):
        return dataclasses.replace(claim, verdict=INCONCLUSIVE)
    return claim


def _claim(name: str, statement: str, control: str, rule: str, findings: list[Finding]) -> Claim:
    verdict = together([one.verdict for one in findings])
    return Claim(name, statement, _SHARE, control, rule, tuple(findings), verdict)


def _sites(effects: xarray.Dataset, *, component: str, layer: int | None = None) -> list[str]:
    chosen = effects.component == component
    if layer is not None:
        chosen &= effects.layer == layer
    return effects.site.values[chosen.values].tolist()


def _counts(estimates: Iterable[Estimate]) -> str:
    kinds = [one.kind for one in estimates]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))


def _largest(estimates: Mapping[str, Estimate]) -> str:
    name = max(estimates, key=lambda place: estimates[place].mean)
    return f"the largest is {name} with {estimates[name]}"
