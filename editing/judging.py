"""What classifiers and scorers say of pictures, and which ones they are."""

import json
from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import nn

from editing.suites import Trial
from mediation.cases import Case
from mediation.metrics import ClassProbability, CLIPScore
from mediation.parameters import digest_of

JUDGES = {"scorer", "classifiers"}


class Judge:
    """What classifiers and a scorer say of pictures, one value per picture."""

    def __init__(
        self,
        trials: Sequence[Trial],
        classifiers: Mapping[str, ClassProbability] | None,
        scorer: CLIPScore | None,
    ):
        self.classifiers, self.scorer = classifiers, scorer
        self.factors = {trial.factor for trial in trials if trial.factor}
        for trial in trials if classifiers is not None else ():
            if trial.factor and trial.factor not in classifiers:
                known = ", ".join(classifiers) or "none"
                raise ValueError(
                    f"no classifier was given for the factor {trial.factor!r} of {trial.prompt!r}, but {known}"
                )
            for label in filter(None, (trial.source, trial.target)):
                known = list(map(str, classifiers[trial.factor].labels))
                if label not in known:
                    raise ValueError(f"the classifier of {trial.factor} has no label {label!r}; it knows {known}")

    def described(self) -> dict[str, str]:
        """What tells the judges from others, as JSON: settings, names of functions, digests of weights."""
        found = {} if self.scorer is None else {"scorer": _describe(self.scorer)}
        if self.classifiers is not None:
            found["classifiers"] = {factor: _describe(self.classifiers[factor]) for factor in sorted(self.factors)}
        return {kind: json.dumps(judge, default=str, skipkeys=True) for kind, judge in found.items()}

    @property
    def names(self) -> list[str]:
        """What is said of every picture."""
        labels = ["label", "is_source", "is_target"] if self.classifiers is not None else []
        return labels + (["source_score", "target_score"] if self.scorer is not None else [])

    def __call__(self, images: torch.Tensor, trials: Sequence[Trial]) -> dict[str, numpy.ndarray]:
        """One value per picture, by what it says."""
        found = {}
        if self.classifiers is not None:
            seen = self._labels(images, trials)
            found["label"] = numpy.array(seen, dtype=str)
            for which in ("source", "target"):
                wanted = [getattr(trial, which) for trial in trials]
                found[f"is_{which}"] = numpy.array(
                    [float(a == b) if b else numpy.nan for a, b in zip(seen, wanted, strict=True)]
                )
        if self.scorer is not None:
            for which, texts in (
                ("source", [trial.prompt for trial in trials]),
                ("target", [trial.target_prompt for trial in trials]),
            ):
                found[f"{which}_score"] = self.scorer(images, None, [Case(text, subject=text) for text in texts])
        return found

    @torch.no_grad()
    def _labels(self, images: torch.Tensor, trials: Sequence[Trial]) -> list[str]:
        seen = [""] * len(trials)
        for factor in {trial.factor for trial in trials if trial.factor}:
            rows = [row for row, trial in enumerate(trials) if trial.factor == factor]
            judge = self.classifiers[factor]
            for row, best in zip(rows, judge.logits(images[rows]).argmax(-1).tolist(), strict=True):
                seen[row] = str(judge.labels[best])
        return seen


def _describe(judge: object) -> dict:
    """A judge's kind, its settings and weights, as far as they can be told; of a function, its name."""
    kind = judge if hasattr(judge, "__qualname__") else type(judge)
    found = {"kind": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(judge, nn.Module):
        return found | {"weights": digest_of({"": judge})}
    for name, value in vars(judge).items() if kind is not judge else ():
        if isinstance(value, nn.Module) or hasattr(value, "__qualname__"):
            found[name] = _describe(value)
        elif isinstance(value, torch.Tensor):
            found[name] = value.tolist()
        elif value is None or isinstance(value, bool | int | float | str | list | tuple | dict):
            found[name] = value
    return found
