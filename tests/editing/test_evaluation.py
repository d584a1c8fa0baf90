"""Evaluation on a tiny pipeline: whose pictures are judged, by what, and against what."""

import copy
import importlib.metadata
import json

import numpy
import pytest
import torch
import xarray

import editing
import mediation
from editing import evaluation
from editing.suites import Suite, Trial
from mediation.metrics import ClassProbability
from tests import tiny

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 3.0}
TRIALS = (
    Trial("a ink cat", "efficacy", "a noto cat", "style", "dark", "light"),
    Trial("ink", "generality", "", "style", "dark"),  # erased: whatever takes its place
    Trial("a dog", "specificity", factor="object", source="7"),
    Trial("the red bird", "quality"),
)


def brightness(images):
    """Logits of dark and light."""
    mean = images.mean((1, 2, 3)) - 0.5
    return torch.stack([-mean, mean], dim=1)


CLASSIFIERS = {
    "style": ClassProbability(brightness, ["dark", "light"]),
    "object": ClassProbability(lambda images: torch.tensor([[0.0, 1.0]]).expand(len(images), 2), [3, 7]),
}


class Scorer:
    """Scores that tell which picture was compared with which text."""

    def __call__(self, images, latents, cases):
        return images.mean((1, 2, 3)).double().numpy() + [len(case.prompt) for case in cases]


@pytest.fixture(scope="module")
def edits(tiny_pipe):
    strong = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"}, regularization=1e-3)
    return {"one": strong, "two": strong.scaled(3.0)}


@pytest.fixture(scope="module")
def report(tiny_pipe, edits):
    options = {"classifiers": CLASSIFIERS, "scorer": Scorer(), "keep_images": True, "batch_size": 3} | SAMPLING
    return editing.evaluate(tiny_pipe, edits, TRIALS, seeds=[5, 9], progress=False, **options)


def draw(pipe, prompt, seed, output_type="pt"):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type=output_type, **SAMPLING).images[0]


def test_every_picture_is_the_pipelines_own(tiny_pipe, edits, report):
    assert report.images.dims == ("trial", "seed", "model", "y", "x", "channel")
    assert report.model.values.tolist() == ["unedited", "one", "two"]
    assert len(set(report.noise_seed.values.ravel().tolist())) == 8, "noise of its own for each trial and seed"
    for i, trial in enumerate(TRIALS[:2]):
        for seed in (5, 9):
            cell = report.isel(trial=i).sel(seed=seed)
            noise_seed = int(cell.noise_seed)
            expected = [draw(tiny_pipe, trial.prompt, noise_seed)]
            for edit in edits.values():
                with edit.applied(tiny_pipe):
                    expected.append(draw(tiny_pipe, trial.prompt, noise_seed))
            found = cell.images.values / 255
            numpy.testing.assert_allclose(found, torch.stack(expected).permute(0, 2, 3, 1), atol=0.5 / 255 + 1e-4)
            assert numpy.abs(found[0] - found[1]).max() > 0.02, "the edit is to be seen"


def test_the_latent_distance_is_from_the_unedited_picture(tiny_pipe, edits, report):
    assert (report.latent_distance.sel(model="unedited") == 0).all()
    noise_seed = int(report.noise_seed.isel(trial=1).sel(seed=9))
    plain = draw(tiny_pipe, "ink", noise_seed, "latent")
    with edits["two"].applied(tiny_pipe):
        edited = draw(tiny_pipe, "ink", noise_seed, "latent")
    expected = float((edited - plain).double().square().mean().sqrt())
    assert float(report.latent_distance.isel(trial=1).sel(seed=9, model="two")) == pytest.approx(expected, rel=1e-3)


class SquaredDistance:
    """Stands for `mediation.LPIPS`, which needs weights from elsewhere."""

    def distance(self, images, others):
        return (images - others).square().mean((1, 2, 3))


def test_lpips_is_measured_between_each_picture_and_its_unedited_one(tiny_pipe, edits, report):
    found = again(tiny_pipe, edits, report, lpips=SquaredDistance())
    pixels = report.images.astype(float) / 255
    expected = ((pixels - pixels.sel(model="unedited")) ** 2).mean(("y", "x", "channel"))
    numpy.testing.assert_allclose(found.lpips.transpose(*expected.dims), expected, rtol=1e-4)
    assert (found.lpips.sel(model="two") > 0).all()
    assert "images" not in found, "pictures are dropped unless they are to be kept"
    summary = editing.summarize_evaluation(found, n_resamples=10)
    mean = expected.sel(trial=report.role == "quality", model="two").mean()
    assert float(summary["mean"].sel(measure="lpips", role="quality", model="two")) == pytest.approx(float(mean))


