"""Metrics: what a run's outcome is worth, one number per row.

A metric is called with `images` (row, 3, height, width) in [0, 1], `latents` (row, channel, height, width) and `cases`,
one per row, and returns one number per row; row 0 is the clean run. Any function of these three works. A metric
whose attribute `needs_images` is False gets None for images, and nothing is decoded for it. Estimates need gradients: a
function must return a tensor that has them, or the metric a method `score` that does.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from mediation.cases import Case
from mediation.pipelines import family_of

Metric = Callable[[torch.Tensor | None, torch.Tensor, Sequence[Case]], "numpy.typing.ArrayLike"]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class DifferentiableMetric:
    """A metric that computes its numbers with gradients, and returns them without."""

    def score(self, images: torch.Tensor | None, latents: torch.Tensor, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: torch.Tensor | None, latents: torch.Tensor, cases: Sequence[Case]) -> numpy.ndarray:
        """Scores every row."""
        return self.score(images, latents, cases).double().cpu().numpy()


class CLIPScore(DifferentiableMetric):
    """Cosine similarity of an image and a text, times `scale` (Hessel et al. 2021, arXiv:2104.08718, without clipping).

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer.
        text: the text to compare with; None is each case's own prompt.
        image_mean, image_std: the normalisation that the model was trained with.
        scale: 100 gives the scores of the literature.

    Example:
        >>> from mediation import bundled
        >>> score = bundled.load_scorer()
        >>> score(torch.ones(1, 3, 64, 64), torch.zeros(1, 4, 16, 16), [Case("a cat", subject="cat")]).shape
        (1,)
    """

    name = "clip_score"
    needs_images = True

    def __init__(
        self,
        model: transformers.CLIPModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        text: str | None = None,
        image_mean: Sequence[float] = _CLIP_MEAN,
        image_std: Sequence[float] = _CLIP_STD,
        scale: float = 100.0,
    ):
        self.model, self.tokenizer, self.text, self.scale = model.eval(), tokenizer, text, scale
        self.options = {"text": text, "scale": scale}
        self.image_mean = torch.tensor(image_mean)[:, None, None]
        self.image_std = torch.tensor(image_std)[:, None, None]

    @classmethod
    def from_pretrained(cls, folder: str | pathlib.Path, **options) -> "CLIPScore":
        """Loads a `CLIPModel`, its tokenizer, and the normalisation in `preprocessor_config.json` if there is one."""
        config = pathlib.Path(folder, "preprocessor_config.json")
        if config.exists():
            values = json.loads(config.read_text())
            options = {"image_mean": values["image_mean"], "image_std": values["image_std"]} | options
        model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True).float()
        return cls(model, transformers.CLIPTokenizer.from_pretrained(folder), **options)

    def score(self, images: torch.Tensor, latents, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients."""
        texts = [case.prompt if self.text is None else self.text for case in cases]
        distinct = list(dict.fromkeys(texts))
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(distinct, padding=True, truncation=True, max_length=window, return_tensors="pt")
        pixels = self._pixels(images)
        output = self.model(**tokens.to(self.model.device), pixel_values=pixels.to(self.model.device, self.model.dtype))
        cosine = F.normalize(output.image_embeds.float(), dim=-1) @ F.normalize(output.text_embeds.float(), dim=-1).T
        chosen = torch.tensor([distinct.index(text) for text in texts], device=cosine.device)
        return self.scale * cosine.gather(1, chosen[:, None])[:, 0]

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        images = images.float().cpu()
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.image_mean) / self.image_std


