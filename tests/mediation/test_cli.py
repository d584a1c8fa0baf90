"""The command line: every example in its help runs, and says what the functions return."""

import json
import re
import shlex

import numpy
import pytest
from typer.testing import CliRunner

import mediation
from mediation.cli import app
from mediation.mapfiles import open_map, save_map
from tests.maps import make_map

COMMANDS = ("sites", "trace", "plot", "compare")


@pytest.fixture
def run(monkeypatch, shallow_pipe, tmp_path):
    """Runs the command in an empty folder, with a tiny pipeline for the bundled one."""
    monkeypatch.setattr(mediation, "load_pipeline", lambda name=None, **options: shallow_pipe)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def example(run, command):
    """The example in a command's help, as its arguments."""
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(command, "--help").output).split())
    found = re.search(rf"Example: mediation ({command} .*?) (?:Arguments|Options)", text)
    return shlex.split(found.group(1))


def test_help_lists_the_commands(run):
    output = run("--help").output
    assert all(command in output for command in (*COMMANDS, "attribute", "demo"))


def test_every_example_runs(run, shallow_pipe):
    """In the order of the help, since later ones read what earlier ones wrote."""
    result = run(*example(run, "sites"))
    listed = [line.split()[0] for line in result.output.splitlines()]
    chosen = mediation.sites(shallow_pipe, network="unet", component="cross_attention")
    assert listed == [site.name for site in chosen]
    arguments = example(run, "trace")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    effects = open_map("ink.nc")
    case = mediation.Case("a cat in the style of ink", subject="ink")
    middle = mediation.sites(shallow_pipe, name="unet.mid.*")
    expected = mediation.trace(shallow_pipe, case, sites=middle, num_inference_steps=4, progress=False)
    assert effects.attrs == expected.attrs
    assert (effects.restored.values == expected.restored.values).all()
    table = result.output.splitlines()[4:]
    assert [line.split()[0] for line in table] == mediation.top_sites(effects, k=10)
    other = ["cat" if word == "ink" else word.replace("ink.nc", "cat.nc") for word in arguments]
    assert run(*other).exit_code == 0
    result = run(*example(run, "plot"))
    assert result.output == "saved ink.png\n"
    with open("ink.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    result = run(*example(run, "compare"))
    assert "5 places, 1 and 1 cases" in result.output
    estimate = mediation.compare(effects, open_map("cat.nc"), k=3).estimate
    assert [line.split()[:2] for line in result.output.splitlines()[2:]] == [
        [name, f"{value:.3g}"] for name, value in zip(estimate.statistic.values, estimate.values, strict=True)
    ]


def test_attributing_keeps_scores_and_their_sums(run, shallow_pipe):
    arguments = example(run, "attribute")
    result = run(*arguments, "--map", "scores.nc")
    assert result.exit_code == 0, result.output
    found = mediation.Attribution.load("ink-scores.safetensors")
    options = {"parameters": "unet.mid.*", "num_inference_steps": 4, "progress": False}
    expected = mediation.attribute(shallow_pipe, "ink style", **options)
    assert found.metadata == expected.metadata
    assert all((score == expected.scores[name]).all() for name, score in found.scores.items())
    effects = open_map("scores.nc")
    assert effects.identical(found.to_dataset())
    listed = [line.split()[0] for line in result.output.splitlines()[2:-1]]
    assert sorted(listed) == sorted(effects.site.values)
    told = json.loads(run(*arguments, "--objective", "amplify", "--json").output)
    assert told["value"] == mediation.Attribution.load("ink-scores.safetensors").metadata["value"] < 0
    assert {place["site"] for place in told["places"]} == set(listed)


def test_estimates_come_with_their_verification(run, shallow_pipe):
    case = ["--prompt", "a red cat", "--subject", "cat", "--sites", "unet.mid.*", "--steps", 2]
    options = [*case, "--backend", "attribution_patching", "--verify", 3]
    result = run("trace", *options, "--output", "map.nc")
    assert result.exit_code == 0, result.output
    effects = open_map("map.nc")
    assert effects.sizes["window"] == 2
    assert effects.attrs["backend"] == "attribution_patching"
    told = result.output.splitlines()[-4:]
    assert [line.split()[0] for line in told[1:]] == ["spearman", "bias", "recall"]
    told = json.loads(run("trace", *options, "--json").output)
    report = mediation.verification(effects, k=min(5, int(effects.exact.notnull().sum())))
    assert told["verification"][2]["estimate"] == float(report.estimate.sel(statistic="recall"))
    screened = ["--screen", 0.4, "--integrated", 2, "--output", "screened.nc"]
    assert run("trace", *case, *screened).exit_code == 0
    assert int(open_map("screened.nc").exact.notnull().sum()) == 2


def test_direct_effects_are_of_the_cross_attentions(run, shallow_pipe):
    case = ["--prompt", "a red cat", "--subject", "cat", "--corruption", "replace:dog", "--steps", 2]
    options = [*case, "--backend", "direct_effect", "--metric", "latent_distance"]
    result = run("trace", *options, "--output", "map.nc")
    assert result.exit_code == 0, result.output
    layers = [site.name for site in mediation.sites(shallow_pipe, network="unet", component="cross_attention")]
    effects = open_map("map.nc")
    assert effects.site.values.tolist() == layers
    expected = mediation.trace(
        shallow_pipe,
        mediation.Case("a red cat", subject="cat", corruption=mediation.ReplaceSubject("dog")),
        backend="direct_effect",
        metric=mediation.LatentDistance(),
        num_inference_steps=2,
        progress=False,
    )
    assert effects.attrs == expected.attrs
    assert (effects.restored.values == expected.restored.values).all()
    assert [line.split()[0] for line in result.output.splitlines()[4:]] == mediation.top_sites(effects, k=10)
    for wrong, message in (
        (["--branch", "both"], 'branch must be "cond"'),
        (["--screen", 0.5], "none of direct effects"),
    ):
        result = run("trace", *options, *wrong)
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())


