"""What the probe reads in pictures, against the scenes that they should show."""

import numpy
import torch
from scipy import stats

from benchmarks.emoji import world
from mediation.bundled import AttributeProbe


@torch.no_grad()
def hits(probe: AttributeProbe, images: torch.Tensor, scenes: list[world.Scene]) -> dict[str, torch.Tensor]:
    """For each factor, whether the probe reads it right in each image, in [0, 1]; "fact" is the object of facts."""
    logits = [probe(chunk) for chunk in images.split(100)]
    truth = world.labels(scenes)
    right = {factor: torch.cat([chunk[factor] for chunk in logits]).argmax(1) == truth[factor] for factor in truth}
    return right | {"fact": right["object"]}


def interval(values: torch.Tensor) -> dict[str, float | int]:
    """A proportion with its 95% Wilson interval."""
    low, high = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return {"accuracy": values.float().mean().item(), "low": low, "high": high, "n": len(values)}


def on_renders(probe: AttributeProbe, n: int = 2048, seed: int = 1) -> dict[str, dict]:
    """Accuracy by factor on `n` renders of triples that training never shows."""
    images, captions = world.batch(numpy.random.default_rng(seed), n, "held_out")
    scenes = [caption.scene for caption in captions]
    right = hits(probe, (images + 1) / 2, scenes)
    right["fact"] = right["fact"][torch.tensor([scene.fact is not None for scene in scenes])]
    return {factor: interval(values) for factor, values in right.items()}
