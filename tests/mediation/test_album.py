"""Images that were asked for are those that the runs end in; others are not kept."""

import itertools

import numpy
import pytest
import xarray

import mediation
from mediation.pipelines import family_of
from mediation.rows import CLEAN, CORRUPTED, Intervention
from mediation.sampling import Sampling, sample_rows
from tests.runs import CASE

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}
NAMES = ["unet.down.0.0.resnet", "unet.mid.0.resnet", "unet.mid.1.resnet"]


def brightness(images, latents, cases):
    return images.mean((1, 2, 3))


def magnify(pipe, latents):
    """In place of a decoder: a triangle wave that makes small differences of latents visible."""
    return ((latents[:, :3] * 100) % 2 - 1).abs()


@pytest.mark.parametrize("metric", [mediation.LatentDistance(), brightness], ids=["undecoded", "decoded"])
def test_images_are_decoded_final_latents(tiny_pipe, metric, monkeypatch):
    monkeypatch.setattr(family_of(tiny_pipe), "decode", staticmethod(magnify))
    asked = NAMES[:0:-1]  # in another order than that of the sites
    effects = mediation.trace(tiny_pipe, CASE, sites=NAMES, images=asked, metric=metric, batch_size=4, **OPTIONS)
    assert effects.image_site.values.tolist() == asked
    chosen = [mediation.sites(tiny_pipe, name=name)[0] for name in asked]
    latents = sample_rows(tiny_pipe, CASE, 0, [Intervention((site,)) for site in chosen], Sampling(2, 4.0))
    expected = 255 * magnify(tiny_pipe, latents).permute(0, 2, 3, 1).numpy()
    found = [effects.clean_image[0, 0], effects.corrupted_image[0, 0], *effects.restored_image[0, 0]]
    assert {image.dtype for image in found} == {numpy.dtype("uint8")}
    for image, row in zip(found, (CLEAN, CORRUPTED, 2, 3), strict=True):
        assert abs(image.values - expected[row]).max() < 2
    for one, other in itertools.combinations(expected, 2):
        assert abs(one - other).max() > 5


def test_only_what_was_asked_for_is_kept(tiny_pipe):
    options = {"sites": NAMES[:1], "metric": mediation.LatentDistance(), **OPTIONS}
    assert set(mediation.trace(tiny_pipe, CASE, **options)) == {"clean", "corrupted", "sham", "restored"}
    controls = mediation.trace(tiny_pipe, CASE, images=[], **options)
    assert set(controls) == {"clean", "corrupted", "sham", "restored", "clean_image", "corrupted_image"}
    with pytest.raises(KeyError, match=r"images of .*unet\.mid\.1\.resnet.* but this site is not traced"):
        mediation.trace(tiny_pipe, CASE, images=NAMES[2], **options)
    with pytest.raises(ValueError, match=r"given twice: unet\.down\.0\.0\.resnet"):
        mediation.trace(tiny_pipe, CASE, **options | {"sites": NAMES[:1] * 2})


def test_images_survive_netcdf(tiny_pipe, tmp_path):
    windows = [(0.0, 0.5), (0.5, 1.0)]
    effects = mediation.trace(
        tiny_pipe, CASE, sites=NAMES[:1], windows=windows, images="all", metric=mediation.LatentDistance(), **OPTIONS
    )
    assert effects.restored_image.dims == ("case", "draw", "image_site", "window", "y", "x", "channel")
    effects.to_netcdf(tmp_path / "map.nc", engine="scipy")
    xarray.testing.assert_equal(xarray.load_dataset(tmp_path / "map.nc", engine="scipy"), effects)
