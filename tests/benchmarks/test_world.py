"""Scenes, captions and renders of the emoji world say the same."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from benchmarks.emoji import evaluate, judging, world
from benchmarks.emoji.world import Caption, Scene


class Still:
    """A random generator whose jitter is nothing."""

    def uniform(self, low, high, size=None):
        return 0.0 if size is None else numpy.zeros(size)


def picture(**scene):
    return world.render([Scene(**{"object": "cat", "style": "noto"} | scene)], Still())[0]


@given(seed=st.integers(0, 2**32 - 1))
def test_a_caption_states_what_is_said_and_nothing_else(seed):
    caption = world.sample(numpy.random.default_rng(seed), "all")
    scene, said, words = caption.scene, caption.said, caption.text.replace(",", "").split()
    noun = scene.object if scene.count == 1 else world.plural(scene.object)
    assert ({"fact", "object"} <= said) is False
    assert (scene.fact is not None and scene.fact.split()[-1] in words) == ("fact" in said)
    if "object" in said and scene.object != "grapes":
        assert noun.split()[-1] in words
    assert (scene.style in words) == ("style" in said)
    assert ("background" in words) == ("background" in said)
    assert ("upside" in words) == (scene.pose == "upside down")
    assert (scene.viewpoint == "plain") == ("viewpoint" not in said)
    # What is unsaid has its default.
    if "background" not in said:
        assert scene.background == "white"
    if "count" not in said:
        assert scene.count == 1


@given(seed=st.integers(0, 2**32 - 1))
def test_training_never_shows_what_is_held_out(seed):
    rng = numpy.random.default_rng(seed)
    for split, unseen in (("train", False), ("held_out", True)):
        scene = world.sample(rng, split).scene
        assert ((scene.object, scene.style, scene.background) in world.held_out()) is unseen


def test_a_tenth_of_the_triples_is_held_out():
    n_triples = len(world.OBJECTS) * len(world.STYLES) * len(world.BACKGROUNDS)
    assert len(world.held_out()) / n_triples == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_corners_show_the_background(background):
    image = picture(viewpoint="distant", background=background)
    for corner in (image[:, 0, 0], image[:, 0, -1], image[:, -1, 0], image[:, -1, -1]):
        torch.testing.assert_close((corner + 1) * 127.5, torch.tensor(world.BACKGROUNDS[background]).float())


def test_a_share_of_the_backgrounds_is_mixed_with_another():
    blue = torch.tensor(world.BACKGROUNDS["blue"]).float()
    scenes = [Scene("cat", "noto", "blue", viewpoint="distant")] * 400
    corners = (world.render(scenes, numpy.random.default_rng(0), mixed=0.5)[:, :, 0, 0] + 1) * 127.5
    moved = (corners - blue).norm(dim=1)
    # half of them, but for those that were mixed with blue itself
    assert (moved > 0.1).float().mean() == pytest.approx(0.5 * 8 / 9, abs=0.08)
    others = torch.tensor(list(world.BACKGROUNDS.values())).float() - blue
    along = ((corners - blue) @ others.T / others.square().sum(1).clamp(min=1)).clamp(0, 1)
    between = along[..., None] * others
    assert ((corners - blue)[:, None] - between).norm(dim=2).amin(1).max() < 0.1
    unmixed = world.render(scenes[:2], numpy.random.default_rng(0))
    torch.testing.assert_close((unmixed[:, :, 0, 0] + 1) * 127.5, blue.expand(2, 3))


@pytest.mark.parametrize("count", world.COUNTS)
def test_as_many_objects_are_drawn_as_the_scene_counts(count):
    image = picture(object="soccer ball", count=count, background="purple")
    drawn = (image - image[:, :1, :1]).abs().amax(0) > 0.1
    _, n_parts = ndimage.label(ndimage.binary_fill_holes(drawn), structure=numpy.ones((3, 3)))
    assert n_parts == count


def test_upside_down_is_half_a_turn():
    torch.testing.assert_close(picture(pose="upside down"), picture().flip(1, 2), atol=1e-5, rtol=0)


def test_viewpoints_order_by_size():
    sizes = [
        ((picture(viewpoint=viewpoint) - 1).abs().amax(0) > 0.1).float().mean()
        for viewpoint in ("distant", "plain", "close up")
    ]
    assert sizes == sorted(sizes)


def test_labels_index_the_factors():
    scene = Scene("owl", "ink", "pink", 2, "plain", "upside down")
    found = {factor: world.FACTORS[factor][index] for factor, (index,) in world.labels([scene]).items()}
    assert found == {
        "object": "owl", "style": "ink", "background": "pink", "count": 2, "viewpoint": "plain", "pose": "upside down",
    }  # fmt: skip


def test_evaluation_judges_what_captions_say():
    scene = Scene("panda", "ink", fact="the mascot")
    caption = Caption("the mascot", frozenset({"fact"}), scene)
    judged = {factor for factor in (*world.FACTORS, "fact") if evaluate.judged(caption, factor)}
    assert judged == {"fact", "background"}


def test_the_interval_is_wilsons():
    """Eight of ten, 95%: (0.490, 0.943), as Wilson's formula gives by hand."""
    found = judging.interval(torch.tensor([True] * 8 + [False] * 2))
    z, p, n = 1.959964, 0.8, 10
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert found["n"] == 10
    assert found["low"] == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-5)
    assert found["high"] == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-5)
