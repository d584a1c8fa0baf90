"""The command line: every example in its help runs, and does what the functions do."""

import functools
import json
import re
import shlex
from unittest import mock

import pytest
import torch
import xarray
from matplotlib.figure import Figure
from typer.testing import CliRunner

import editing
import mediation
from editing.cli import _lambda, _pairs, app
from mediation import bundled
from tests import tiny

COMMANDS = ("quickfix", "cross-attention", "show", "apply", "export", "evaluate")


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    """The bundled pipeline, which no command leaves changed."""
    load = mediation.load_pipeline
    bundled_pipe = functools.cache(load)
    with mock.patch.object(mediation, "load_pipeline", lambda name=None: load(name) if name else bundled_pipe()):
        yield


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def example(command):
    """The example in a command's help, as its arguments."""
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(command, "--help").output).split())
    found = re.search(rf"Example: editing ({command} .*?) (?:Arguments|Options|\*)", text)
    return shlex.split(found.group(1))


def only(updates):
    (update,) = updates.values()
    return update


def test_help_lists_the_commands():
    output = run("--help").output
    assert all(command in output for command in (*COMMANDS, "erase", "amplify"))


def test_every_example_runs(tmp_path, monkeypatch):
    """In the order of the help, since later ones read what earlier ones wrote; pictures take one step."""
    monkeypatch.chdir(tmp_path)
    evaluate, savefig = editing.evaluate, Figure.savefig
    one_step = {"num_inference_steps": 1}
    monkeypatch.setattr(editing, "evaluate", lambda *given, **options: evaluate(*given, **options | one_step))
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: savefig(figure, path, dpi=dpi / 3))
    outputs = {}
    for command in COMMANDS:
        result = run(*example(command))
        assert result.exit_code == 0, result.output
        outputs[command] = result.output
    pipe = mediation.load_pipeline()
    ink = editing.load("ink.safetensors")
    made = editing.quickfix(pipe, {"ink": "noto"}, preserve=["cat"])
    assert torch.equal(only(ink.updates).dense(), only(made.updates).dense())
    assert "ink -> noto: residual" in outputs["quickfix"]
    assert "'cat' preserved: values change by" in outputs["quickfix"]
    assert editing.load("erased.safetensors").metadata["pairs"] == {"ink": ""}
    assert "-> nothing: residual" in outputs["cross-attention"]
    assert 'pairs: {"ink": "noto"}' in outputs["show"]
    assert "rank 4" in outputs["show"]
    assert torch.equal(weight(mediation.load_pipeline("edited-pipeline")), applied_weight(pipe, ink))
    lora = editing.import_lora("ink-lora.safetensors", pipe)
    assert torch.equal(only(lora.updates).dense(), only(ink.updates).dense())
    for name in ("report.nc", "summary.nc", "suite.csv", "sheet.png", "accuracies.png"):
        assert name in outputs["evaluate"]
    assert len(editing.Suite.read("report/suite.csv")) == 8
    table = [line.split() for line in outputs["evaluate"].splitlines()]
    assert table[0] == ["role", "measure", "unedited", "edited"]
    assert table[5][:5] == ["efficacy", "latent_distance", "0", "[0,", "0]"], "unedited comes first"


def test_scores_become_ablations(tmp_path, monkeypatch, tiny_pipe):
    monkeypatch.chdir(tmp_path)
    options = {"parameters": "unet.mid.*", "num_inference_steps": 1, "progress": False}
    found = mediation.attribute(tiny_pipe, "ink style", **options)
    found.save("ink-scores.safetensors")
    result = run(*example("erase"))
    assert result.exit_code == 0, result.output
    edit = editing.load("no-ink.safetensors")
    made = editing.cad_erase(found, ratio=0.002, per="matrix")
    assert edit.metadata == made.metadata
    assert {name: update.indices.tolist() for name, update in edit.updates.items()} == {
        name: update.indices.tolist() for name, update in made.updates.items()
    }
    assert f"{made.report['n_changed']:,} of {made.report['n_weights']:,} weights set to 0" in result.output
    shown = run("show", "no-ink.safetensors").output
    assert all(f"changes {name}: {len(update.indices)} weight" in shown for name, update in edit.updates.items())
    mediation.attribute(tiny_pipe, "ink style", objective="amplify", **options).save("more-ink-scores.safetensors")
    result = run(*example("amplify"))
    assert result.exit_code == 0, result.output
    assert editing.load("more-ink.safetensors").metadata["method"] == "cad_amplify"
    mistaken = CliRunner().invoke(app, ["amplify", "ink-scores.safetensors"])
    assert mistaken.exit_code == 1
    assert "use editing.cad_erase" in mistaken.output


