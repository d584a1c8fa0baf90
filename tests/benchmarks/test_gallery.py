"""The gallery's page shows what there is, and its captions count what its pictures say."""

import re

import matplotlib.pyplot
import numpy
import pytest
import torch

import mediation
from benchmarks.reproduce import gallery, maps
from benchmarks.reproduce.saes import exhibits, showing, trials
from benchmarks.reproduce.saes.exhibits import Settings
from mediation import Place, SparseAutoencoder, bundled
from mediation.autoencoders.concepts import _example

SMALL = Settings(steps=2, labelled=4, predicted=2, objects=1)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def sae():
    return SparseAutoencoder(8, 16, 3, place=Place("unet.down.0.0")).requires_grad_(False)


@pytest.fixture
def known():
    """A dictionary of sixteen latents in which half of them are the object, and some a style."""
    overlap = numpy.zeros((2, 16, 3))
    overlap[:, :8, 0], overlap[:, 8:12, 1], overlap[:, 12:, 2] = 4, 3, 3
    example = _example()
    found = example.drop_dims(("latent", "label")).assign(
        overlap=(("fold", "latent", "label"), overlap),
        chance_overlap=(("fold", "latent", "label"), overlap / 4),
        area=(("fold", "label"), numpy.full((2, 3), 8.0)),
        chance_area=(("fold", "label"), numpy.full((2, 3), 8.0)),
        active=(("fold", "latent"), numpy.full((2, 16), 4.0)),
        n=("latent", numpy.full(16, 2)),
    )
    found = found.assign_coords(latent=range(16), label=["object", "style: ink", "background: red"])
    return found.assign(exhibits.agreement(found.sum("fold")))


def words(figure):
    """Captions by row, and their colours."""
    axes = numpy.array(figure.axes).reshape(-1, figure.axes[0].get_subplotspec().get_gridspec().ncols)
    return [[(ax.get_xlabel().replace("\n", " "), ax.xaxis.label.get_color()) for ax in row] for row in axes]


