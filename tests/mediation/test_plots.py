"""A heat map shows the summary's numbers where its labels say."""

import json

import matplotlib.colors
import matplotlib.pyplot
import numpy
import pytest
import xarray

import mediation
from mediation.reports import as_json, describe
from tests.maps import make_map

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


@pytest.mark.parametrize(
    ("values", "limit", "extend"),
    [
        ([0.5, -0.25, 0.125], 0.5, "neither"),
        ([0.5, -9.0, 0.125], 1.0, "min"),  # the total effect is 1
        ([3.0, -9.0, 0.125], 3.0, "min"),
        ([-0.5, -0.25, -0.125], 0.5, "neither"),
    ],
)
def test_what_harms_more_than_the_corruption_does_not_pale_the_others(values, limit, extend):
    image = mediation.plot_effects(make([[values]])).images[0]
    assert image.get_clim() == (-limit, limit)
    assert image.colorbar.extend == extend


def test_shares_of_the_total_effect_have_the_same_colors():
    ax = mediation.plot_effects(make([[[0.5, -9.0, 0.125]]]), normalize=True)
    assert ax.images[0].get_clim() == (-1.0, 1.0)


def test_heads_are_columns_beside_their_attention():
    effects = make([[[0.5, -1.0, 0.25]]])
    names = ["unet.mid.0.self_attention.head.0", "unet.mid.0.self_attention.head.1", "unet.up.1.self_attention.head.0"]
    heads = {"component": ("site", ["self_attention"] * 3), "head": ("site", [0, 1, 0])}
    ax = mediation.plot_effects(effects.assign_coords(site=names, **heads))
    assert labels(ax.yaxis) == ["mid.0.self_attention", "up.1.self_attention"]
    assert labels(ax.xaxis) == ["0", "1"]
    shown = numpy.ma.filled(ax.images[0].get_array().astype(float), numpy.nan)
    numpy.testing.assert_array_equal(shown, [[0.5, -1.0], [0.25, numpy.nan]])


def grid(sites, components, networks=None):
    """What a heat map of these sites shows, whose effects are 1, 2, 3, …: {(row, column): effect}."""
    n = len(sites)
    values = numpy.arange(1.0, n + 1)
    coords = {"component": ("site", components), "network": ("site", networks or ["unet"] * n)}
    effects = make_map(values[None, None], sites=sites).assign_coords(coords)
    ax = mediation.plot_effects(effects)
    shown = numpy.ma.filled(ax.images[0].get_array().astype(float), numpy.nan)
    rows, columns = labels(ax.yaxis), labels(ax.xaxis)
    assert len(set(rows)) == len(rows)
    assert len(set(columns)) == len(columns)
    return {(rows[i], columns[j]): shown[i, j] for i, j in numpy.argwhere(~numpy.isnan(shown))}


def test_sites_together_have_rows_of_their_own():
    """The first two groups begin with the same site and would share its cell."""
    sites = [
        "unet.mid.0.resnet+unet.mid.0.self_attention",
        "unet.mid.0.resnet+unet.mid.0.cross_attention",
        "unet.mid.0.resnet",
        "unet.mid.0.resnet+unet.mid.1.resnet",
        "unet.down.0.0.resnet+unet.mid.1.resnet",  # as the one before: two, with the same in the middle
    ]
    together = ["resnet+self_attention", "resnet+cross_attention", "resnet", "resnet", "resnet"]
    assert grid(sites, together) == {
        ("resnet + self attention, 2 together", "mid.0"): 1,
        ("resnet + cross attention, 2 together", "mid.0"): 2,
        ("resnet", "mid.0"): 3,
        ("resnet, 2 together", "mid.1"): 4,
        ("down.0.0.resnet+mid.1.resnet", "mid.1"): 5,
    }


