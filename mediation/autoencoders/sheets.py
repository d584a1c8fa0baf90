"""A page to browse a dictionary: for each latent its label, its scores and the pictures in which it is most active."""

import base64
import html
import io
import os
import pathlib

import numpy
import PIL.Image
import xarray

from mediation.autoencoders.concepts import score_latents
from mediation.mapfiles import check_folder

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 2em }}
td, th {{ padding: 0.3em 0.8em; text-align: right; vertical-align: middle }}
td:nth-child(2), th:nth-child(2) {{ text-align: left }}
img {{ image-rendering: pixelated; display: block }}
</style>
<h1>{title}</h1>
<p>Labels were chosen on even pictures; scores are of odd ones, in parentheses with masks of other pictures. Pictures
are dark where the latent is silent. <input placeholder="filter by label" oninput="for (const row of
document.querySelectorAll('tbody tr')) row.hidden = !row.dataset.label.includes(this.value)"></p>
<table>
<thead><tr><th>latent<th>label<th>IoU<th>precision<th>recall<th>monosemanticity<th>pictures<th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
"""
_SCORES = ("iou", "precision", "recall", "monosemanticity")


def write_sheet(dictionary: xarray.Dataset, path: str | os.PathLike) -> None:
    """Writes one HTML file that needs nothing else: every latent that is ever active, the best label first.

    Args:
        dictionary: from `mediation.concept_dictionary`.
        path: ends in ".html".

    Raises:
        ValueError: if it ends otherwise.
        FileNotFoundError: if there is no folder to keep it in.
    """
    path = check_path(path)
    scores = score_latents(dictionary)
    order = numpy.argsort(-scores.iou.fillna(-1).values, kind="stable")
    rows = [_row(dictionary, scores, int(i)) for i in order if dictionary.n.values[i]]
    title = html.escape(f"Latents of {dictionary.attrs.get('place', 'an autoencoder')}")
    path.write_text(_PAGE.format(title=title, rows="\n".join(rows)), encoding="utf-8")


def check_path(path: str | os.PathLike) -> pathlib.Path:
    """The path, if a sheet can be written there.

    Raises:
        ValueError: if it does not end in ".html".
        FileNotFoundError: if there is no folder to keep it in.
    """
    path = pathlib.Path(path)
    if path.suffix != ".html":
        raise ValueError(f"a sheet is an .html file, got {path.name!r}")
    return check_folder(path)


def top_strip(dictionary: xarray.Dataset, latent: int) -> PIL.Image.Image:
    """The pictures in which a latent is most active, side by side, dark where it is silent.

    Args:
        dictionary: from `mediation.concept_dictionary`.
        latent: its number.

    Raises:
        KeyError: if there is no such latent.
    """
    if latent not in dictionary.latent.values:
        raise KeyError(f"the dictionary has no latent {latent}")
    one = dictionary.sel(latent=latent)
    peak = max(float(one.top_activation.max()), 1e-12)
    strip = []
    for top in range(dictionary.sizes["top"]):
        picture = one.thumbnail.values[int(one.top_image.values[top])].astype(float)
        heat = PIL.Image.fromarray(numpy.clip(one.top_map.values[top] / peak, 0, 1).astype(numpy.float32))
        heat = numpy.asarray(heat.resize(picture.shape[1::-1], PIL.Image.Resampling.NEAREST))
        shown = picture * (0.25 + 0.75 * heat[..., None]) if one.top_activation.values[top] > 0 else picture * 0
        strip.append(numpy.pad(shown, ((0, 0), (0, 2), (0, 0)), constant_values=255))
    return PIL.Image.fromarray(numpy.concatenate(strip, axis=1)[:, :-2].round().astype(numpy.uint8))


def _row(dictionary: xarray.Dataset, scores: xarray.Dataset, index: int) -> str:
    latent = int(dictionary.latent.values[index])
    label = html.escape(str(scores.label.values[index]))
    cells = "".join(
        f"<td>{_number(scores[name].values[index])} ({_number(scores[f'chance_{name}'].values[index])})"
        for name in _SCORES
    )
    file = io.BytesIO()
    top_strip(dictionary, latent).save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    n = int(dictionary.n.values[index])
    return f'<tr data-label="{label}"><td>{latent}<td>{label}{cells}<td>{n}<td><img src="{source}" alt=""></tr>'


def _number(value: float) -> str:
    return "–" if numpy.isnan(value) else f"{value:.2f}"
