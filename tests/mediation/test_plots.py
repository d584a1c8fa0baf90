"""A heat map shows the summary's numbers where its labels say."""

import matplotlib.pyplot
import numpy
import pytest
import xarray

import mediation

NAMES = ["unet.down.0.0.resnet", "unet.down.0.0.cross_attention", "unet.mid.0.resnet"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def make(restored, **coords):
    """A map with corrupted 0 and clean 1, so that effects are the restored values themselves."""
    dims = ("case", "draw", "site", *coords)[: numpy.ndim(restored)]
    restored = xarray.DataArray(numpy.asarray(restored, float), dims=dims)
    whole = xarray.DataArray(numpy.zeros(restored.shape[:2]), dims=("case", "draw"))
    effects = xarray.Dataset({"clean": whole + 1, "corrupted": whole, "sham": restored * 0, "restored": restored})
    names = NAMES[: restored.sizes["site"]]
    return effects.assign_coords(
        site=names, component=("site", [name.rsplit(".")[-1] for name in names]), **coords
    ).assign_attrs(metric="clip_score")


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_components_are_rows_and_positions_are_columns():
    ax = mediation.plot_effects(make([[[0.5, -1.0, 0.25]]]))
    image = ax.images[0]
    assert labels(ax.yaxis) == ["resnet", "cross attention"]
    assert labels(ax.xaxis) == ["down.0.0", "mid.0"]
    shown = numpy.ma.filled(image.get_array().astype(float), numpy.nan)
    numpy.testing.assert_array_equal(shown, [[0.5, 0.25], [-1.0, numpy.nan]])


def test_heads_are_columns_beside_their_attention():
    effects = make([[[0.5, -1.0, 0.25]]])
    names = ["unet.mid.0.self_attention.head.0", "unet.mid.0.self_attention.head.1", "unet.up.1.self_attention.head.0"]
    ax = mediation.plot_effects(effects.assign_coords(site=names))
    assert labels(ax.yaxis) == ["mid.0.self_attention", "up.1.self_attention"]
    assert labels(ax.xaxis) == ["0", "1"]
    shown = numpy.ma.filled(ax.images[0].get_array().astype(float), numpy.nan)
    numpy.testing.assert_array_equal(shown, [[0.5, -1.0], [0.25, numpy.nan]])


def test_colours_diverge_around_zero():
    image = mediation.plot_effects(make([[[0.5, -1.0, 0.25]]])).images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-1.0, 1.0)


def test_tokens_are_columns_of_a_text_map():
    effects = make([[[[0.1, 0.9], [0.2, 0.0], [0.0, 0.3]]]], token=["subject", "eos"])
    ax = mediation.plot_effects(effects)
    assert labels(ax.xaxis) == ["subject", "eos"]
    assert labels(ax.yaxis) == [name.removeprefix("unet.") for name in NAMES]
    assert ax.images[0].get_array().tolist() == [[0.1, 0.9], [0.2, 0.0], [0.0, 0.3]]


def test_a_dot_marks_what_the_interval_tells_from_zero():
    # The first site's effect is positive in every case, the second's sign varies, the third's is negative.
    restored = [[[1.0, 1.0, -1.0]], [[2.0, -1.0, -2.0]], [[3.0, 0.5, -3.0]], [[2.0, -0.5, -1.0]]]
    ax = mediation.plot_effects(make(restored))
    assert sorted(map(tuple, ax.collections[0].get_offsets().tolist())) == [(0.0, 0.0), (1.0, 0.0)]


def test_it_draws_where_it_is_told_and_names_the_metric():
    figure, (left, right) = matplotlib.pyplot.subplots(1, 2)
    assert mediation.plot_effects(make([[[0.5, 0.1]]]), left) is left
    assert not right.images
    assert any("clip_score" in ax.get_ylabel() for ax in figure.axes)
    mediation.plot_effects(make([[[0.5, 0.1]]]), right, normalize=True)
    assert any(ax.get_ylabel() == "IE / TE" for ax in figure.axes)


def test_one_metric_at_a_time():
    with pytest.raises(ValueError, match="choose one metric"):
        mediation.plot_effects(make([[[0.5]]]).expand_dims(metric=["a", "b"]))
