"""Dictionaries count what a slow count of sets counts; layouts and scores are those of small examples."""

import itertools
import json

import numpy
import pytest
import torch
import xarray

import mediation
from mediation import Place, SparseAutoencoder
from mediation.autoencoders.concepts import _example, embed_latents, score_latents
from mediation.autoencoders.dictionary import label_masks
from mediation.autoencoders.files import open_dictionary, save_dictionary
from mediation.autoencoders.tally import Tally, on_grid

N_LATENTS, SIZE = 7, (4, 6)
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


def halves(image):
    """Left and right, and, where a picture is dark, "dark" all over."""
    width = image.shape[2]
    left = numpy.zeros(image.shape[1:], bool)
    left[:, : width // 2] = True
    return {"side: left": left, "side: right": ~left} | ({"dark": ~(left & ~left)} if image.mean() < 0.5 else {})


@pytest.fixture
def pictures():
    """Latents (step, y, x, latent) and masks of five pictures; labels appear one after the other."""
    random = torch.Generator().manual_seed(0)
    found = []
    for number in range(5):
        latents = torch.rand((2, *SIZE, N_LATENTS), generator=random)
        latents = latents * (torch.rand(latents.shape, generator=random) < 0.3)
        latents[..., 0] = 0  # never active
        masks = {f"kind: {i}": torch.rand(8, 12, generator=random) < 0.5 for i in range(1 + number % 3)}
        found.append((latents, masks))
    return found


def positions(latents, latent):
    """Where a latent is active, as a set of (step, y, x)."""
    return {tuple(place) for place in (latents[..., latent] > 0).nonzero().tolist()}


def covered(mask):
    """Where a mask covers at least half of a cell, in both steps."""
    grid = mask.reshape(SIZE[0], 8 // SIZE[0], SIZE[1], 12 // SIZE[1]).float().mean((1, 3)) >= 0.5
    return {(step, *place) for step in range(2) for place in grid.nonzero().tolist()}


def test_counts_are_those_of_sets(pictures):
    tally = Tally(N_LATENTS, n_top=2)
    for picture in pictures:
        tally.add(*picture)
    found = tally.finish()
    assert found.label.values.tolist() == ["kind: 0", "kind: 1", "kind: 2"]
    for latent, label in itertools.product(range(N_LATENTS), found.label.values):
        sets = [(positions(z, latent), covered(m[label]) if label in m else set()) for z, m in pictures]
        mismatched = [(sets[i][0], sets[i - 1][1]) for i in range(len(sets))]
        for name, pairs in (("overlap", sets), ("chance_overlap", mismatched)):
            for fold in (0, 1):
                expected = sum(len(a & b) for a, b in pairs[fold::2])
                assert float(found[name].sel(latent=latent, label=label, fold=fold)) == expected
        overlap = sum(len(a & b) for a, b in sets)
        n_active, area = sum(len(a) for a, _ in sets), sum(len(b) for _, b in sets)
        here = found.sel(latent=latent, label=label)
        if n_active:
            assert float(here.iou) == pytest.approx(overlap / (n_active + area - overlap))
            assert float(here.precision) == pytest.approx(overlap / n_active)
            assert float(here.recall) == pytest.approx(overlap / area)
        else:
            assert numpy.isnan(float(here.precision))
        assert int(here.n) == sum(bool(a) for a, _ in sets)


def test_the_pictures_kept_are_those_with_the_highest_peaks(pictures):
    tally = Tally(N_LATENTS, n_top=3)
    for picture in pictures:
        tally.add(*picture)
    found = tally.finish()
    peaks = torch.stack([latents.flatten(0, 2).amax(0) for latents, _ in pictures])
    for latent in range(1, N_LATENTS):
        order = peaks[:, latent].argsort(descending=True)[:3]
        assert found.top_image.sel(latent=latent).values.tolist() == order.tolist()
        numpy.testing.assert_allclose(found.top_activation.sel(latent=latent), peaks[order, latent])
        best = pictures[int(order[0])][0][..., latent].amax(0)
        numpy.testing.assert_allclose(found.top_map.sel(latent=latent, top=0), best)
    assert not found.top_activation.sel(latent=0).any()


def test_dictionaries_of_several_autoencoders_are_those_of_each(tiny_pipe):
    saes = [
        SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0", (1.0, 0.0))).requires_grad_(False),
        SparseAutoencoder(8, 12, 3, place=Place("unet.down.1.0", (0.0,), "uncond")).requires_grad_(False),
    ]
    together = mediation.concept_dictionaries(tiny_pipe, saes, ["a cat", "a dog"], halves, n_top=1, **FAST)
    for sae, one in zip(saes, together, strict=True):
        alone = mediation.concept_dictionary(tiny_pipe, sae, ["a cat", "a dog"], halves, n_top=1, **FAST)
        xarray.testing.assert_identical(one, alone)


def test_grids_take_what_covers_half_a_cell():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[0, 1] = mask[3, 3] = True
    assert on_grid(mask, (2, 2)).tolist() == [[True, False], [False, False]]
    assert torch.equal(on_grid(mask, (4, 4)), mask)


def test_scores_are_of_pictures_that_did_not_choose_the_label():
    dictionary = _example()
    # in the odd pictures, the first latent is active where the dog is
    dictionary.overlap[1, 0] = [1.0, 3.0]
    scores = score_latents(dictionary)
    assert scores.label.values.tolist() == ["object: cat", "object: dog"]
    numpy.testing.assert_allclose(scores.iou, [1 / 7, 1])
    numpy.testing.assert_allclose(scores.precision, [1 / 4, 1])
    entropy = -(0.25 * numpy.log(0.25) + 0.75 * numpy.log(0.75)) / numpy.log(2)
    numpy.testing.assert_allclose(scores.monosemanticity, [1 - entropy, 1])
    numpy.testing.assert_allclose(scores.chance_iou, [2 / 6, 2 / 6])
    numpy.testing.assert_allclose(scores.chance_monosemanticity, [0, 0], atol=1e-12)


def crowded(n_latents=9, n_labels=3):
    """A dictionary of random counts, in which one latent is silent, and one in the odd pictures only."""
    rng, labels = numpy.random.default_rng(0), [f"object: {i}" for i in range(n_labels)]
    overlap = rng.integers(1, 20, size=(2, n_latents, n_labels)).astype(float)
    overlap[:, 2], overlap[1, 5] = 0, 0
    return xarray.Dataset(
        {
            "overlap": (("fold", "latent", "label"), overlap),
            "chance_overlap": (("fold", "latent", "label"), overlap[:, ::-1]),
            "area": (("fold", "label"), numpy.full((2, n_labels), 200.0)),
            "chance_area": (("fold", "label"), numpy.full((2, n_labels), 200.0)),
            "active": (("fold", "latent"), overlap.sum(-1)),
        },
        coords={"fold": [0, 1], "latent": 10 * numpy.arange(n_latents), "label": labels},
    )


def test_names_are_judged_on_random_latents_too():
    dictionary = crowded()
    active, odd = {0, 10, 30, 40, 60, 70, 80}, dictionary.isel(fold=1)
    met = {latent: set() for latent in active}
    xarray.testing.assert_identical(*(score_latents(dictionary, seed=3) for _ in range(2)))
    shares = odd.overlap / odd.active
    entropies = (-(shares * numpy.log(shares)).sum("label") / numpy.log(3)).to_series()
    counts = {name: odd[name].to_series().to_dict() for name in ("overlap", "active", "area")}
    for seed in range(40):
        scores = score_latents(dictionary, seed=seed).to_dataframe()
        silent = scores.drop(list(active))
        assert (silent.random_latent == -1).all()
        assert silent.random_iou.isna().all()
        for latent, one in scores.loc[list(active)].iterrows():
            other = one.random_latent
            met[latent].add(other)
            overlap, n_active, area = (
                counts["overlap"][other, one.label],
                counts["active"][other],
                counts["area"][one.label],
            )
            assert one.random_iou == pytest.approx(overlap / (n_active + area - overlap))
            assert one.random_precision == pytest.approx(overlap / n_active)
            assert one.random_recall == pytest.approx(overlap / area)
            assert one.random_monosemanticity == pytest.approx(1 - entropies[other])
    assert met == {latent: active - {latent} for latent in active}, "any other, never itself"


def test_a_latent_alone_has_no_random_one():
    scores = score_latents(_example().isel(latent=[0]))
    assert scores.random_latent.values.tolist() == [-1]
    assert numpy.isnan(scores.random_iou).all()


def test_a_latent_that_meets_no_label_has_none():
    dictionary = _example()
    dictionary.overlap[:, 1] = 0.0
    dictionary.overlap[1, 1] = [3.0, 1.0]  # what it meets where it is judged does not name it
    dictionary.chance_overlap[0, 0] = 0.0
    scores = score_latents(dictionary)
    assert scores.label.values.tolist() == ["object: cat", ""]
    for name in ("iou", "precision", "recall", "monosemanticity"):
        numpy.testing.assert_array_equal(numpy.isnan(scores[name]), [False, True])
        numpy.testing.assert_array_equal(numpy.isnan(scores[f"chance_{name}"]), [True, False])


def test_latents_and_labels_find_each_other():
    dictionary = _example()
    assert mediation.concept_latents(dictionary, "object: cat") == [0]
    assert mediation.concept_latents(dictionary, "dog") == [1]
    assert mediation.concept_labels(dictionary, threshold=0.5) == {0: ["object: cat"], 1: ["object: dog"]}
    with pytest.raises(KeyError, match="no label is called 'fox'"):
        mediation.concept_latents(dictionary, "fox")
    vectors = embed_latents(dictionary, lambda labels: numpy.eye(2))
    numpy.testing.assert_allclose(vectors, numpy.eye(2))


def test_a_dictionary_of_a_pipeline_names_positions(tiny_pipe, tmp_path):
    """A latent that is active on the left alone is named so, and not by chance."""
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0", (1.0, 0.0))).requires_grad_(False)
    prompts = ["a cat", "a dog", "a red bird", "an image of ink"]
    found = mediation.concept_dictionary(tiny_pipe, sae, prompts, halves, n_top=2, seed=4, **FAST)
    assert float(found.n_positions.sum()) == 4 * 2 * 64
    assert {"side: left", "side: right"} <= set(found.label.values)
    alive = found.n > 0
    both = found.precision.sel(label=["side: left", "side: right"]).sum("label")
    numpy.testing.assert_allclose(both.where(alive, drop=True), 1)
    assert found.thumbnail.shape == (4, 16, 16, 3)
    assert found.attrs["labeller"] == "halves"
    assert json.loads(found.attrs["provenance"])["pipeline"]["class"] == "StableDiffusionPipeline"
    save_dictionary(found, tmp_path / "found.nc")
    again = open_dictionary(tmp_path / "found.nc")
    numpy.testing.assert_array_equal(again.iou, found.iou)
    numpy.testing.assert_array_equal(again.thumbnail, found.thumbnail)
    mediation.write_sheet(again, tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<tr data-label=") == int(alive.sum())
    strip = mediation.top_strip(found, int(found.latent[alive][0]))
    assert strip.size == (2 * 18 - 2, 16)


def test_a_dictionary_without_pictures_is_kept_like_others(tmp_path):
    save_dictionary(_example(), tmp_path / "found.nc")
    xarray.testing.assert_equal(open_dictionary(tmp_path / "found.nc"), _example())


@pytest.mark.parametrize("kind", [numpy.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.1, 0.49], [0.5, 0.9, 1.0]], [[False] * 3, [True] * 3]),
        ([[0.0, float("nan"), 0.0], [255.0, 0.0, 255.0]], [[False] * 3, [True, False, True]]),
        ([[0, 255, 1], [0, 0, 2]], [[False, True, True], [False, False, True]]),
        ([[True, False, True], [False] * 3], [[True, False, True], [False] * 3]),
    ],
)
def test_masks_cover_what_is_more_likely_than_not(kind, values, expected):
    found = label_masks(lambda image: {"a": kind(values)}, torch.zeros(3, 2, 3))
    assert found["a"].tolist() == expected


def test_mistakes_are_errors(tiny_pipe, tmp_path):
    sae = SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0"))
    options = {"n_top": 1, **FAST}
    with pytest.raises(ValueError, match="at least two prompts"):
        mediation.concept_dictionary(tiny_pipe, sae, ["a cat"], halves, **options)
    with pytest.raises(ValueError, match="n_top must be from 1"):
        mediation.concept_dictionary(tiny_pipe, sae, ["a cat", "a dog"], halves, **FAST)
    for labeller, message in ((lambda image: None, "masks by label"), (lambda image: {"a": [True]}, "has shape")):
        with pytest.raises(ValueError, match=message):
            mediation.concept_dictionary(tiny_pipe, sae, ["a cat", "a dog"], labeller, **options)
    with pytest.raises(ValueError, match="found nothing"):
        mediation.concept_dictionary(tiny_pipe, sae, ["a cat", "a dog"], lambda image: {}, **options)
    with pytest.raises(ValueError, match=r"in a \.nc file"):
        save_dictionary(_example(), tmp_path / "dictionary.txt")
    with pytest.raises(FileNotFoundError, match="no dictionary"):
        open_dictionary(tmp_path / "none.nc")