def weight(pipe):
    (site,) = mediation.sites(pipe, name="text_encoder.0.self_attention")
    return site.module(pipe).out_proj.weight.clone()


def applied_weight(pipe, edit):
    with edit.applied(pipe):
        return weight(pipe)


@pytest.fixture(scope="module")
def ink(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "ink.safetensors"
    editing.quickfix(mediation.load_pipeline(), {"ink": "noto"}, preserve=["cat"]).save(path)
    return path


def test_json_is_for_machines(ink, tmp_path):
    shown = json.loads(run("show", ink, "--json").output)
    assert shown["metadata"]["pairs"] == {"ink": "noto"}
    suite = editing.Suite([editing.Trial("a cat", "quality")])
    suite.save(tmp_path / "suite.json")
    options = ["--suite", tmp_path / "suite.json", "--steps", 1, "--output", tmp_path / "report", "--json"]
    rows = json.loads(run("evaluate", ink, *options).output)
    (row,) = [row for row in rows if (row["measure"], row["model"]) == ("latent_distance", "edited")]
    assert row["mean"] > 0
    assert row["low"] is None


def test_every_command_that_makes_something_of_an_edit_has_json(ink, tmp_path):
    made = tmp_path / "made.safetensors"
    for command, *arguments in (
        ["quickfix", "ink=noto", "--output", made],
        ["cross-attention", "ink=", "--output", made],
        ["export", ink, "--rank", 1, "--output", tmp_path / "lora.safetensors"],
        ["apply", ink, "--output", tmp_path / "folder"],
    ):
        found = json.loads(run(command, *arguments, "--json").output)
        assert found["output"] == str(arguments[-1])
        edit = editing.load({"export": ink, "apply": ink}.get(command, made))
        if command == "export":
            edit = edit.compress(1)
        assert (found["metadata"], found["report"]) == (edit.metadata, edit.report)


def test_a_list_of_labelled_prompts_is_read_by_the_pairs_of_the_edit(ink, tmp_path):
    """Of whatever the edit was made of, too; a file that tells roles needs no pairs."""
    (tmp_path / "list.csv").write_text("prompt,style\na cat in the style of ink,ink\na cat in the style of flat,flat\n")
    editing.load(ink).scaled(0.5).save(tmp_path / "half.safetensors")
    run("evaluate", tmp_path / "half.safetensors", "--suite", tmp_path / "list.csv", "--steps", 1, "--output", tmp_path)
    suite = editing.Suite.read(tmp_path / "suite.csv", pairs={"other": "words"})
    assert [(trial.role, trial.target_prompt, trial.target) for trial in suite] == [
        ("efficacy", "a cat in the style of noto", "noto"),
        ("specificity", "a cat in the style of flat", "flat"),
    ]
    refused = CliRunner().invoke(app, ["evaluate", str(ink), "--suite", str(tmp_path / "list.csv"), "--n", "3"])
    assert refused.exit_code == 1
    assert "leave one of them out" in " ".join(refused.output.split())


def test_pictures_of_other_pipelines_are_compared_with_texts_by_a_scorer(tmp_path):
    """Which is also the bundled one's, if it is given; the bundled probe judges no others."""
    pipe, prompt = tiny.stable_diffusion(), "a ink cat"
    pipe.save_pretrained(tmp_path / "pipe")
    editing.quickfix(pipe, {"ink": "noto"}).save(tmp_path / "edit.safetensors")
    editing.Suite([editing.Trial(prompt, "efficacy", "a noto cat")]).save(tmp_path / "suite.csv")
    scorer = bundled.pipeline_folder().parent / "clip"
    options = ["--pipeline", tmp_path / "pipe", "--suite", tmp_path / "suite.csv", "--steps", 1, "--scorer", scorer]
    found = run("evaluate", tmp_path / "edit.safetensors", *options, "--output", tmp_path / "report", "--json")
    means = {(row["measure"], row["model"]): row["mean"] for row in json.loads(found.output)}
    report = xarray.load_dataset(tmp_path / "report" / "report.nc", engine="scipy")
    generator = torch.Generator().manual_seed(report.noise_seed.item())
    image = pipe([prompt], num_inference_steps=1, generator=[generator], output_type="pt").images
    expected = bundled.load_scorer()(image, None, [mediation.Case(prompt, subject=prompt)])
    assert means["source_score", "unedited"] == pytest.approx(expected.item(), abs=1e-2)
    assert "is_source" not in report


def test_edits_are_added_scaled_and_compressed(ink, tmp_path):
    result = run("apply", ink, ink, "--scale", 0.25, "--output", tmp_path / "folder")
    assert result.exit_code == 0
    edit, pipe = editing.load(ink), mediation.load_pipeline()
    torch.testing.assert_close(
        weight(mediation.load_pipeline(tmp_path / "folder")), applied_weight(pipe, edit.scaled(0.5))
    )
    result = run("export", ink, "--rank", 1, "--output", tmp_path / "lora.safetensors")
    assert "compressed to rank 1: at most" in result.output
    assert only(editing.import_lora(tmp_path / "lora.safetensors", pipe).updates).rank == 1


def test_options_are_those_of_the_functions(tmp_path):
    options = ["--weight", "ink=2", "--weight", "cat=0.5", "--preserve", "cat", "--tokens", "subject", "--output"]
    run("quickfix", "ink=noto", *options, tmp_path / "a.safetensors")
    layers = ["--method", "loco", "--layer", "1", "--layer", "unet.mid.0.cross_attention"]
    run("cross-attention", "ink=noto", *layers, *options, tmp_path / "b.safetensors")
    pipe, same = mediation.load_pipeline(), {"weights": {"ink": 2.0, "cat": 0.5}, "preserve": ["cat"]}
    layers = [1, "unet.mid.0.cross_attention"]
    for name, made in (
        ("a", editing.quickfix(pipe, {"ink": "noto"}, tokens="subject", **same)),
        (
            "b",
            editing.cross_attention_edit(pipe, {"ink": "noto"}, method="loco", layers=layers, tokens="subject", **same),
        ),
    ):
        found = editing.load(tmp_path / f"{name}.safetensors")
        assert found.metadata == made.metadata
        assert found.metadata["weights"] == same["weights"]
        assert all(torch.equal(found.updates[key].dense(), update.dense()) for key, update in made.updates.items())


def test_pairs_and_lambdas_are_read():
    assert _pairs(["ink=noto", "a cat=", "x=y=z"]) == {"ink": "noto", "a cat": "", "x": "y=z"}
    assert (_lambda("0.5"), _lambda("auto"), _lambda("relative:0.1")) == (0.5, "auto", editing.Relative(0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickfix", "ink"], "expected \"source=target\", got 'ink'"),
        (["quickfix", "ink=noto", "ink=flat"], "the source 'ink' was given twice"),
        (["quickfix", "ink=noto", "--weight", "2"], 'expected one "concept=number" for each weight, got 2'),
        (["quickfix", "ink=noto", "--weight", "ink=much"], "the weight of 'ink' must be a number, got 'much'"),
        (["cross-attention", "ink=noto", "--layer", "unet.mid"], "no site 'unet.mid'"),
        (["quickfix", "ink=noto", "--regularization", "strong"], "or \"relative:0.1\"; got 'strong'"),
        (["quickfix", "ink=noto", "--site", "text_encoder.99.mlp"], "no site 'text_encoder.99.mlp'"),
        (["evaluate", "missing.safetensors", "--seed", "5000000000"], "end at 2147483647: no seed can be 5000000000"),
        (["show", "missing.safetensors"], "missing.safetensors"),
        (["show", "edit.pt"], "end in .safetensors"),
    ],
)
def test_mistakes_become_messages(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())
