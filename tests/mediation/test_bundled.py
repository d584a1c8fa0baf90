"""Emoji Diffusion is what its card says."""

import configparser
import hashlib
import pathlib

import numpy
import pytest
import torch

import mediation
from benchmarks.emoji import train_sae, world
from mediation import bundled

pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


@pytest.fixture(scope="module")
def pipe():
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    options = {"num_inference_steps": 8, "guidance_scale": 4.0, "generator": generators} | options
    return pipe(prompts, output_type="pt", **options).images


def test_it_is_a_stable_diffusion_in_small(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert (pipe.scheduler.config.beta_schedule, pipe.scheduler.config.prediction_type) == ("scaled_linear", "epsilon")
    assert pipe.tokenizer.model_max_length == 32
    assert pipe.text_encoder.config.num_hidden_layers == 6
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert not any(module.training for module in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_some_subjects_take_several_tokens(pipe):
    n_tokens = [len(pipe.tokenizer.tokenize(name)) for name in world.OBJECTS]
    assert 1 in n_tokens
    assert sum(n > 1 for n in n_tokens) >= 5


def test_the_bundle_is_small():
    files = bundled.pipeline_folder().parent.rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) < 40e6


def test_the_autoencoder_is_small_and_in_the_package():
    package = pathlib.Path(bundled.__file__).parent
    files = {path for path in (package / "emoji" / "sae").rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 4e6
    setup = configparser.ConfigParser()
    setup.read(package.parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["mediation.bundled"].split()
    assert files <= {path for pattern in patterns for path in package.glob(pattern)}


def test_the_autoencoder_is_what_its_script_makes():
    sae = bundled.load_sae()
    settings, training = train_sae._SETTINGS, sae.metadata["training"]
    assert (sae.n_latents, sae.k, training["seed"]) == (settings["n_latents"], settings["k"], settings["seed"])
    assert sae.place == mediation.Place(settings["site"], settings["steps"])
    assert training["recipe"] == vars(mediation.Recipe(n_positions=train_sae.N_POSITIONS, batch_size=4096))
    prompts = train_sae.captions(train_sae.N_CAPTIONS, seed=0)
    assert training["source"]["prompts"] == hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    assert (training["source"]["num_inference_steps"], training["source"]["guidance_scale"]) == (25, 1.0)


def test_the_scorer_shares_the_pipelines_text_encoder(pipe):
    ids = pipe.tokenizer(["a cat in ink style"], return_tensors="pt").input_ids
    with torch.no_grad():
        ours = pipe.text_encoder(ids).last_hidden_state
        scorers = bundled.load_scorer().model.text_model(ids).last_hidden_state
    torch.testing.assert_close(ours, scorers)


def test_the_probe_reads_real_renders():
    images, captions = world.batch(numpy.random.default_rng(5), 100, "held_out")
    probe = bundled.load_probe()
    truth = world.labels([caption.scene for caption in captions])
    for factor in ("object", "style", "background", "count"):
        read = probe.probabilities((images + 1) / 2, factor).argmax(1)
        assert (read == truth[factor]).float().mean() > 0.95, factor


def test_the_probe_knows_its_factors():
    with pytest.raises(KeyError, match="the probe knows the factors"):
        bundled.load_probe().labels("mood")


def test_backgrounds_and_styles_are_drawn_as_said(pipe):
    backgrounds = ["red", "blue", "green", "yellow"]
    images = draw(pipe, [f"a rocket in ink style on a {color} background" for color in backgrounds])
    probe = bundled.load_probe()
    read = [probe.labels("background")[i] for i in probe.probabilities(images, "background").argmax(1)]
    assert read == backgrounds
    assert [probe.labels("style")[i] for i in probe.probabilities(images, "style").argmax(1)] == ["ink"] * 4


def test_corrupting_the_style_hurts_and_restoring_the_text_doors_heals(pipe):
    cross_attentions = mediation.sites(pipe, network="unet", component="cross_attention")
    case = mediation.Case("a cat in the style of ink", subject="ink", corruption=mediation.ReplaceSubject("noto"))
    effects = mediation.trace(
        pipe,
        case,
        sites=[cross_attentions, cross_attentions[0]],
        metric=[bundled.attribute_probability("style"), mediation.LatentDistance()],
        num_inference_steps=4,
        guidance_scale=4.0,
        progress=False,
    )
    shares = mediation.indirect_effect(effects, normalize=True).sel(case=0, draw=0)
    assert float(mediation.total_effect(effects).sel(metric="probability_of_style").item()) > 0.5
    assert shares[0].values == pytest.approx([1, 1], abs=1e-3)
    assert (shares[1] < 0.9).all(), "one of them alone does not"


def test_the_default_metric_is_clip_score_for_the_bundled_model_alone(pipe, tiny_pipe):
    assert mediation.metrics.default_metric(pipe).name == "clip_score"
    assert mediation.metrics.default_metric(tiny_pipe).name == "latent_distance"
