"""The masks that dictionaries are made with are those of the renderer."""

import dataclasses

import numpy
import pytest
import scipy.ndimage
import torch

from benchmarks.emoji import world
from benchmarks.reproduce.saes.trials import QUADRANTS, shows
from editing.steering import named_region
from mediation import bundled
from mediation.bundled.labelling import foreground, label_composition


def renders(n, colors):
    """The same scenes on grounds of several colours, (colour, scene), in [0, 1]."""
    rng = numpy.random.default_rng(0)
    scenes = [dataclasses.replace(world.sample(rng).scene, viewpoint="plain") for _ in range(n)]
    found = []
    for color in colors:
        drawn = [dataclasses.replace(scene, background=color) for scene in scenes]
        found.append((world.render(drawn, numpy.random.default_rng(1)) + 1) / 2)
    return torch.stack(found), scenes


@pytest.mark.parametrize("colors", [("blue", "orange"), ("white", "purple")])
def test_the_foreground_is_where_the_ground_is_hidden(colors):
    images, _ = renders(60, colors)
    shown = (images[0] - images[1]).abs().amax(1)  # how much of the ground
    scores = []
    for image, mask in zip(images[0], (shown < shown.max() / 2).numpy(), strict=True):
        found, sprite = foreground(image), scipy.ndimage.binary_fill_holes(mask)
        scores.append((found & sprite).sum() / (found | sprite).sum())
    assert numpy.mean(scores) > 0.9


def test_renders_are_labelled_by_what_they_are():
    images, scenes = renders(40, ("blue",))
    right = {"object": 0, "style": 0}
    for image, scene in zip(images[0], scenes, strict=True):
        masks = bundled.label_emoji(image)
        for factor in right:
            right[factor] += f"{factor}: {getattr(scene, factor)}" in masks
        whole = label_composition(image)
        assert (whole["object"] ^ whole["background"]).all()
        assert (masks["background: blue"] == whole["background"]).all()
    assert min(right.values()) >= 36


def test_an_object_is_in_the_quadrant_that_has_most_of_it():
    for quadrant in QUADRANTS:
        image = torch.ones(3, 64, 64)
        image[:, named_region(quadrant).repeat_interleave(32, 0).repeat_interleave(32, 1)] = 0.2
        image[:, :2] = image[:, -2:] = 1
        image[:, :, :2] = image[:, :, -2:] = 1
        assert [shows(image, "quadrant", other) for other in QUADRANTS] == [other == quadrant for other in QUADRANTS]
    assert not any(shows(torch.ones(3, 64, 64), "quadrant", quadrant) for quadrant in QUADRANTS)
