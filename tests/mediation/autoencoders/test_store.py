"""A store holds what is observed, and an interrupted one is completed."""

import diffusers
import numpy
import pytest
import torch

import mediation
from mediation import Place
from mediation.autoencoders import store
from mediation.autoencoders.observing import observe
from mediation.autoencoders.sources import choose_prompts
from mediation.parameters import digest
from mediation.sampling import Sampling

zarr = pytest.importorskip("zarr")
PROMPTS = ["a cat", "a dog", "a red bird"]
PLACES = [Place("unet.down.0.0", (1.0, 0.0)), Place("unet.mid.0", branch="uncond")]
OPTIONS = {"places": PLACES, "n_images": 5, "seed": 2, "num_inference_steps": 2, "guidance_scale": 4.0, "batch_size": 2}


def test_what_is_stored_is_what_is_observed(tiny_pipe, tmp_path):
    arrays = mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "a.zarr", progress=False, **OPTIONS)
    chosen, seeds = choose_prompts(3, 5, seed=2, stream=0)
    drawn = [PROMPTS[i] for i in chosen]
    observed = list(observe(tiny_pipe, drawn, seeds, PLACES, sampling=Sampling(2, 4.0), batch_size=2))
    for place in PLACES:
        expected = torch.cat([one.activations[place].flatten(0, -2) for one in observed])
        numpy.testing.assert_array_equal(arrays[place][:], expected)
    assert [arrays[place].shape for place in PLACES] == [(5 * 2 * 64, 8), (5, 16)]
    recipe = mediation.Recipe(n_positions=2000, batch_size=200)
    options = {"n_latents": 16, "k": 2, "recipe": recipe, "progress": False}
    sae = mediation.fit_sae(arrays[PLACES[0]], place=PLACES[0], **options)
    source = sae.metadata["training"]["source"]
    assert source["shape"] == [640, 8]
    said = {"n_images": 5, "n_prompts": 3, "seed": 2, "num_inference_steps": 2, "guidance_scale": 4.0}
    assert said.items() <= source["origin"].items()
    assert Place(**source["origin"]["place"]) == PLACES[0]
    assert source["origin"]["pipeline"]["class"] == "StableDiffusionPipeline"
    assert source["origin"]["weights"] == digest(tiny_pipe)
    sae.save_pretrained(tmp_path / "sae")
    assert mediation.SparseAutoencoder.from_pretrained(tmp_path / "sae").metadata == sae.metadata


@pytest.mark.parametrize("where", ["alone", "in a group"])
def test_of_other_arrays_nothing_is_said(tmp_path, where):
    if where == "alone":
        array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 2), dtype="float32")
    else:
        array = zarr.open_group(tmp_path / "a.zarr", mode="w").create_array("0", shape=(4, 2), dtype="float32")
    assert store.origin_of(array) == {}


def test_an_interrupted_store_is_completed(tiny_pipe, tmp_path, monkeypatch):
    whole = mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "whole.zarr", progress=False, **OPTIONS)
    write, n_written = store._write, []

    def fail(*arguments):
        if len(n_written) == 3:
            raise KeyboardInterrupt
        n_written.append(1)
        write(*arguments)

    monkeypatch.setattr(store, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "part.zarr", progress=False, **OPTIONS)
    monkeypatch.setattr(store, "_write", write)
    with pytest.raises(ValueError, match="no complete store"):
        mediation.open_activations(tmp_path / "part.zarr")
    part = mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "part.zarr", progress=False, **OPTIONS)
    for place in PLACES:
        numpy.testing.assert_array_equal(part[place][:], whole[place][:])
    with pytest.raises(ValueError, match=r"other arguments \(seed differ\)"):
        mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "part.zarr", **OPTIONS | {"seed": 3})


# diffusers' solver makes arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("changed", ["weights", "scheduler"])
def test_a_store_of_another_model_is_refused(fresh_pipe, tmp_path, changed):
    """Neither has a name that tells: one weight differs by its last bits, or the sampler has another setting."""
    options = OPTIONS | {"progress": False}
    before = mediation.collect_activations(fresh_pipe, PROMPTS, tmp_path / "a.zarr", **options)
    again = mediation.collect_activations(fresh_pipe, PROMPTS, tmp_path / "a.zarr", **options)
    numpy.testing.assert_array_equal(again[PLACES[0]][:], before[PLACES[0]][:])
    if changed == "weights":
        with torch.no_grad():
            fresh_pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] *= 1.001
    else:
        fresh_pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(fresh_pipe.scheduler.config)
    with pytest.raises(ValueError, match=rf"another pipeline, or with other arguments \({changed} differ\)"):
        mediation.collect_activations(fresh_pipe, PROMPTS, tmp_path / "a.zarr", **options)
    mediation.collect_activations(fresh_pipe, PROMPTS, tmp_path / "b.zarr", **options)


def of_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", ["array in a group", "attributes", "array", "files", "a file"])
def test_what_others_have_stored_is_left_alone(tiny_pipe, tmp_path, kind):
    path = tmp_path / "theirs"
    if kind == "array in a group":
        zarr.open_group(path, mode="w").create_array("0", shape=(3,), dtype="int32")
    elif kind == "attributes":
        zarr.open_group(path, mode="w").attrs["title"] = "theirs"
    elif kind == "array":
        zarr.create_array(path, shape=(3,), dtype="int32")
    elif kind == "files":
        path.mkdir()
        (path / "notes.txt").write_text("theirs")
    else:
        path.write_text("theirs")
    before = of_files(tmp_path)
    with pytest.raises(ValueError, match="something else than collected activations"):
        mediation.collect_activations(tiny_pipe, PROMPTS, path, progress=False, **OPTIONS)
    assert of_files(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "group"])
def test_what_is_empty_is_filled(tiny_pipe, tmp_path, kind):
    path = tmp_path / "empty"
    path.mkdir()
    if kind == "group":
        zarr.open_group(path, mode="w")
    arrays = mediation.collect_activations(tiny_pipe, PROMPTS, path, progress=False, **OPTIONS)
    assert arrays[PLACES[1]].shape == (5, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"n_images": 0}, "at least 1"), ({"places": []}, "at least one place"), ({"places": PLACES * 2}, "each once")],
)
def test_what_cannot_be_collected_is_an_error_and_leaves_nothing(tiny_pipe, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        mediation.collect_activations(tiny_pipe, PROMPTS, tmp_path / "a.zarr", **OPTIONS | wrong)
    assert not (tmp_path / "a.zarr").exists()
