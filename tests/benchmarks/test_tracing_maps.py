"""Maps are made once and for what they were asked; cases say what their attribute says they say."""

import dataclasses

import diffusers
import numpy
import pytest
import torch

from benchmarks.emoji import world
from benchmarks.reproduce import attributes, maps, tracing
from benchmarks.reproduce.attributions import variants
from benchmarks.speed.sweeps import counting
from mediation import Case, GaussianNoise, LatentDistance
from mediation.bundled import AttributeProbe
from mediation.mapfiles import open_map

CASES = (
    Case("a photo of a cat in ink style", subject="cat", corruption=GaussianNoise(draws=2)),
    Case("a red bird", subject="bird", corruption=GaussianNoise(draws=2)),  # nothing comes after it
)
TASK = maps.Task("object", "text", CASES, (LatentDistance(),), num_inference_steps=1, guidance_scale=4.0)


@pytest.mark.parametrize("network", maps.NETWORKS)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_the_cost_that_is_announced_is_the_cost(small_pipe, network, guidance_scale):
    task = dataclasses.replace(TASK, network=network, guidance_scale=guidance_scale)
    with counting(small_pipe) as counter:
        effects = task.run(small_pipe)
    assert counter["rows"] == task.row_evaluations(small_pipe)
    assert dict(effects.sizes)["site"] == {"denoiser": 29, "text": 4}[network]


@pytest.mark.parametrize("variant", [None, 0, 1])
def test_a_scheduler_that_iterates_more_often_than_it_steps_costs_more(small_pipe, monkeypatch, variant):
    scheduler = diffusers.PNDMScheduler.from_config(small_pipe.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(small_pipe, "scheduler", scheduler)
    task = dataclasses.replace(TASK, num_inference_steps=2)
    task = task if variant is None else variants.Variant.of(task, variant)
    with counting(small_pipe) as counter:
        task.run(small_pipe)
    n_back = 2 * (variant or 0) * 2 * 2 * len(CASES) * 3  # counts twice: halves, draws, cases, iterations
    assert counter["rows"] + n_back == task.row_evaluations(small_pipe)


def test_a_map_is_made_once(small_pipe, tmp_path):
    model = maps.fingerprint(small_pipe, [])
    assert maps.pending([TASK], tmp_path, model) == [TASK]
    maps.make(TASK, small_pipe, tmp_path, model)
    assert maps.pending([TASK], tmp_path, model) == []
    assert open_map(maps.map_path(TASK, tmp_path)).token.values.tolist() == list(maps.TOKENS)


@pytest.fixture(scope="module")
def made(small_pipe, tmp_path_factory):
    """A folder with the map of the task, and what made it."""
    folder, model = tmp_path_factory.mktemp("maps"), maps.fingerprint(small_pipe, [])
    maps.make(TASK, small_pipe, folder, model)
    return folder, model


@pytest.mark.parametrize(
    "change",
    [{"num_inference_steps": 2}, {"guidance_scale": 3.0}, {"cases": CASES[:1]}, {"metrics": (LatentDistance(),) * 2}],
)
def test_a_map_of_something_else_is_not_taken_for_it(made, change):
    folder, model = made
    with pytest.raises(ValueError, match="was made with another model, other cases or other settings"):
        maps.pending([dataclasses.replace(TASK, **change)], folder, model)


def test_what_is_interrupted_leaves_no_map(small_pipe, tmp_path, monkeypatch):
    def interrupted(effects, path):
        path.write_text("half a map")
        raise KeyboardInterrupt

    monkeypatch.setattr(maps, "save_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        maps.make(TASK, small_pipe, tmp_path, "")
    assert maps.pending([TASK], tmp_path, "") == [TASK]


def test_the_fingerprint_tells_weights_and_judges_apart(fresh_pipe):
    judge = torch.nn.Linear(1, 1)
    before = maps.fingerprint(fresh_pipe, [judge])
    assert maps.fingerprint(fresh_pipe, [judge]) == before
    with torch.no_grad():
        judge.bias += 1
    changed = maps.fingerprint(fresh_pipe, [judge])
    with torch.no_grad():
        fresh_pipe.vae.decoder.conv_out.bias[0] += 1
    assert len({before, changed, maps.fingerprint(fresh_pipe, [judge])}) == 3


@pytest.mark.parametrize("attribute", attributes.FACTORS)
def test_cases_state_their_attribute(attribute):
    cases = attributes.make_cases(attribute, 30, draws=3)
    assert len({case.prompt for case, _ in cases}) == len({case.seed for case, _ in cases}) == 30
    for case, label in cases:
        assert case.corruption == GaussianNoise(draws=3)
        words = {
            "object": (label, world.plural(label)) if attribute == "object" else (),
            "style": (label,),
            "color": (label,),
            "count": ({2: "two", 3: "three"}.get(label),),
            "viewpoint": {"close up": ("close up",), "distant": ("distant view", "seen from afar")}.get(label, ()),
            "pose": ("upside down",),
            "fact": tuple(name.removeprefix("the ") for name, thing in world.FACTS.items() if thing == label),
        }[attribute]
        assert case.subject in words
        assert label in world.FACTORS[attributes.FACTORS[attribute]]
        assert label not in ("white", 1, "plain", "upright")


def test_cases_are_the_same_every_time():
    assert attributes.make_cases("fact", 5, 1) == attributes.make_cases("fact", 6, 1)[:5]


@pytest.mark.parametrize(("attribute", "n"), [("mood", 1), ("style", 0), ("style", 1001)])
def test_impossible_cases_are_refused(attribute, n):
    with pytest.raises(ValueError, match=r"no attribute 'mood'|1 to 1000 cases"):
        attributes.make_cases(attribute, n, 1)


def test_the_stated_probability_is_the_probes_for_each_cases_label():
    probe = AttributeProbe({"count": [1, 2, 3]}).eval()
    labels = {Case("two cats", "two"): 2, Case("three cats", "three"): 3}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = attributes.StatedProbability(probe, "count", labels)(images, images, list(labels))
    with torch.no_grad():
        expected = probe(images)["count"].double().softmax(-1)
    numpy.testing.assert_allclose(found, [expected[0, 1], expected[1, 2]], rtol=1e-5)


def test_the_stated_probability_has_the_gradient_of_its_values():
    probe = AttributeProbe({"count": [1, 2, 3]}).eval().double()
    case = Case("two cats", "two")
    metric = attributes.StatedProbability(probe, "count", {case: 2})
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad(metric.score(images.requires_grad_(), None, [case]).sum(), images)
    images = images.detach()
    step = 1e-2 * gradient / gradient.norm()
    ahead, behind = (float(metric(images + sign * step, None, [case])[0]) for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.01)


@dataclasses.dataclass
class Brightness:
    """A metric that cannot be hashed."""

    name = "brightness"
    needs_images = False

    def __call__(self, images, latents, cases):
        return latents.mean((1, 2, 3))


def test_the_command_makes_what_is_missing(small_pipe, tmp_path, capsys):
    task = dataclasses.replace(TASK, metrics=(Brightness(),))
    tracing.make_maps(small_pipe, [task], tmp_path, "")
    said = capsys.readouterr().out
    assert said.startswith("0 of 1 maps are there\n")
    assert f"{task.row_evaluations(small_pipe):,} row-evaluations" in said
    tracing.make_maps(small_pipe, [task], tmp_path, "")
    assert capsys.readouterr().out == "1 of 1 maps are there\n"
