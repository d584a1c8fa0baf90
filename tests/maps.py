"""Causal maps made of numbers that a test chooses."""

import numpy
import xarray

SITES = ("unet.down.0.0.resnet", "unet.down.0.0.cross_attention", "unet.mid.0.resnet", "unet.up.0.0.feed_forward")


def make_map(restored, *, sites=SITES, prompts=None, **labels) -> xarray.Dataset:
    """A map with clean 1 and corrupted 0, so that indirect effects are the values of `restored`.

    Args:
        restored: values, (case, draw, site[, token][, window][, metric]).
        sites: names, of which as many as needed are taken.
        prompts: one per case; with them, cases have an identity.
        **labels: of each dimension behind `site`.
    """
    restored = numpy.asarray(restored, float)
    dims = ("case", "draw", "site", *labels)
    whole = ("case", "draw", *(dim for dim in labels if dim == "metric"))
    shape = [restored.shape[dims.index(dim)] for dim in whole]
    effects = xarray.Dataset(
        {
            "clean": (whole, numpy.ones(shape)),
            "corrupted": (whole, numpy.zeros(shape)),
            "sham": (dims, numpy.where(numpy.isnan(restored), numpy.nan, 0.0)),  # NaN is what never ran
            "restored": (dims, restored),
        },
        coords={"case": range(restored.shape[0]), "draw": range(restored.shape[1]), **labels},
        attrs={"metric": "clip_score", "intervention": "restore", "num_inference_steps": 8, "guidance_scale": 7.5},
    )
    if numpy.isnan(restored).any():
        effects["absent"] = dims, numpy.isnan(restored)
    names = list(sites)[: restored.shape[2]]
    effects = effects.assign_coords(
        site=names,
        network=("site", [name.split(".")[0] for name in names]),
        component=("site", [name.rsplit(".", 1)[-1] for name in names]),
        layer=("site", list(range(len(names)))),
    )
    if prompts is not None:
        n = len(prompts)
        effects = effects.assign_coords(
            prompt=("case", list(prompts)), subject=("case", ["cat"] * n), seed=("case", [0] * n)
        )
    return effects
