"""Layouts are predicted by what latents vote for, of pictures that no dictionary knows."""

import numpy
import PIL.Image
import pytest
import torch

import mediation
from mediation import Place, SparseAutoencoder
from mediation.autoencoders.dictionary import label_masks
from mediation.autoencoders.layouts import _Habits, _Sums
from mediation.autoencoders.observing import observe
from mediation.autoencoders.prediction import composition_iou
from mediation.hooks import hooked
from mediation.sampling import Sampling

FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


def sides(image):
    """Left and right."""
    left = numpy.zeros(image.shape[1:], bool)
    left[:, : image.shape[2] // 2] = True
    return {"side: left": left, "side: right": ~left}


def test_layouts_are_predicted_by_what_latents_vote_for(tiny_pipe):
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0")).requires_grad_(False)
    prompts = ["a cat", "a dog", "a red bird"]

    dictionary = mediation.concept_dictionary(tiny_pipe, sae, prompts, sides, n_top=1, **FAST)
    found = mediation.emergence(tiny_pipe, [sae], [dictionary], prompts, sides, seed=9, **FAST)
    (seen,) = observe(tiny_pipe, prompts, [9, 10, 11], [sae.place], sampling=Sampling(2, 4.0))
    z = sae.encode(seen.activations[sae.place][:, 0])
    votes = (dictionary.precision - 0.5).fillna(0).sel(label=["side: left", "side: right"])
    scores = numpy.einsum("pyxc,cl->plyx", z, votes.transpose("latent", "label")).astype(numpy.float32)
    on_left = numpy.arange(16) < 8
    for case in range(3):
        for name, used in (("miou", scores[case]), ("chance_miou", scores[case - 1])):
            left, right = (PIL.Image.fromarray(one).resize((16, 16), PIL.Image.Resampling.BILINEAR) for one in used)
            predicted = numpy.asarray(left) >= numpy.asarray(right)
            pairs = ((predicted, on_left[None]), (~predicted, ~on_left[None]))
            expected = numpy.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])
            assert float(found[name][0, case]) == pytest.approx(expected)
    assert len(numpy.unique(found.miou)) > 1
    assert found.constant_miou.values.tolist() == [[1.0, 1.0, 1.0]], "these pictures are all laid out alike"
    summary = mediation.summarize_emergence(found)
    explained = 1 - float(found.residual.sum() / found.variance.sum())
    assert float(summary["mean"].sel(measure="explained_variance")[0]) == pytest.approx(explained)
    gain = float((found.miou - found.chance_miou).mean())
    assert float(summary["mean"].sel(measure="gain")[0]) == pytest.approx(gain)
    with pytest.raises(ValueError, match="must not overlap"):
        mediation.emergence(
            tiny_pipe, [sae], [dictionary], prompts, lambda image: dict.fromkeys("ab", image[0] > -1), **FAST
        )


def test_a_constant_layout_is_that_of_the_other_pictures_with_the_label():
    """Worked out by hand: the middle pixel is the cat's in one of two others, and the dog in one picture only."""
    cat = [torch.tensor([one], dtype=torch.bool) for one in ([1, 1, 0], [1, 0, 0], [0, 1, 0])]
    masks = [{"cat": cat[0], "dog": ~cat[0]}, {"cat": cat[1]}, {"cat": cat[2]}]
    habits = _Habits(masks)
    assert habits.without(0).tolist() == [[[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]]]
    assert habits.without(1).tolist() == [[[0.5, 1.0, 0.0]]]
    assert composition_iou(habits.without(0), ["cat", "dog"], masks[0]) == pytest.approx((2 / 3 + 0) / 2)


