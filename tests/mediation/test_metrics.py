"""Metrics against the formula typed anew."""

import sys
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

import mediation
from mediation import LPIPS, Case, ClassProbability, CLIPScore, ImageMSE, LatentDistance, bundled
from mediation.metrics import metric_options, named_metric, named_metrics
from tests import tiny

CASES = [Case("a cat", subject="cat"), Case("a dog in ink style", subject="dog")]


@pytest.fixture(scope="module")
def clip():
    words = tiny.tokenizer()
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config).eval(), words


def test_latent_distance_is_the_root_mean_square_to_the_first_row():
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = latents.numpy()
    expected = [-numpy.sqrt(((row - rows[0]) ** 2).mean()) for row in rows]
    assert LatentDistance()(None, latents, CASES) == pytest.approx(expected)


def test_image_mse_is_the_mean_square_to_the_first_image():
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = images.double().numpy()
    expected = [-((row - rows[0]) ** 2).mean() for row in rows]
    assert ImageMSE()(images, None, CASES) == pytest.approx(expected, rel=1e-9)


def test_clip_score_is_the_cosine_with_each_rows_own_prompt(clip):
    model, words = clip
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scores = CLIPScore(model, words, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))(images, None, CASES)
    expected = []
    for image, case in zip(images, CASES, strict=True):
        pixels = torch.stack([(image[c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)])])
        with torch.no_grad():
            output = model(**words([case.prompt], return_tensors="pt"), pixel_values=pixels[None])
        expected.append(100 * F.cosine_similarity(output.image_embeds, output.text_embeds).item())
    assert scores == pytest.approx(expected, rel=1e-5)
    assert abs(scores[0] - scores[1]) > 0.01


def test_clip_score_takes_another_text_and_resizes_images(clip):
    model, words = clip
    images = torch.full((2, 3, 20, 12), 0.25)
    score = CLIPScore(model, words, text="a dog in ink style")
    same_case = [CASES[1], CASES[1]]
    assert score(images, None, CASES) == pytest.approx(CLIPScore(model, words)(images[:, :, :8, :8], None, same_case))