def test_the_page_shows_every_figure_and_how_to_make_it_again(small_pipe, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(mediation, "load_pipeline", lambda: small_pipe)
    monkeypatch.setattr(bundled, "load_sae", lambda: sae)
    monkeypatch.setattr(exhibits, "STRENGTHS", (1.0,))
    monkeypatch.setattr(exhibits, "_BACKGROUNDS", exhibits._BACKGROUNDS[:2])
    monkeypatch.setattr(trials, "QUADRANTS", trials.QUADRANTS[:2])
    draw = matplotlib.figure.Figure.savefig

    def save(figure, path, **options):
        """Figures of the second autoencoder are of the same kinds."""
        draw(figure, path, **options) if path.name.startswith("bundled") else path.touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    places = {"mid.middle.cond": Place("unet.mid.0", (0.5,)), "mid.early.uncond": Place("unet.mid.0", branch="uncond")}
    for name, place in {**places, "of no place": None}.items():
        SparseAutoencoder(16, 16, 3, place=place).save_pretrained(tmp_path / "saes" / name)
    gallery.run(tmp_path / "gallery", tmp_path / "saes", SMALL)
    page = (tmp_path / "gallery" / "README.md").read_text()
    shown = re.findall(r"!\[\w+\]\((.*?)\)", page)
    assert sorted(shown) == sorted(path.name for path in (tmp_path / "gallery").glob("*.png"))
    for name in ("bundled", "mid.middle.cond"):
        assert {f"{name}.{kind}.png" for kind in ("latents", "chance", "layouts")} <= set(shown)
    sections = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    assert sections == ["unet.down.0.0 at t=1, cond", "unet.mid.0 at t=0.5, cond"]
    assert f"--output {tmp_path / 'gallery'} --saes {tmp_path / 'saes'}" in page
    assert maps.fingerprint(small_pipe, [bundled.load_probe()])[:12] in page
    assert sae.fingerprint[:12] in page
    for line in ("- steps: 2", "- seeds of labelled pictures, from 10000", "- seeds of steered pictures, from 30000"):
        assert line in page.splitlines()
    with pytest.raises(ValueError, match="no folder with an autoencoder"):
        gallery.autoencoders(tmp_path / "gallery")


def test_latents_are_ranked_by_even_pictures_and_scored_on_odd_ones():
    dictionary = _example()
    dictionary.overlap[0] = [[2.0, 0.0], [0.0, 3.0]]
    dictionary.overlap[1] = [[4.0, 0.0], [0.0, 1.0]]
    first, second = exhibits.ranked(dictionary)
    assert (int(first.latent), int(second.latent)) == (1, 0)
    assert (float(first.iou), float(second.iou)) == (pytest.approx(1 / 7), 1)
    dictionary.overlap[0, 1] = 0.0
    assert [int(one.latent) for one in exhibits.ranked(dictionary)] == [0], "one without a label is not ranked"


def test_each_kind_of_label_has_a_dictionary_of_its_own(known):
    found = exhibits.by_kind(known)
    assert {kind: own.label.values.tolist() for kind, own in found.items()} == {
        "composition": ["object"],
        "style": ["style: ink"],
        "background": ["background: red"],
    }
    _, figure, _ = exhibits.all_latents(known)
    points = [ax.collections[0].get_offsets().data for ax in figure.axes]
    assert [len(one) for one in points] == [8, 4, 4]
    numpy.testing.assert_allclose(points[1], [[0.75 / 11.25, 3 / 9]] * 4)


def test_captions_count_the_pictures_in_their_quadrant(small_pipe, sae, known, monkeypatch):
    """Whatever the judge says, which here likes what was put into the left half by anything but directions."""
    put = []
    steer = exhibits.editing.steer

    def note(pipe, used, latents, **options):
        put.append((used is sae, tuple(latents), options["region"], options["strength"], options["stage"]))
        return steer(pipe, used, latents, **options)

    monkeypatch.setattr(exhibits.editing, "steer", note)
    monkeypatch.setattr(trials, "shows", lambda image, experiment, target: put[-1][0] and "left" in target)
    ((name, figure, caption),) = exhibits.quadrants(small_pipe, sae, known, SMALL)
    assert name == "quadrants"
    assert "2 of 4 by concept, 2 of 4 by random latents, 0 of 4 by random directions" in caption
    green = [[color == showing.RIGHT for _, color in row] for row in words(figure)]
    assert green == [[False, True, False, True, False]] * 2 + [[False] * 5]
    assert [one[2] for one in put] == [*trials.QUADRANTS] * 3
    assert {one[3:] for one in put} == {(8.0, (0.6, 1.0))}
    assert {one[1] for one in put[:4]} == {(0, 1, 2, 3, 4)}
    assert not any(set(one[1]) & {0, 1, 2, 3, 4} for one in put[4:8])
    assert list(exhibits.quadrants(small_pipe, sae, known.sel(label=["style: ink"]), SMALL)) == []


def test_a_sweep_of_strengths_has_the_unsteered_picture_and_the_probe_s_words(small_pipe, sae, known):
    ((name, figure, caption),) = exhibits.strengths(small_pipe, sae, known, SMALL, "style", ("flat", "ink"))
    assert name == "style"
    ((*told,),) = words(figure)
    columns = [-1.0, 0.0, 1.0, 2.0, 4.0, 8.0]
    assert [ax.get_title() for ax in figure.axes] == [f"{strength:g}" for strength in columns]
    plain = trials.generate(small_pipe, ["a cat"], seed=30_000, steps=2, guidance_scale=SMALL.guidance_scale)[0]
    pictures = [torch.from_numpy(numpy.array(ax.images[0].get_array())).permute(2, 0, 1).float() for ax in figure.axes]
    assert [torch.equal(picture, plain) for picture in pictures] == [strength == 0 for strength in columns]
    probe, seen = bundled.load_probe(), []
    for picture, (words_, color) in zip(pictures, told, strict=True):
        large = picture.repeat_interleave(4, 1).repeat_interleave(4, 2)
        found = probe.probabilities(large[None], "style")[0]
        seen.append(probe.labels("style")[int(found.argmax())])
        assert words_ == f"{seen[-1]} {float(found.max()):.0%}"
        assert color == (showing.RIGHT if seen[-1] == "ink" else showing.WRONG)
    counts = ", ".join(f"{int(one == 'ink')} at {strength:g}" for one, strength in zip(seen, columns, strict=True))
    assert f"of 1, as wanted are {counts}. No latents are known for flat." in caption
    assert not list(exhibits.strengths(small_pipe, sae, known, SMALL, "style", ("flat",)))


@pytest.mark.parametrize("wrong", [{"labelled": 0}, {"objects": -1}, {"strength": 0.0}])
def test_settings_that_draw_nothing_are_errors(wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        Settings(**wrong)
