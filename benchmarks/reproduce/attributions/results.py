"""What each part comes to, as values."""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.reproduce.attributions.correlations import Choice, Prediction
from benchmarks.reproduce.attributions.fidelity import Fidelity, Miss, Part
from benchmarks.reproduce.attributions.selectivity import Selectivity
from benchmarks.reproduce.attributions.whereabouts import Share
from benchmarks.reproduce.claims import Claim, Finding


@dataclasses.dataclass(frozen=True)
class Maps:
    """Attribution patching against restoration, of which goals are set and nothing is claimed."""

    fidelities: Sequence[Fidelity]
    parts: Sequence[Part]
    misses: Sequence[Miss]

    claims = ()


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predicted against true changes of J."""

    rows: Sequence[Prediction]
    choices: Sequence[Choice]
    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class Ablations:
    """CAD-Erase and CAD-Amplify by the probe.

    Attributes:
        rows: objective -> rows of `edits.scoring.score`.
        selectivity: objective -> CAD by ratio.
        claims: one for each objective, in the same order.
    """

    rows: Mapping[str, Sequence[Mapping]]
    selectivity: Mapping[str, Sequence[Selectivity]]
    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """Where scores lie.

    Attributes:
        shares: of components.
        layers: of single layers, in the order in which they run.
        claims: of positive scores against causal maps; empty if there are no maps.
        negatives: the same of negative scores, without a claim.
    """

    shares: Sequence[Share]
    layers: Sequence[Share]
    claims: Sequence[Claim]
    negatives: Sequence[Finding]