def test_options_are_those_of_the_function(run, shallow_pipe):
    case = mediation.Case("a red cat", subject="cat", corruption=mediation.ZeroSubject(where="output"), seed=5)
    given = ["--prompt", case.prompt, "--subject", "cat", "--seed", 5, "--corruption", "zero", "--where", "output"]
    given += ["--sites", "unet.mid.0.self_attention.*", "--heads", "--windows", "0-0.5,0.5-1", "--branch", "both"]
    given += ["--batch-size", 5, "--metric", "image_mse", "--steps", 2, "--guidance-scale", 3, "--output", "map.nc"]
    result = run("trace", *given)
    assert result.exit_code == 0, result.output
    expected = mediation.trace(
        shallow_pipe,
        case,
        sites=mediation.sites(shallow_pipe, name="unet.mid.0.self_attention.*", heads=True),
        windows=[(0, 0.5), (0.5, 1)],
        branch="both",
        batch_size=5,
        metric=mediation.ImageMSE(),
        num_inference_steps=2,
        guidance_scale=3.0,
        progress=False,
    )
    found = open_map("map.nc")
    assert found.attrs == expected.attrs
    assert found.window.values.tolist() == ["0–0.5", "0.5–1"]
    assert found["head"].values.tolist() == list(range(found.sizes["site"]))
    assert (found.restored.values == expected.restored.values).all()
    assert float(abs(found.restored).max()) > 0


CAT = ["--prompt", "a red cat", "--subject", "cat", "--steps", 1, "--output", "map.nc"]


def test_whole_blocks_are_listed_and_traced(run, shallow_pipe):
    for options in (["--component", "block", "--layer", 2], ["--component", "block", "--block", "mid"]):
        listed = run("sites", "--network", "unet", *options).output
        assert listed.split()[0] == "unet.mid.block"
        assert len(listed.splitlines()) == 1
    assert run("trace", *CAT, "--sites", "unet.*.block").exit_code == 0
    blocks = [site.name for site in mediation.sites(shallow_pipe, network="unet", component="block")]
    assert open_map("map.nc").site.values.tolist() == blocks
    assert run("trace", *CAT, "--component", "block", "--sites", "text_encoder.*").exit_code == 0
    blocks = [site.name for site in mediation.sites(shallow_pipe, network="text_encoder", component="block")]
    assert open_map("map.nc").site.values.tolist() == blocks


