"""What would ignore or skip interventions is refused before any work, and found out if it was not known before."""

import types

import diffusers
import pytest
import torch

import mediation
from mediation import Case, LatentDistance
from tests import tiny

CASE = Case("a photo of a cat in ink style", subject="cat")
OPTIONS = {"metric": LatentDistance(), "num_inference_steps": 2, "progress": False}


@pytest.fixture
def own_pipe():
    return tiny.shallow()


def refused(pipe, monkeypatch, message):
    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(type(pipe), "encode_prompt", no_work)
    with pytest.raises(ValueError, match=message):
        mediation.trace(pipe, CASE, **OPTIONS)


def whole(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def in_place(pipe):
    pipe.text_encoder.compile(backend="eager")


def regional(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager")


def forward(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


@pytest.mark.parametrize(
    ("compiled", "where"),
    [
        (whole, "unet"),
        (in_place, "text_encoder"),
        (regional, r"unet\.mid_block\.attentions\.0\.transformer_blocks\.0"),
        (forward, "unet"),
    ],
)
def test_compiled_modules_are_refused(own_pipe, monkeypatch, compiled, where):
    compiled(own_pipe)
    refused(own_pipe, monkeypatch, rf"cannot be traced: {where} is compiled.*without torch\.compile")


def test_caches_of_diffusers_are_refused_until_they_are_disabled(own_pipe, monkeypatch):
    hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no caches")
    broadcast = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    hooks.apply_pyramid_attention_broadcast(own_pipe.unet, broadcast)
    with monkeypatch.context() as patch:
        refused(own_pipe, patch, r"unet\..*attn1 has the hook 'pyramid_attention_broadcast'.*disable_cache")
    registry = hooks.HookRegistry.check_if_exists_or_initialize(own_pipe.unet)
    registry.remove_hook("pyramid_attention_broadcast", recurse=True)
    mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)


@pytest.mark.parametrize("name", ["fbc_leader_block_hook", "faster_cache_block", "layerwise_casting"])
def test_hooks_in_the_registry_are_known_by_name(own_pipe, monkeypatch, name):
    own_pipe.unet.mid_block._diffusers_hook = types.SimpleNamespace(hooks={name: None}, get_hook=lambda name: None)
    if name == "layerwise_casting":
        mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)
    else:
        refused(own_pipe, monkeypatch, f"unet.mid_block has the hook '{name}'")


def test_forwards_of_caching_packages_are_refused(own_pipe, monkeypatch):
    original = own_pipe.unet.forward

    def wrapped_forward(*args, **kwargs):
        return original(*args, **kwargs)

    own_pipe.unet.forward = wrapped_forward
    mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)
    wrapped_forward.__module__ = "DeepCache.extension.deepcache"
    refused(own_pipe, monkeypatch, "unet is run by DeepCache, which reuses")


def test_an_unknown_cache_is_found_out_by_the_modules_that_it_skips(own_pipe):
    transformer = own_pipe.unet.mid_block.attentions[0]
    compute, answers = transformer.forward, []

    def reuse(*args, **kwargs):
        if not answers:
            answers.append(compute(*args, **kwargs))
        return answers[0]

    transformer.forward = reuse
    mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)
    answers.clear()
    for name in ("unet.mid.0.self_attention", "unet.mid.0.self_attention.head.0"):
        with pytest.raises(RuntimeError, match=rf"ran \d times while the unet ran 2 times.*{name} were skipped"):
            mediation.trace(own_pipe, CASE, sites=[name], **OPTIONS)


def test_whole_models_may_be_offloaded_and_single_layers_may_not(own_pipe, monkeypatch):
    """As accelerate's hook does, a stand-in for it tells the device and runs before the model does."""
    hook = types.SimpleNamespace(execution_device=torch.device("cpu"))
    own_pipe.unet._hf_hook = own_pipe.text_encoder._hf_hook = hook
    mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)
    own_pipe.unet.conv_in.to("meta")
    refused(own_pipe, monkeypatch, r"unet\.conv_in is offloaded layer by layer.*enable_model_cpu_offload")


# this scheduler of diffusers makes arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedulers_whose_noise_has_no_seed_are_refused(own_pipe, monkeypatch):
    """The one of diffusers needs torchsde to be imported; what is known of it is its name."""
    scheduler = type("DPMSolverSDEScheduler", (diffusers.DDIMScheduler,), {})
    for derived in (scheduler, type("Mine", (scheduler,), {})):
        own_pipe.scheduler = derived.from_config(own_pipe.scheduler.config)
        with monkeypatch.context() as patch:
            refused(own_pipe, patch, r"its DPMSolverSDEScheduler draws noise of its own.*DPMSolverMultistepScheduler\(")
    seeded = diffusers.DPMSolverMultistepScheduler.from_config(
        own_pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    own_pipe.scheduler = seeded
    effects = mediation.trace(own_pipe, CASE, sites=["unet.mid.0.resnet"], **OPTIONS)
    assert float(abs(effects.sham - effects.corrupted).max()) < 1e-4 * float(mediation.total_effect(effects).max())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 9}, "reads 9 channels and latents have 4: it needs an image"),
        ({"time_cond_proj_dim": 8}, "takes the guidance scale as an input"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter.*unload it"),
    ],
)
def test_sampling_that_needs_more_than_text_is_refused(own_pipe, monkeypatch, config, message):
    own_pipe.unet.register_to_config(**config)
    assert mediation.sites(own_pipe)
    refused(own_pipe, monkeypatch, message)