def test_a_layout_is_predicted_before_there_is_a_picture(tiny_pipe):
    """From one call of the denoiser, what emergence finds in as many as it takes to draw and compare."""
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0")).requires_grad_(False)
    prompts = ["a cat", "a dog", "a red bird"]

    dictionary = mediation.concept_dictionary(tiny_pipe, sae, prompts, sides, n_top=1, **FAST)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0}
    with hooked([(tiny_pipe.unet, lambda output: output)]) as n_calls:
        found = mediation.predict_layout(tiny_pipe, sae, dictionary, prompts, **options)
    assert n_calls[tiny_pipe.unet] == 1
    compared = mediation.emergence(tiny_pipe, [sae], [dictionary], prompts, sides, **FAST)
    assert found.prompt.values.tolist() == prompts
    assert found.seed.values.tolist() == compared.seed.values.tolist()
    names = found.label[found.layout]
    left = numpy.arange(16) < 8
    for case in range(3):
        shown = names.isel(case=case).values == "side: left"
        ious = [(a & b).sum() / (a | b).sum() for a, b in ((shown, left[None]), (~shown, ~left[None]))]
        assert numpy.mean(ious) == pytest.approx(float(compared.miou[0, case]))
        masks = label_masks(sides, torch.zeros(3, 16, 16))
        scores = torch.from_numpy(found.score[case].values)
        assert composition_iou(scores, found.label.values.tolist(), masks) == pytest.approx(
            float(compared.miou[0, case])
        )
    one = mediation.predict_layout(tiny_pipe, sae, dictionary, prompts[:1], labels=["side: right"], **options)
    numpy.testing.assert_allclose(one.score[0, 0], found.score.sel(label="side: right")[0], rtol=1e-4, atol=1e-6)
    assert not one.layout.any(), "of a single label"
    with pytest.raises(KeyError, match="no label 'fox'; it has side: left"):
        mediation.predict_layout(tiny_pipe, sae, dictionary, prompts, labels=["fox"], **options)
    for labels in ([], ["side: left"] * 2):
        with pytest.raises(ValueError, match="at least one label, each once"):
            mediation.predict_layout(tiny_pipe, sae, dictionary, prompts, labels=labels, **options)


def test_pictures_that_made_a_dictionary_are_no_test_of_it(tiny_pipe):
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0")).requires_grad_(False)
    prompts = ["a cat", "a dog", "a red bird"]

    dictionary = mediation.concept_dictionary(tiny_pipe, sae, prompts, sides, n_top=1, **FAST)
    with pytest.raises(ValueError, match="3 of the pictures made a dictionary, as 'a cat' with seed 0"):
        mediation.emergence(tiny_pipe, [sae], [dictionary], prompts, sides, seed=0, **FAST)
    with pytest.raises(ValueError, match="1 of the pictures made a dictionary, as 'a red bird' with seed 2"):
        mediation.emergence(tiny_pipe, [sae], [dictionary], ["a red bird", "a cat"], sides, seed=2, **FAST)
    by_default = mediation.emergence(tiny_pipe, [sae], [dictionary], prompts, sides, **FAST)
    assert not set(by_default.seed.values.tolist()) & set(dictionary.seed.values.tolist())
    other_noise = mediation.emergence(tiny_pipe, [sae], [dictionary], ["a dog", "a cat"], sides, seed=2, **FAST)
    assert other_noise.seed.values.tolist() == [2, 3], "a seed with another prompt is another picture"


def test_layouts_are_predicted_by_an_autoencoder_s_own_dictionary(tiny_pipe):
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0"))
    dictionary = mediation.concept_dictionary(tiny_pipe, sae, ["a cat", "a dog"], sides, n_top=1, **FAST)
    for other, message in (
        (SparseAutoencoder(8, 17, 3, place=sae.place), "it has 16 latents, and the autoencoder 17"),
        (SparseAutoencoder(8, 16, 3, place=Place("unet.down.1.0")), "it is of unet.down.0.0 at t=1, cond"),
        (SparseAutoencoder(8, 16, 3, place=sae.place, seed=1), "of other weights"),
    ):
        with pytest.raises(ValueError, match=message):
            mediation.emergence(tiny_pipe, [other], [dictionary], ["a cat", "a dog"], sides, **FAST)


def test_a_layout_is_scored_label_by_label():
    cat = torch.zeros(4, 4, dtype=torch.bool)
    cat[:2] = True
    masks = {"cat": cat, "ground": ~cat}
    scores = torch.stack([torch.tensor([[1.0], [1.0], [1.0], [0.0]]).expand(4, 4), torch.full((4, 4), 0.5)])
    assert composition_iou(scores, ["cat", "ground"], masks) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert composition_iou(scores[:1], ["cat"], masks) == pytest.approx(1 / 2), "what is not known is not counted"
    assert numpy.isnan(composition_iou(scores, ["fox", "hen"], masks))


def test_variances_are_about_the_mean_of_all_pictures():
    sae = SparseAutoencoder(5, 9, 3).requires_grad_(False)
    x = 3 + torch.randn(4, 1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    sums = _Sums()
    for picture in x:
        torch.testing.assert_close(sums.add(sae, picture), sae.encode(picture))
    residuals, variances = sums.totals()
    mean = x.double().flatten(0, -2).mean(0)
    numpy.testing.assert_allclose(variances, (x.double() - mean).square().sum((1, 2, 3, 4)))
    numpy.testing.assert_allclose(residuals, (x - sae(x)).double().square().sum((1, 2, 3, 4)), rtol=1e-5)