def test_neighbours_are_restored_together(run, shallow_pipe):
    text = ["--sites", "text_encoder.*", "--component", "mlp", "--neighbours", 2]
    assert run("trace", *CAT, *text).exit_code == 0
    layers = mediation.sites(shallow_pipe, network="text_encoder", component="mlp")
    names = ["+".join(site.name for site in group) for group in mediation.neighbours(layers, 2)]
    assert open_map("map.nc").site.values.tolist() == names
    result = run("trace", *CAT, "--neighbours", 2)
    assert result.exit_code == 1
    assert "error: neighbours are of one network and component" in result.output


def test_several_metrics_are_told_one_by_one_and_drawn_by_choice(run, shallow_pipe):
    given = [*CAT, "--sites", "unet.mid.0.*", "--windows", "0-1"]
    result = run("trace", *given, "--metric", "image_mse", "--metric", "latent_distance")
    assert result.exit_code == 0, result.output
    effects = open_map("map.nc")
    assert effects.metric.values.tolist() == ["image_mse", "latent_distance"]
    assert [name for name in ("image_mse", "latent_distance") if f" on {name}, noise" in result.output] == [
        *effects.metric.values
    ]
    told = json.loads(run("trace", *given, "--metric", "image_mse", "--metric", "latent_distance", "--json").output)
    for record in told["metrics"]:
        summary = mediation.summarize(effects.sel(metric=record["metric"]))
        assert record["total"] == pytest.approx(float(summary.total))
        assert {place["site"] for place in record["places"]} == set(effects.site.values)
    result = run("plot", "map.nc")
    assert result.exit_code == 1
    assert "error: choose one metric" in result.output
    for chosen in (["--select", "metric=image_mse"], ["--select", "window=0-1", "--select", "metric=latent_distance"]):
        assert run("plot", "map.nc", *chosen, "--output", "map.png").output == "saved map.png\n"
        told = json.loads(run("compare", "map.nc", "map.nc", *chosen, "-k", 2, "--json").output)
        assert [row["estimate"] for row in told["statistics"]] == pytest.approx([1, 1, 1])


def test_prompts_come_one_per_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n\n a cat in ink style\n")
    given = ["--cases", "prompts.txt", "--subject", "cat", "--seed", 4, "--sites", "unet.mid.0.resnet", "--steps", 1]
    assert run("trace", *given, "--output", "map.nc").exit_code == 0
    effects = open_map("map.nc")
    assert effects.prompt.values.tolist() == ["a red cat", "a cat in ink style"]
    assert effects.seed.values.tolist() == [4, 5]
    assert "attribute" not in effects.coords