def test_every_effect_is_shown_wherever_its_sites_are():
    sites = ["text_encoder.0.self_attention", "text_encoder_2.0.self_attention", "unet.mid.0.self_attention"]
    networks = [site.partition(".")[0] for site in sites]
    assert grid(sites, ["self_attention"] * 3, networks) == {
        ("text encoder self attention", "0"): 1,
        ("text encoder 2 self attention", "0"): 2,
        ("unet self attention", "mid.0"): 3,
    }


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


def test_of_several_metrics_the_chosen_one_is_named():
    effects = make_map(numpy.ones((1, 1, 2, 2)), metric=["clip_score", "image_mse"])
    chosen = effects.assign_attrs(metric="clip_score, image_mse").sel(metric="image_mse")
    label = "indirect effect\non image_mse"
    assert mediation.plot_effects(chosen).figure.axes[-1].get_ylabel() == label
    assert mediation.plot_bars(chosen).get_ylabel() == label
    assert mediation.summarize(chosen).attrs["metric"] == json.loads(as_json(chosen))["metric"] == "image_mse"
    assert " on image_mse, " in describe(chosen)


def test_windows_are_columns_of_a_denoiser_map():
    values = [[[[0.1, 0.9], [0.2, -0.4], [0.0, 0.3]]]]
    ax = mediation.plot_effects(make(values, window=["0–0.5", "0.5–1"]))
    assert labels(ax.xaxis) == ["0–0.5", "0.5–1"]
    assert labels(ax.yaxis) == [name.removeprefix("unet.") for name in NAMES]
    assert ax.images[0].get_array().tolist() == values[0][0]
    together = make(values, window=["0–0.5", "0.5–1"])
    names = [f"unet.down.{i}.0.resnet+unet.down.{i}.1.resnet+unet.mid.{i}.resnet" for i in range(3)]
    ax = mediation.plot_effects(together.assign_coords(site=names))
    assert labels(ax.yaxis) == [f"down.{i}.1.resnet, 3 together" for i in range(3)]


def test_bars_are_means_with_their_intervals_over_the_noise_floor():
    effects = make([[[1.0, 5.0, 2.0]], [[2.0, 5.0, 4.0]], [[3.0, 5.0, 3.0]]])
    effects["sham"] = effects.sham + 0.25
    ax = mediation.plot_bars(effects)
    summary = mediation.summarize(effects, by="component")
    assert labels(ax.xaxis) == ["cross attention", "resnet"]
    bars = ax.containers[-1]
    assert [bar.get_height() for bar in bars] == pytest.approx([5, 2.5])
    stems = bars.errorbar.lines[2][0].get_segments()
    numpy.testing.assert_allclose([stem[:, 1] for stem in stems], numpy.stack([summary.low, summary.high], axis=1))
    band = ax.patches[-1]
    assert (band.get_y(), band.get_height()) == (-0.25, 0.5)


def test_tokens_are_bars_side_by_side():
    values = [[[[0.1, 0.9], [0.2, 0.0], [0.3, 0.5]]]]
    ax = mediation.plot_bars(make(values, token=["subject", "eos"]), normalize=True)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["subject", "eos"]
    heights = [[bar.get_height() for bar in ax.patches[i : i + 2]] for i in (0, 2)]
    assert heights == [pytest.approx([0.2, 0.2]), pytest.approx([0.0, 0.7])]
    assert ax.patches[0].get_x() < ax.patches[2].get_x() < ax.patches[1].get_x()
    assert ax.get_ylabel() == "IE / TE"


def with_images(effects, n_sites):
    """Every image is one grey: 10 clean, 20 corrupted, then 30, 40, …; 100 more in the second case."""

    def image(value):
        cases = value + 100 * numpy.arange(effects.sizes["case"])
        return numpy.broadcast_to(cases[:, None, None, None, None], (len(cases), 1, 2, 3, 3)).astype("uint8")

    dims = ("case", "draw", "y", "x", "channel")
    effects = effects.assign(clean_image=(dims, image(10)), corrupted_image=(dims, image(20)))
    restored = numpy.stack([image(30 + 10 * i) for i in range(n_sites)], axis=2)
    effects = effects.assign(restored_image=(("case", "draw", "image_site", "y", "x", "channel"), restored))
    return effects.assign_coords(image_site=NAMES[:n_sites])