class ClassProbability(DifferentiableMetric):
    """Probability that a classifier gives to a class.

    Args:
        classifier: images (row, 3, height, width) in [0, 1] to logits (row, class). A module scores in evaluation mode,
            and is left in the mode that it was in.
        labels: the class names, in the order of the logits.
        target: the class; None is each case's subject, which must then be a label.
        name: of the metric, in results.

    Example:
        >>> metric = ClassProbability(lambda images: torch.tensor([[0.0, 0.0]]), labels=["ink", "noto"], target="ink")
        >>> metric(torch.zeros(1, 3, 8, 8), None, [Case("a cat in ink", subject="ink")]).tolist()
        [0.5]
    """

    needs_images = True

    def __init__(
        self,
        classifier: nn.Module | Callable[[torch.Tensor], torch.Tensor],
        labels: Sequence,
        target: object = None,
        name: str = "class_probability",
    ):
        self.classifier, self.labels, self.target, self.name = classifier, list(labels), target, name
        self.options = {"target": target}
        if target is not None and target not in self.labels:
            raise ValueError(f"{target!r} is no label of this classifier; it knows {self.labels}")

    def check(self, cases: Sequence[Case]) -> None:
        """Raises a ValueError if a case names no class."""
        for case in cases:
            self._index(case)

    def _index(self, case: Case) -> int:
        label = case.subject if self.target is None else self.target
        if label not in self.labels:
            raise ValueError(f"the subject {label!r} is no label of this classifier ({self.labels}): pass target=…")
        return self.labels.index(label)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """What the classifier says of images, (row, class), in evaluation mode."""
        with _evaluating(self.classifier):
            return self.classifier(images.float())

    def score(self, images: torch.Tensor, latents, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients if the classifier has them."""
        probabilities = self.logits(images).double().softmax(-1)
        chosen = torch.tensor([self._index(case) for case in cases], device=probabilities.device)
        return probabilities.gather(1, chosen[:, None])[:, 0]


@contextlib.contextmanager
def _evaluating(classifier: nn.Module | Callable) -> Iterator[None]:
    """Evaluation mode for a while: dropout is noise, and statistics of batches are their owner's."""
    training = [part for part in classifier.modules() if part.training] if isinstance(classifier, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def metric_options(metric: Metric) -> dict:
    """How a metric was set up, for those who want to measure the same again."""
    return getattr(metric, "options", {})


def metric_name(metric: Metric) -> str:
    """How results call a metric."""
    return getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)


def default_metric(pipe: DiffusionPipeline) -> Metric:
    """CLIPScore by the bundled scorer for the bundled pipeline; latent distance for any other."""
    from mediation import bundled
    from mediation.distances import LatentDistance

    return bundled.load_scorer() if bundled.is_bundled(pipe) else LatentDistance()


def named_metric(pipe: DiffusionPipeline, name: str | None, scorer: str | pathlib.Path | None = None) -> Metric:
    """The metric that has this name in results.

    Args:
        pipe: the pipeline whose images it scores.
        name: "clip_score", "latent_distance" or "image_mse"; None is the default, or CLIPScore if there is a scorer.
        scorer: folder of the `CLIPModel` of CLIPScore; None is the bundled one, which is for the bundled pipeline.

    Raises:
        ValueError: if there is no such metric, or it has no use for a scorer, or none for this pipeline.

    Example:
        >>> import mediation
        >>> named_metric(mediation.load_pipeline(), "image_mse")
        ImageMSE()
    """
    from mediation import bundled
    from mediation.distances import ImageMSE, LatentDistance

    distances = {metric.name: metric for metric in (LatentDistance(), ImageMSE())}
    if name not in (None, CLIPScore.name, *distances):
        raise ValueError(f"metric must be {CLIPScore.name}, {' or '.join(distances)}, got {name!r}")
    if scorer is not None:
        if name in distances:
            raise ValueError(f"a scorer is for {CLIPScore.name}, not for {name}")
        found = CLIPScore.from_pretrained(scorer)
        found.model.to(pipe._execution_device)
        return found
    if name == CLIPScore.name and not bundled.is_bundled(pipe):
        raise ValueError(f"{CLIPScore.name} needs a CLIP model that fits this pipeline: name its folder as the scorer")
    return distances[name] if name in distances else default_metric(pipe)


def named_metrics(
    pipe: DiffusionPipeline, names: Sequence[str], scorer: str | pathlib.Path | None = None
) -> Metric | list[Metric]:
    """As `named_metric`, of one name or several; a scorer is for CLIPScore, if that is among them."""
    if len(names) < 2:
        return named_metric(pipe, *names or (None,), scorer)
    # with none among them, the first says that it has no use for a scorer
    takers = [name for name in names if name == CLIPScore.name] or names
    return [named_metric(pipe, name, scorer if name in takers else None) for name in names]


def images_for(pipe: DiffusionPipeline, metrics: Sequence[Metric], latents: torch.Tensor) -> torch.Tensor | None:
    """Images of final latents, or None if no metric looks at them."""
    if any(getattr(metric, "needs_images", True) for metric in metrics):
        return family_of(pipe).decode(pipe, latents)
    return None


def check_differentiable(pipe: DiffusionPipeline, metric: Metric, case: Case) -> None:
    """Tries a metric on noise.

    Raises:
        ValueError: if it gives no gradient, or one that reaches neither images nor latents.
    """
    shape = family_of(pipe).latent_shape(pipe)
    pixels = [side * pipe.vae_scale_factor for side in shape[1:]]
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *shape), generator=noise).to(pipe._execution_device).requires_grad_()
    images = torch.rand((2, 3, *pixels), generator=noise).to(pipe._execution_device).requires_grad_()
    given = (images if getattr(metric, "needs_images", True) else None), latents
    with torch.enable_grad():
        found = score(metric, *given, [case] * 2)
    if not (isinstance(found, torch.Tensor) and found.shape == (2,) and _reaches(found, given)):
        raise ValueError(
            f"the metric {metric_name(metric)!r} gives no gradient, which estimates need: let it return a tensor of one"
            ' number per row that is computed from its arguments in PyTorch, or choose backend="restoration"'
        )


def _reaches(found: torch.Tensor, given: Sequence[torch.Tensor | None]) -> bool:
    """Whether the gradient of what was found reaches any of what was given."""
    if not found.requires_grad:
        return False
    # weights of the metric's own have gradients whatever it makes of its arguments
    inputs = [one for one in given if one is not None]
    return any(one is not None for one in torch.autograd.grad(found, inputs, torch.ones_like(found), allow_unused=True))


def score(metric: Metric, images: torch.Tensor | None, latents: torch.Tensor, cases: Sequence[Case]) -> torch.Tensor:
    """A metric's numbers with their gradients, if it has any."""
    return getattr(metric, "score", metric)(images, latents, cases)


def evaluate(
    metrics: Sequence[Metric], images: torch.Tensor | None, latents: torch.Tensor, cases: Sequence[Case]
) -> numpy.ndarray:
    """Values of every metric, (metric, row).

    Raises:
        ValueError: if a metric does not return one number per row.
    """
    values = numpy.empty((len(metrics), len(latents)))
    for i, metric in enumerate(metrics):
        found = torch.as_tensor(metric(images, latents, cases)).detach().cpu().double().numpy()
        if found.shape != (len(latents),):
            raise ValueError(
                f"the metric {metric_name(metric)!r} must return one number for each of {len(latents)} rows,"
                f" but its result has shape {found.shape}"
            )
        values[i] = found
    return values
