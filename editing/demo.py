"""The demonstration: where a style and an object live in the bundled model, and one edit, with pictures."""

import dataclasses
import pathlib
import textwrap
import time
from typing import Annotated

import matplotlib.pyplot
import numpy
import torch
import typer
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from tqdm import tqdm

import editing
import mediation
from mediation import bundled

_CASES = {
    "style": [
        mediation.Case("a cat in the style of ink", subject="ink", seed=0),
        mediation.Case("a photo of a rocket in the style of ink on a blue background", subject="ink", seed=1),
        mediation.Case("two mushrooms in ink style", subject="ink", seed=2),
        mediation.Case("an owl in the style of ink on a pink background", subject="ink", seed=3),
    ],
    "object": [
        mediation.Case("a panda in the style of noto", subject="panda", seed=0),
        mediation.Case("a picture of a sunflower in twemoji style", subject="sunflower", seed=1),
        mediation.Case("a strawberry on a green background in flat style", subject="strawberry", seed=2),
        mediation.Case("an image of a castle in fluent style", subject="castle", seed=3),
    ],
}
_TOKENS = ("before", "subject", "after", "eos", "padding")
_SOURCE, _TARGET = "ink", "noto"
_TEMPLATES = (
    "a thing in the style of {}",
    "a thing in {} style",
    "a photo of a thing in the style of {} on a red background",
    "two things in {} style",
)
_IMAGE_STEPS = 25


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A prompt of the before-and-after sheet, and what the probe should read once the edit is in."""

    prompt: str
    object: str
    style: str
    after: str


_TARGETS = [
    _Picture("a cat in the style of ink", "cat", "ink", "noto"),
    _Picture("a photo of a rocket in ink style", "rocket", "ink", "noto"),
    _Picture("a castle in the style of ink on a yellow background", "castle", "ink", "noto"),
    _Picture("an owl in ink style on a pink background", "owl", "ink", "noto"),
    _Picture("two carrots in the style of ink", "carrot", "ink", "noto"),
    _Picture("an upside down umbrella in the style of ink", "umbrella", "ink", "noto"),
]
_BYSTANDERS = [
    _Picture("a cat in the style of noto", "cat", "noto", "noto"),
    _Picture("a photo of a rocket in twemoji style", "rocket", "twemoji", "twemoji"),
    _Picture("a castle in the style of flat on a yellow background", "castle", "flat", "flat"),
    _Picture("an owl in fluent style on a pink background", "owl", "fluent", "fluent"),
    _Picture("two carrots in the style of noto", "carrot", "noto", "noto"),
    _Picture("an upside down umbrella in the style of twemoji", "umbrella", "twemoji", "twemoji"),
]


def demo(
    output: Annotated[pathlib.Path, typer.Option(help="Folder for figures, maps and the edit.")] = pathlib.Path(
        "mediation-demo"
    ),
    steps: Annotated[int, typer.Option(help="Sampler steps of the causal maps; images take 25.")] = 6,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
) -> None:
    """Trace a style and an object through the bundled model, then edit the style: under three minutes on two cores.

    Example: mediation demo --output mediation-demo
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    print(f"Emoji Diffusion: {len(mediation.sites(pipe))} sites, {steps} steps, guidance {guidance_scale:g}")
    maps = {attribute: _trace(pipe, attribute, cases, steps, guidance_scale) for attribute, cases in _CASES.items()}
    for number, (network, title) in enumerate((("unet", "U-Net"), ("text_encoder", "text encoder"))):
        figure = _draw_maps({attribute: pair[number] for attribute, pair in maps.items()}, title)
        _save(figure, output / f"{network}_maps")
    for attribute, pair in maps.items():
        for network, effects in zip(("unet", "text_encoder"), pair, strict=True):
            effects.to_netcdf(output / f"{attribute}_{network}.nc", engine="scipy")

    # The maps show the style at work in every token behind the subject, so those are what is edited.
    edit = editing.quickfix(pipe, {_SOURCE: _TARGET}, templates=_TEMPLATES, tokens="from_subject")
    edit.save(output / f"{_SOURCE}_to_{_TARGET}.safetensors")
    print(f"\nedit {_SOURCE} -> {_TARGET}: {1000 * edit.report['seconds']:.0f} ms from prompts to factors")
    pictures = [*_TARGETS, *_BYSTANDERS]
    before = _sample(pipe, pictures, guidance_scale, "before")
    with edit.applied(pipe):
        after = _sample(pipe, pictures, guidance_scale, "after")
    _save(_draw_pictures(before, after), output / "before_after")
    _judge(before, after)
    print(f"\nsaved in {output.resolve()}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(f"took {time.monotonic() - started:.0f} s")


def _trace(pipe: DiffusionPipeline, attribute: str, cases: list[mediation.Case], steps: int, guidance_scale: float):
    """The denoiser's map and the text encoder's, by token; prints their top sites."""
    print(f"\n{attribute}: {', '.join(repr(case.subject) for case in cases)} corrupted in {len(cases)} prompts")
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    denoiser = mediation.trace(pipe, cases, sites=mediation.sites(pipe, network="unet"), **options)
    text = mediation.trace(pipe, cases, tokens=_TOKENS, **options)
    for title, effects in (("U-Net", denoiser), ("text encoder, best token", text)):
        summary = mediation.summarize(effects)
        print(
            f"  {title}: total effect {float(summary.total):.2f} [{float(summary.total_low):.2f},"
            f" {float(summary.total_high):.2f}] on CLIPScore, noise floor {float(summary.noise_floor):.1g}"
        )
        for name in mediation.top_sites(effects, k=3):
            row = summary.sel(site=name)
            label = ""
            if "token" in row.dims:
                row = row.isel(token=int(numpy.nanargmax(row["mean"])))
                label = f" at {row.token.item()}"
            print(f"    {name}{label}: {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}], n={row['n']:d} cases")
    chance = 2.0 ** (1 - len(cases))  # that all cases have the same sign
    print(f"  Intervals over {len(cases)} cases are a first look: without any effect, {chance:.0%} or more exclude 0.")
    return denoiser, text


def _draw_maps(maps: dict, title: str) -> Figure:
    size = (11, 4.6) if title == "U-Net" else (9, 4.6)
    shape = (2, 1) if title == "U-Net" else (1, 2)
    figure, axes = matplotlib.pyplot.subplots(*shape, figsize=size, layout="constrained")
    for ax, (attribute, effects) in zip(axes, maps.items(), strict=True):
        mediation.plot_effects(effects, ax)
        ax.set_title(f"{title}: what restores the {attribute}")
    return figure


def _draw_pictures(before: torch.Tensor, after: torch.Tensor) -> Figure:
    n = len(_TARGETS)
    figure = matplotlib.pyplot.figure(figsize=(1.55 * n, 8.4), layout="constrained")
    halves = figure.subfigures(2, 1)
    for half, pictures, start, title in (
        (halves[0], _TARGETS, 0, f"targets: {_SOURCE} is to become {_TARGET}"),
        (halves[1], _BYSTANDERS, n, "bystanders: nothing is to change"),
    ):
        half.suptitle(title, fontweight="bold")
        axes = half.subplots(2, n)
        for column, picture in enumerate(pictures):
            for row, (images, label) in enumerate(((before, "before"), (after, "after"))):
                ax = axes[row, column]
                ax.imshow(images[start + column].permute(1, 2, 0).numpy())
                ax.set_xticks([])
                ax.set_yticks([])
                if column == 0:
                    ax.set_ylabel(label)
            axes[1, column].set_xlabel(textwrap.fill(picture.prompt, 22), fontsize=7)
    return figure


def _save(figure: Figure, path: pathlib.Path) -> None:
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    matplotlib.pyplot.close(figure)


def _sample(pipe: DiffusionPipeline, pictures: list[_Picture], guidance_scale: float, label: str) -> torch.Tensor:
    images = []
    for start in tqdm(range(0, len(pictures), 4), desc=f"images {label}", unit="batch", disable=None):
        chunk = pictures[start : start + 4]
        # Targets and bystanders of one column share a seed.
        generators = [torch.Generator().manual_seed((start + i) % len(_TARGETS)) for i in range(len(chunk))]
        prompts = [picture.prompt for picture in chunk]
        output = pipe(
            prompts,
            guidance_scale=guidance_scale,
            num_inference_steps=_IMAGE_STEPS,
            generator=generators,
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images)


def _judge(before: torch.Tensor, after: torch.Tensor) -> None:
    """Prints what the probe reads in the images."""
    print("\nwhat the probe reads            before   after")
    groups = {"targets": (_TARGETS, slice(0, len(_TARGETS))), "bystanders": (_BYSTANDERS, slice(len(_TARGETS), None))}
    for name, (pictures, rows) in groups.items():
        n = len(pictures)
        questions = {
            "object as said": ("object", [picture.object for picture in pictures]),
            "style as said": ("style", [picture.style for picture in pictures]),
        }
        if name == "targets":
            questions[f"style is {_TARGET}"] = ("style", [picture.after for picture in pictures])
        for question, (factor, wanted) in questions.items():
            shares = [
                numpy.mean([a == b for a, b in zip(_read(x[rows], factor), wanted, strict=True)])
                for x in (before, after)
            ]
            print(f"  {name:<11} {question:<16} {shares[0]:7.0%} {shares[1]:7.0%}   n={n}")


def _read(images: torch.Tensor, factor: str) -> list[str]:
    probe = bundled.load_probe()
    labels = probe.labels(factor)
    return [labels[i] for i in probe.probabilities(images, factor).argmax(-1)]