def test_labels_are_compared_with_source_and_target(report):
    light = report.images.isel(trial=[0, 1]).values.mean((-1, -2, -3)) > 127.5
    expected = numpy.where(light, "light", "dark")
    assert (report.label.isel(trial=[0, 1]).values == expected).all()
    assert (report.is_source.isel(trial=[0, 1]).values == (expected == "dark")).all()
    assert (report.is_target.isel(trial=0).values == (expected[0] == "light")).all()
    assert report.is_target.isel(trial=1).isnull().all(), "an erased concept has no target"
    assert (report.is_source.isel(trial=2) == 1).all(), "labels may be numbers"
    assert (report.is_target.isel(trial=2) == 1).all()
    assert report.is_source.isel(trial=3).isnull().all(), "nothing is classified"


def test_scores_are_with_the_prompt_and_with_the_target_prompt(report):
    mean = report.images.astype(float).mean(("y", "x", "channel")) / 255
    lengths = xarray.DataArray([len(trial.prompt) for trial in TRIALS], dims="trial")
    numpy.testing.assert_allclose(report.source_score, mean + lengths, atol=3e-3)
    numpy.testing.assert_allclose((report.target_score - report.source_score).isel(trial=0), 1.0, atol=1e-6)
    numpy.testing.assert_allclose((report.target_score - report.source_score).isel(trial=2), 0.0, atol=1e-6)


def test_the_report_tells_how_it_was_made(report, tmp_path):
    assert report.attrs["num_inference_steps"] == 2
    assert report.attrs["scheduler"] == "DDIMScheduler"
    assert json.loads(report.attrs["edits"])["two"]["factor"] == 3.0
    assert json.loads(report.attrs["provenance"])["versions"]["torch"] == importlib.metadata.version("torch")
    assert report.prompt.values.tolist() == [trial.prompt for trial in TRIALS]
    numbers = report.drop_vars("images")  # netCDF 3 has no bytes without a sign
    numbers.to_netcdf(tmp_path / "report.nc", engine="scipy")
    again = xarray.load_dataset(tmp_path / "report.nc", engine="scipy")
    assert set(again.data_vars) == set(numbers.data_vars)
    for name in numbers.data_vars:
        numpy.testing.assert_array_equal(again[name].values.astype(numbers[name].dtype), numbers[name].values)
    assert again.attrs["edits"] == report.attrs["edits"]


def again(pipe, edits, unedited, **changes):
    options = {"classifiers": CLASSIFIERS, "scorer": Scorer(), "batch_size": 3, "progress": False} | SAMPLING
    options |= {"suite": TRIALS, "seeds": [5, 9], "unedited": unedited} | changes
    return editing.evaluate(pipe, edits, **options)


@pytest.mark.parametrize("keep_images", [False, True])
def test_unedited_pictures_are_not_drawn_twice(tiny_pipe, edits, report, tmp_path, monkeypatch, keep_images):
    """What is taken over, from a file too, is what drawing again would give."""
    plain = report.sel(model=["unedited"])
    plain.images.encoding = {"dtype": "int16"}
    plain.to_netcdf(tmp_path / "plain.nc", engine="scipy")
    drawn = []
    draw_all = evaluation._draw
    monkeypatch.setattr(
        evaluation, "_draw", lambda pipe, jobs, *rest: drawn.append(len(jobs)) or draw_all(pipe, jobs, *rest)
    )
    for earlier in (report, xarray.load_dataset(tmp_path / "plain.nc", engine="scipy")):
        found = again(tiny_pipe, {"two": edits["two"]}, earlier, keep_images=keep_images)
        expected = report.sel(model=["unedited", "two"])
        assert set(expected.data_vars) - set(found.data_vars) == (set() if keep_images else {"images", "latents"})
        for name in found.data_vars:
            numpy.testing.assert_array_equal(found[name].values, expected[name].values)
        assert found.label.dtype.kind == "U"
        assert (found.latent_distance.sel(model="two") > 0).all()
    assert drawn == [8, 8], "four trials and two seeds, of one model, for each report"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": TRIALS[::-1]}, "other pictures: it differs in prompt, role"),
        ({"seeds": [5, 7]}, "differs in seed"),
        ({"num_inference_steps": 1}, "differs in num_inference_steps"),
    ],
)
def test_unedited_pictures_of_something_else_are_refused(tiny_pipe, edits, report, changes, message, monkeypatch):
    monkeypatch.setattr(tiny_pipe.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    with pytest.raises(ValueError, match=message):
        again(tiny_pipe, edits["one"], report, **changes)
    with pytest.raises(ValueError, match="has no latents: make it with keep_images"):
        again(tiny_pipe, edits["one"], report.drop_vars(["latents", "images"]))
    with pytest.raises(ValueError, match="has no target_score"):
        again(tiny_pipe, edits["one"], report.drop_vars("target_score"))


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae"])
def test_unedited_pictures_of_other_weights_are_refused(fresh_pipe, edits, report, monkeypatch, network):
    parameter = list(getattr(fresh_pipe, network).parameters())[-1]
    with torch.no_grad():
        parameter[-1] = torch.nextafter(parameter[-1], torch.tensor(torch.inf))
    monkeypatch.setattr(fresh_pipe.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    with pytest.raises(ValueError, match="of other pictures: it differs in weights"):
        again(fresh_pipe, edits["one"], report)


class OtherScorer(Scorer):
    pass


class ScaledScorer(Scorer):
    def __init__(self, scale):
        self.scale = scale


class NetworkScorer(Scorer):
    def __init__(self, weight):
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.model.weight, weight)
        torch.nn.init.zeros_(self.model.bias)


def darkness(images):
    return brightness(images).flip(1)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("scorer", Scorer(), OtherScorer()),
        ("scorer", ScaledScorer(1), ScaledScorer(2)),
        ("scorer", NetworkScorer(1.0), NetworkScorer(1.001)),
        ("classifiers", CLASSIFIERS, CLASSIFIERS | {"style": ClassProbability(darkness, ["dark", "light"])}),
        ("classifiers", CLASSIFIERS, CLASSIFIERS | {"style": ClassProbability(brightness, ["light", "dark"])}),
    ],
)
def test_what_others_said_of_unedited_pictures_is_refused(tiny_pipe, edits, monkeypatch, name, first, second):
    options = {"keep_images": True, "num_inference_steps": 1, "progress": False}
    made = editing.evaluate(tiny_pipe, edits["one"], TRIALS, **options, **{name: first})
    monkeypatch.setattr(evaluation, "_draw", lambda *_: pytest.fail("pictures were drawn"))
    with pytest.raises(ValueError, match=f"`unedited` was judged by others: it differs in {name}; make it again"):
        editing.evaluate(tiny_pipe, edits["one"], TRIALS, **options, **{name: second}, unedited=made)
    monkeypatch.undo()
    again = {name: copy.deepcopy(first)}
    editing.evaluate(tiny_pipe, edits["one"], TRIALS, **options, **again, unedited=made)