def test_a_device_and_a_dtype_are_those_of_the_pipeline(monkeypatch, shallow_pipe, tmp_path):
    monkeypatch.chdir(tmp_path)
    shallow_pipe.save_pretrained("tiny")
    given = ["--sites", "unet.mid.0.resnet", "--model", "tiny", "--device", "cpu", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, ["trace", *map(str, CAT), *given], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    effects = open_map("map.nc")
    assert (effects.attrs["dtype"], effects.attrs["device"]) == ("torch.bfloat16", "cpu")
    assert numpy.isfinite(effects.restored).all()


def test_a_file_of_cases_becomes_a_map_and_json(run, tmp_path):
    (tmp_path / "cases.csv").write_text(
        "prompt,subject,attribute,seed\na red cat,cat,object,1\na red cat,red,color,2\n"
    )
    options = ["--cases", "cases.csv", "--corruption", "replace:dog", "--sites", "text_encoder.0.*", "--steps", 1]
    result = run("trace", *options, "--tokens", "subject,eos", "--images", "--output", "map.nc", "--json")
    assert result.exit_code == 0, result.output
    effects = open_map("map.nc")
    assert effects.attribute.values.tolist() == ["object", "color"]
    assert effects.seed.values.tolist() == [1, 2]
    assert effects.restored_image.sizes["image_site"] == effects.sizes["site"] == 2
    told = json.loads(result.output)
    summary = mediation.summarize(effects)
    assert told["metric"] == "latent_distance"
    assert told["total"] == pytest.approx(float(summary.total))
    found = {(place["site"], place["token"]): place["mean"] for place in told["places"]}
    assert len(found) == 4
    for (site, token), mean in found.items():
        assert mean == pytest.approx(float(summary["mean"].sel(site=site, token=token)), rel=1e-6)


def test_json_of_sites_and_comparisons(run, tmp_path):
    names = [site["name"] for site in json.loads(run("sites", "--name", "unet.mid.*", "--json").output)]
    assert "unet.mid.0.resnet" in names
    save_map(make_map([[[1.0, 2.0, 3.0]]], prompts=["a cat"]), tmp_path / "a.nc")
    save_map(make_map([[[3.0, 2.0, 1.0]]], prompts=["a cat"]), tmp_path / "b.nc")
    told = json.loads(run("compare", "a.nc", "b.nc", "-k", 1, "--json").output)
    assert told["paired"] == 1
    assert [row["estimate"] for row in told["statistics"]] == pytest.approx([-1, -1, 0])
    assert told["statistics"][0]["low"] is None  # a single case has no interval
    assert "3 places, the same 1 case\n" in run("compare", "a.nc", "b.nc", "-k", 1).output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two maps, for commands that fail and so leave them as they are."""
    folder = tmp_path_factory.mktemp("maps")
    save_map(make_map([[[1.0, 2.0]]]), folder / "map.nc")
    save_map(make_map([[[[1.0, 2.0]]]], window=["0–0.5", "0.5–1"]), folder / "steps.nc")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "--component", "engine"], "error: no site has component='engine'"),
        (["trace", "--prompt", "a cat", "--subject", "dog"], "error: the subject 'dog' is not in the prompt"),
        (["trace", "--output", "map.txt"], "error: a map is kept in a .nc file"),
        (["trace", "--output", "nowhere/map.nc"], "error: there is no folder nowhere to keep map.nc in"),
        (
            ["trace", "--prompt", "a cat", "--subject", "cat", "--metric", "clip_score"],
            "error: clip_score needs a CLIP",
        ),
        (["trace", "--prompt", "a cat", "--subject", "cat", "--windows", "early"], "error: windows are fractions"),
        (["trace", "--prompt", "a cat", "--subject", "cat", "--heads", "--tokens", "eos"], "error: tokens restores"),
        (
            ["trace", "--prompt", "a cat", "--subject", "cat", "--images"],
            "error: images are kept in the map: name its file as --output",
        ),
        (
            ["trace", "--prompt", "a cat", "--subject", "cat", "--dtype", "int8"],
            "error: dtype must be float32, float16",
        ),
        (
            ["trace", "--prompt", "a cat", "--subject", "cat", "--device", "cuda:99"],
            "error: cannot run on the device 'cuda:99'",
        ),
        (
            ["trace", "--prompt", "a cat", "--subject", "cat", "--device", "moon"],
            "error: cannot run on the device 'moon'",
        ),
        (["trace"], "error: give either prompts with subjects, or a file"),
        (["trace", "--cases", "none.csv"], "No such file"),
        (["attribute", "ink", "--parameters", "engine"], "error: 'engine' matches no site"),
        (["attribute", "ink", "--output", "scores.nc"], "end in .safetensors"),
        (["attribute", "ink", "--output", "nowhere/scores.safetensors"], "error: there is no folder nowhere"),
        (["attribute", "ink", "--map", "sums.txt"], "error: a map is kept in a .nc file"),
        (["plot", "none.nc"], "error: there is no map at none.nc"),
        (["plot", "map.nc", "--kind", "pie"], "error: a map is drawn as map, bars or images, got 'pie'"),
        (["plot", "map.nc", "--by", "layer"], "error: only bars are grouped"),
        (["plot", "map.nc", "--kind", "images", "--normalize"], "error: images show no effect"),
        (["plot", "map.nc", "--select", "metric=image_mse"], "write dimension=label; there is nothing to choose of"),
        (["plot", "steps.nc", "--select", "window"], "write dimension=label; there is window to choose of"),
        (["plot", "steps.nc", "--select", "window=0-1"], "error: no window '0-1'; the map has 0–0.5, 0.5–1"),
        (["plot", "steps.nc", "--select", "site=unet.mid.0.resnet"], "error: cannot choose 'site="),
        (["compare", "map.nc", "map.nc", "--select", "token=eos"], "error: cannot choose 'token=eos'"),
        (["plot", "map.nc", "--kind", "images"], "error: this map keeps no images"),
        (["compare", "map.nc", "map.nc"], "error: k=5 needs at least 5 places"),
    ],
)
def test_mistakes_become_messages(run, monkeypatch, folder, arguments, message):
    monkeypatch.chdir(folder)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