class SquaredDistance(torch.nn.Module):
    """Stands for `lpips.LPIPS`: called in the same way, on images that it brings to [-1, 1] when told that it must."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.verbose = net, verbose

    def forward(self, in0, in1, normalize=False):
        scale = 2 if normalize else 1
        return (scale * (in0 - in1)).square().mean((1, 2, 3), keepdim=True)


def test_lpips_is_minus_the_distance_of_the_package_from_the_clean_image(monkeypatch, tiny_pipe):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=SquaredDistance))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    metric = LPIPS("vgg")
    pixels = images.numpy()
    expected = [-((2 * image - 2 * pixels[0]) ** 2).mean() for image in pixels]
    assert metric(images, None, CASES) == pytest.approx(expected, rel=1e-5)
    assert metric(images.bfloat16(), None, CASES) == pytest.approx(expected, rel=2e-2)
    assert (metric.name, metric_options(metric)) == ("lpips", {"net": "vgg"})
    with pytest.raises(ValueError, match="lpips is least at the clean run"):
        mediation.trace(tiny_pipe, CASES[0], metric=metric, mode="knock_out", backend="attribution_patching")


def test_lpips_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"LPIPS needs the lpips package: pip install .*\[lpips\]"):
        LPIPS()
    with pytest.raises(ValueError, match="net must be alex, vgg or squeeze, got 'resnet'"):
        LPIPS("resnet")


def test_metrics_have_names(tiny_pipe):
    assert named_metric(tiny_pipe, None) == named_metric(tiny_pipe, "latent_distance") == LatentDistance()
    assert named_metric(tiny_pipe, "image_mse") == ImageMSE()
    folder = bundled.pipeline_folder().parent / "clip"
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    for name in (None, "clip_score"):
        found = named_metric(tiny_pipe, name, folder)
        assert found(images, None, CASES) == pytest.approx(bundled.load_scorer()(images, None, CASES))
    with pytest.raises(ValueError, match="metric must be clip_score, latent_distance or image_mse, got 'fid'"):
        named_metric(tiny_pipe, "fid")
    with pytest.raises(ValueError, match="clip_score needs a CLIP model that fits this pipeline"):
        named_metric(tiny_pipe, "clip_score")
    with pytest.raises(ValueError, match="a scorer is for clip_score, not for image_mse"):
        named_metric(tiny_pipe, "image_mse", folder)
    assert named_metrics(tiny_pipe, []) == LatentDistance()
    assert named_metrics(tiny_pipe, ["image_mse"]) == ImageMSE()
    score, distance = named_metrics(tiny_pipe, ["clip_score", "image_mse"], folder)
    assert score(images, None, CASES) == pytest.approx(found(images, None, CASES))
    assert distance == ImageMSE()
    with pytest.raises(ValueError, match="a scorer is for clip_score, not for image_mse"):
        named_metrics(tiny_pipe, ["image_mse", "latent_distance"], folder)


def test_class_probability_is_a_softmax_at_the_subject_or_the_target():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    weights = numpy.exp(logits.numpy()) / numpy.exp(logits.numpy()).sum(1, keepdims=True)
    by_subject = ClassProbability(lambda images: logits, labels=["cat", "dog", "owl"])
    assert by_subject(torch.zeros(2, 3, 8, 8), None, CASES) == pytest.approx([weights[0, 0], weights[1, 1]])
    by_target = ClassProbability(lambda images: logits, labels=["cat", "dog", "owl"], target="owl")
    assert by_target(torch.zeros(2, 3, 8, 8), None, CASES) == pytest.approx([weights[0, 2], weights[1, 2]])


def test_a_classifier_scores_in_evaluation_mode_and_keeps_its_own():
    torch.manual_seed(0)
    layers = [torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(192, 2)]
    classifier = torch.nn.Sequential(*layers).eval()
    metric = ClassProbability(classifier, labels=["cat", "dog"])
    images = torch.rand(2, 3, 8, 8)
    expected = classifier(images).double().softmax(-1).diagonal().tolist()
    classifier.train()
    classifier[0].eval()  # as whoever freezes it
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    assert metric(images, None, CASES) == pytest.approx(expected)
    classifier[0].train()
    assert metric(images, None, CASES) == pytest.approx(expected)
    assert all((value == before[name]).all() for name, value in classifier.state_dict().items())
    assert all(part.training for part in classifier.modules())
    classifier[0].eval()
    with pytest.raises(RuntimeError):
        metric(images[:, :2], None, CASES)
    assert [part.training for part in classifier] == [False, True, True, True]


def test_the_gradients_of_metrics_are_their_slopes(clip):
    """Along one direction; what is called without gradients is what is scored with them."""
    generator = torch.Generator().manual_seed(2)
    images, latents = torch.rand(2, 3, 8, 8, generator=generator), torch.randn(2, 4, 2, 2, generator=generator)
    weights = torch.randn(3 * 64, 3, generator=generator)
    metrics = [
        CLIPScore(*clip),
        ClassProbability(lambda images: images.flatten(1) @ weights, labels=["cat", "dog", "owl"]),
        LatentDistance(),
        ImageMSE(),
    ]
    for metric in metrics:
        given = (images, latents)
        tracked = tuple(x.clone().requires_grad_() for x in given)
        scores = metric.score(*tracked, CASES)
        assert metric(*given, CASES) == pytest.approx(scores.detach().numpy(), rel=1e-6)
        place = 0 if metric.needs_images else 1
        (slope,) = torch.autograd.grad(scores[1], tracked[place])
        towards = torch.zeros_like(given[place])
        towards[1] = torch.randn(towards[1].shape, generator=generator)

        def moved(by, metric=metric, place=place, towards=towards):
            changed = [x + by * towards if i == place else x for i, x in enumerate((images, latents))]
            return metric(*changed, CASES)[1]

        expected = (moved(3e-3) - moved(-3e-3)) / 6e-3
        assert abs(expected) > 1e-3
        assert float((slope * towards)[1].sum()) == pytest.approx(expected, rel=2e-2)


def test_a_class_that_is_not_there_is_an_error_before_any_work(tiny_pipe):
    with pytest.raises(ValueError, match="no label of this classifier"):
        ClassProbability(lambda images: images, labels=["cat"], target="ink")
    with pytest.raises(ValueError, match=r"the subject 'dog' is no label.*pass target"):
        mediation.trace(tiny_pipe, CASES[1], metric=ClassProbability(lambda images: images, labels=["cat"]))