def test_strips_show_each_case_clean_corrupted_and_by_site():
    effects = with_images(make([[[1.0, 2.0]], [[1.0, 2.0]]]), 2).assign_coords(prompt=("case", ["a cat", "a dog"]))
    ax = mediation.plot_images(effects)
    assert labels(ax.xaxis) == ["clean", "corrupted", "down.0.0\nresnet", "down.0.0\ncross_attention"]
    assert labels(ax.yaxis) == ["a cat", "a dog"]
    canvas = ax.images[0].get_array()
    at_labels = [[canvas[int(y), int(x), 0] for x in ax.get_xticks()] for y in ax.get_yticks()]
    assert at_labels == [[10, 20, 30, 40], [110, 120, 130, 140]]
    assert (canvas == 255).any(axis=(0, 2)).all()  # a gap between cases


def test_strips_need_images_of_one_token():
    effects = make([[[[0.1, 0.9]]]], token=["subject", "eos"])
    with pytest.raises(ValueError, match="keeps no images"):
        mediation.plot_images(effects)
    pictured = with_images(make([[[1.0]]]), 1).restored_image.expand_dims(token=["subject", "eos"])
    controls = with_images(make([[[1.0]]]), 1)[["clean_image", "corrupted_image"]]
    with pytest.raises(ValueError, match="choose one token"):
        mediation.plot_images(effects.assign(controls).assign(restored_image=pictured))


def test_emergence_is_a_line_for_each_site_and_branch_with_chance_dashed():
    keys = [(site, t, branch) for site in ("down", "mid") for t in (0.0, 1.0, 0.5) for branch in ("cond", "uncond")]
    sites, steps, branches = zip(*keys, strict=True)
    random = numpy.random.default_rng(0)
    names = ("residual", "variance", "miou", "chance_miou", "constant_miou")
    found = xarray.Dataset(
        {name: (("autoencoder", "case"), random.uniform(0.1, 0.9, size=(12, 5))) for name in names},
        coords={
            "site": ("autoencoder", list(sites)),
            "t": ("autoencoder", list(steps)),
            "branch": ("autoencoder", list(branches)),
        },
    )
    ax = mediation.plot_emergence(found)
    dashed = {tuple(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"}
    shown = {box.get_label(): box for box in ax.containers}
    assert len(shown) == 4
    for site in ("down", "mid"):
        for branch in ("cond", "uncond"):
            own = found.isel(autoencoder=[keys.index((site, t, branch)) for t in (0.0, 0.5, 1.0)])
            line, _, (bars,) = shown[f"{site}, {branch}"].lines
            numpy.testing.assert_allclose(line.get_xdata(), [0, 0.5, 1], atol=0.02)
            numpy.testing.assert_allclose(line.get_ydata(), own.miou.mean("case"))
            assert tuple(own.chance_miou.mean("case").values) in dashed
            low, high = numpy.array([segment[:, 1] for segment in bars.get_segments()]).T
            expected = mediation.summarize_emergence(own).sel(measure="miou")
            numpy.testing.assert_allclose((low, high), (expected.low, expected.high))
            filled = line.get_color() if branch == "cond" else "white"
            assert matplotlib.colors.same_color(line.get_markerfacecolor(), filled)
    left, right = ax.get_xlim()
    assert left > 1 > 0 > right, "the first step is on the left"
    explained = mediation.plot_emergence(found, "explained_variance")
    assert not any(line.get_linestyle() == "--" for line in explained.lines)
    with pytest.raises(ValueError, match="one of explained_variance, miou"):
        mediation.plot_emergence(found, "beauty")


def test_one_metric_at_a_time():
    with pytest.raises(ValueError, match="choose one metric"):
        mediation.plot_effects(make([[[0.5]]]).expand_dims(metric=["a", "b"]))
