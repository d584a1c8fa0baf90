"""The `editing` command: makes, shows, applies, exports and judges edits."""

import functools
import json
import operator
import pathlib
from collections.abc import Iterator
from typing import Annotated

import typer

import editing
import mediation
from editing.evaluatecli import evaluate
from editing.steercli import steer
from editing.updates import describe_extent
from mediation.commands import add_command, new_app

app = new_app()
_command = functools.partial(add_command, app)

_Pairs = Annotated[list[str], typer.Argument(metavar="SOURCE=TARGET...", help="What is to be read as what.")]
_Edit = Annotated[pathlib.Path, typer.Argument(help="An edit file.")]
_Output = Annotated[pathlib.Path, typer.Option(help="The edit file to write.")]
_Pipeline = Annotated[str | None, typer.Option(help="Pipeline folder or hub id; without it, Emoji Diffusion.")]
_Preserve = Annotated[list[str], typer.Option(help="A concept that keeps its meaning; give it as often as needed.")]
_Prompts = Annotated[list[str], typer.Option(help="A whole prompt that keeps its meaning, likewise.")]
_Templates = Annotated[list[str], typer.Option(help='A text with one "{}" that concepts are put through, likewise.')]
_Lambda = Annotated[str | None, typer.Option(help='A number, "auto", or "relative:0.1" in units of the keys.')]
_Weights = Annotated[
    list[str], typer.Option(metavar="CONCEPT=NUMBER", help="How much a concept counts; 1 if not given. Likewise.")
]
_Attribution = Annotated[pathlib.Path, typer.Argument(help="Scores that `mediation attribute` wrote.")]
_Ratio = Annotated[float, typer.Option(help="Share of the weights; at least one of each group is taken.")]
_Per = Annotated[str, typer.Option(help="Group that the share is of: row, matrix or model.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Change what a text-to-image model makes of words, in closed form, and take it back."""


@_command
def quickfix(
    pairs: _Pairs,
    output: _Output = pathlib.Path("edit.safetensors"),
    pipeline: _Pipeline = None,
    preserve: _Preserve = (),
    preserve_prompt: _Prompts = (),
    template: _Templates = (),
    regularization: _Lambda = None,
    tokens: Annotated[str, typer.Option(help="last_subject, subject, from_subject or all.")] = "last_subject",
    site: Annotated[
        list[str], typer.Option(help="Site of a text encoder, likewise; without it, its first attention.")
    ] = (),
    weight: _Weights = (),
    as_json: _Json = False,
) -> None:
    """Make a text encoder read concepts as others (Diff-QuickFix).

    Example: editing quickfix ink=noto --preserve cat --output ink.safetensors
    """
    edit = editing.quickfix(
        mediation.load_pipeline(pipeline),
        _pairs(pairs),
        templates=template or None,
        preserve=[*preserve, *map(editing.Prompt, preserve_prompt)],
        regularization=0.01 if regularization is None else _lambda(regularization),
        tokens=tokens,
        site=site or None,
        weights=_weights(weight),
    )
    _finish(edit, output, as_json)


@_command
def cross_attention(
    pairs: _Pairs,
    output: _Output = pathlib.Path("edit.safetensors"),
    method: Annotated[str, typer.Option(help="uce, loco or time.")] = "uce",
    layer: Annotated[
        list[str], typer.Option(help="Number or name of a cross-attention; without it, all; loco needs it.")
    ] = (),
    pipeline: _Pipeline = None,
    preserve: _Preserve = (),
    preserve_prompt: _Prompts = (),
    template: _Templates = (),
    regularization: _Lambda = None,
    tokens: Annotated[str | None, typer.Option(help="As for quickfix; without it, the method's.")] = None,
    weight: _Weights = (),
    as_json: _Json = False,
) -> None:
    """Make cross-attentions read concepts as others, or, without a target, as nothing (UCE, LocoEdit, TIME).

    Example: editing cross-attention ink= --method uce --preserve noto --output erased.safetensors
    """
    edit = editing.cross_attention_edit(
        mediation.load_pipeline(pipeline),
        _pairs(pairs),
        method=method,
        layers=[int(one) if one.isdecimal() else one for one in layer] or None,
        templates=template or None,
        preserve=[*preserve, *map(editing.Prompt, preserve_prompt)],
        regularization=None if regularization is None else _lambda(regularization),
        tokens=tokens,
        weights=_weights(weight),
    )
    _finish(edit, output, as_json)


@_command
def erase(
    attribution: _Attribution,
    output: _Output = pathlib.Path("edit.safetensors"),
    ratio: _Ratio = 0.001,
    per: _Per = "row",
    as_json: _Json = False,
) -> None:
    """Set the weights to 0 that contribute most to a concept (CAD-Erase).

    Example: editing erase ink-scores.safetensors --ratio 0.002 --per matrix --output no-ink.safetensors
    """
    _finish(editing.cad_erase(mediation.Attribution.load(attribution), ratio=ratio, per=per), output, as_json)


@_command
def amplify(
    attribution: _Attribution,
    output: _Output = pathlib.Path("edit.safetensors"),
    ratio: _Ratio = 0.001,
    per: _Per = "row",
    as_json: _Json = False,
) -> None:
    """Set the weights to 0 that hinder a concept most (CAD-Amplify).

    Example: editing amplify more-ink-scores.safetensors --output more-ink.safetensors
    """
    _finish(editing.cad_amplify(mediation.Attribution.load(attribution), ratio=ratio, per=per), output, as_json)


_command(steer)


@_command
def show(edit: _Edit, as_json: _Json = False) -> None:
    """Tell what an edit file contains: how it was made, what it changes, and how well by its own measure.

    Example: editing show ink.safetensors
    """
    loaded = editing.load(edit)
    if as_json:
        _print_json(loaded)
        return
    typer.echo(repr(loaded))
    for key, value in loaded.metadata.items():
        if key != "base":
            typer.echo(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
    for name, measures in loaded.report["parameters"].items():
        relative = measures["relative_norm"]
        share = "" if relative is None else f", {relative:.2%} of the weight"
        typer.echo(f"  changes {name}: {describe_extent(measures)}, norm {measures['norm']:.4g}{share}")
    for line in _outcome(loaded):
        typer.echo(line)


@_command
def apply(
    edits: Annotated[list[pathlib.Path], typer.Argument(metavar="EDIT...", help="Edit files, applied together.")],
    output: Annotated[pathlib.Path, typer.Option(help="A new folder for the edited pipeline.")],
    pipeline: _Pipeline = None,
    scale: Annotated[float, typer.Option(help="How much of the edits to apply.")] = 1.0,
    as_json: _Json = False,
) -> None:
    """Write a pipeline folder with edits in its weights.

    Example: editing apply ink.safetensors --output edited-pipeline
    """
    edit = _scaled(functools.reduce(operator.add, map(editing.load, edits)), scale)
    editing.export_pipeline(edit, mediation.load_pipeline(pipeline), output)
    _tell(edit, output, f"{edit!r} is in {output}", as_json)


@_command
def export(
    edit: _Edit,
    output: Annotated[pathlib.Path, typer.Option(help="The LoRA file to write.")],
    format: Annotated[str, typer.Option(help="diffusers, or kohya for A1111 and ComfyUI.")] = "diffusers",
    rank: Annotated[int | None, typer.Option(help="Compress to at most this rank.")] = None,
    scale: Annotated[float, typer.Option(help="How much of the edit to export.")] = 1.0,
    as_json: _Json = False,
) -> None:
    """Write an edit as a LoRA file for other programs.

    Example: editing export ink.safetensors --format kohya --output ink-lora.safetensors
    """
    chosen, words = _scaled(editing.load(edit), scale), ""
    if rank is not None:
        chosen = chosen.compress(rank)
        lost = max(measures["relative_error"] for measures in chosen.report["parameters"].values())
        words = f"compressed to rank {rank}: at most {lost:.2%} of a change is lost\n"
    chosen.export_lora(output, format=format)
    _tell(chosen, output, f"{words}{chosen!r} is in {output}, for {format}", as_json)


_command(evaluate)


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        source, sign, target = text.partition("=")
        if not sign:
            raise ValueError(f'expected "source=target", got {text!r}')
        if source in pairs:
            raise ValueError(f"the source {source!r} was given twice")
        pairs[source] = target
    return pairs


def _weights(texts: list[str]) -> dict[str, float]:
    weights = {}
    for text in texts:
        concept, sign, number = text.rpartition("=")
        if not sign or concept in weights:
            raise ValueError(f'expected one "concept=number" for each weight, got {", ".join(texts)}')
        try:
            weights[concept] = float(number)
        except ValueError as error:
            raise ValueError(f"the weight of {concept!r} must be a number, got {number!r}") from error
    return weights


def _lambda(text: str) -> float | str | editing.Relative:
    if text == "auto":
        return text
    try:
        return editing.Relative(float(text[9:])) if text.startswith("relative:") else float(text)
    except ValueError as error:
        raise ValueError(f'regularization is a number above 0, "auto", or "relative:0.1"; got {text!r}') from error


def _scaled(edit: editing.Edit, scale: float) -> editing.Edit:
    return edit if scale == 1.0 else edit.scaled(scale)


def _finish(edit: editing.Edit, output: pathlib.Path, as_json: bool) -> None:
    edit.save(output)
    words = f"{edit!r} in {1000 * edit.report['seconds']:.0f} ms, saved in {output}"
    _tell(edit, output, "\n".join([words, *_outcome(edit)]), as_json)


def _tell(edit: editing.Edit, output: pathlib.Path, words: str, as_json: bool) -> None:
    if as_json:
        _print_json(edit, output=str(output))
    else:
        typer.echo(words)


def _print_json(edit: editing.Edit, **more: str) -> None:
    typer.echo(json.dumps(more | {"metadata": dict(edit.metadata), "report": dict(edit.report)}))


def _outcome(edit: editing.Edit) -> Iterator[str]:
    if objective := edit.report.get("objective"):
        share = f"{edit.report['n_changed']:,} of {edit.report['n_weights']:,} weights"
        before, predicted = (f"{objective[when]:.4g}" for when in ("before", "predicted"))
        yield f"  {share} set to 0: objective {before} before, {predicted} predicted after"
    for entry in edit.report.get("residual", ()):
        target = entry["target"] or "nothing"
        if not isinstance(target, str):
            target = ", ".join(f"{share:.0%} {one}" for one, share in target.items())
        change = f"residual {entry['before']:.2f} before, {entry['after']:.2f} after"
        yield f"  {entry.get('site', entry['network'])}, {entry['source']} -> {target}: {change}"
    for entry in edit.report.get("interference", ()):
        kept = entry.get("concept", entry.get("prompt"))
        where = entry.get("site", entry["network"])
        yield f"  {where}, {kept!r} preserved: values change by {entry['change']:.2%}"