def test_a_report_may_know_more_of_unedited_pictures_than_is_asked(tiny_pipe, edits, report):
    found = again(tiny_pipe, edits["one"], report, scorer=None)
    assert "source_score" in report
    assert "source_score" not in found
    assert found.model.values.tolist() == ["unedited", "edited"]


def test_one_edit_needs_no_name_and_no_judge(tiny_pipe, edits):
    before = {name: value.clone() for name, value in tiny_pipe.unet.state_dict().items()}
    report = editing.evaluate(tiny_pipe, edits["one"], Suite(TRIALS[:1]), num_inference_steps=1)
    assert report.model.values.tolist() == ["unedited", "edited"]
    assert list(report.data_vars) == ["latent_distance"]
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipe.unet.state_dict().items())


def test_the_bundled_pipeline_brings_its_judges():
    pipe = mediation.load_pipeline()
    suite = editing.emoji_suite({"ink": "noto"}, n=1)
    edit = editing.quickfix(pipe, {"ink": "noto"})
    report = editing.evaluate(pipe, edit, suite, num_inference_steps=1)
    assert {"is_source", "is_target", "source_score", "target_score"} <= set(report.data_vars)
    assert set(report.label.values.ravel()) <= {label for f in ("style", "object") for label in labels(f)}


def labels(factor):
    return mediation.bundled.load_probe().labels(factor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"classifiers": {"style": CLASSIFIERS["style"]}},
            "no classifier was given for the factor 'object' of 'a dog'",
        ),
        (
            {"classifiers": CLASSIFIERS | {"object": CLASSIFIERS["style"]}},
            r"classifier of object has no label '7'; it knows \['dark', 'light'\]",
        ),
        ({"edit": {}}, "name at least one edit"),
        ({"edit": {"unedited": None}}, "none 'unedited'"),
        ({"suite": []}, "at least one trial"),
        ({"seeds": []}, r"integers from 0 up, at least one and each once; got \[\]"),
        ({"seeds": [3, 4, 3]}, "each once"),
        ({"seeds": [-1]}, "from 0 up"),
        ({"seeds": 0.5}, "seeds are integers"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(tiny_pipe, edits, arguments, message, monkeypatch):
    monkeypatch.setattr(tiny_pipe.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    options = {"pipe": tiny_pipe, "edit": edits["one"], "suite": TRIALS} | arguments
    with pytest.raises(ValueError, match=message):
        editing.evaluate(**options)


def test_every_edit_is_tried_before_anything_is_drawn(fresh_pipe, edits, monkeypatch):
    monkeypatch.setattr(fresh_pipe.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    other = editing.quickfix(tiny.stable_diffusion(seed=1), {"ink": "noto"})
    before = {name: value.clone() for name, value in fresh_pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match="made for another base model"):
        editing.evaluate(fresh_pipe, edits | {"other": other}, TRIALS)
    assert all(torch.equal(value, before[name]) for name, value in fresh_pipe.unet.state_dict().items())
    with edits["two"].applied(fresh_pipe), pytest.raises(RuntimeError, match="already applied"):
        editing.evaluate(fresh_pipe, edits, TRIALS)
