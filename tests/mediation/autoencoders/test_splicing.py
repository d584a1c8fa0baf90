"""Changed latents change a run by exactly what they add, and unchanged ones by no bit."""

import itertools
import json

import diffusers
import numpy
import pytest
import torch

import mediation
from mediation import LatentDistance, Place, ReplaceSubject, SparseAutoencoder
from mediation.autoencoders.mediating import LATENT_MODES
from mediation.autoencoders.splicing import spliced
from mediation.mapfiles import open_map, save_map
from tests.runs import alone, hooks_of, rms

SITE = "unet.down.0.0"
CASE = mediation.Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("strawberry"), seed=3)
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


@pytest.fixture(scope="module")
def sae():
    sae = SparseAutoencoder(8, 24, 4, place=Place(SITE)).requires_grad_(False)
    sae.bias.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(0)))
    sae.scale.fill_(1.5)
    return sae


def block(pipe):
    return pipe.unet.down_blocks[0].attentions[0]


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
@pytest.mark.parametrize("edit", [lambda z, x, moment: z, lambda z, x, moment: z.clone()], ids=["same", "copy"])
def test_changing_nothing_changes_no_bit(tiny_pipe, sae, edit, branch):
    hooks, expected = hooks_of(tiny_pipe), alone(tiny_pipe, "a cat")
    with spliced(tiny_pipe, sae, edit, branch=branch):
        assert torch.equal(alone(tiny_pipe, "a cat"), expected)
    assert hooks_of(tiny_pipe) == hooks


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_the_output_moves_by_the_difference_of_reconstructions(tiny_pipe, sae, branch):
    calls = []
    handle = block(tiny_pipe).register_forward_hook(lambda module, given, output: calls.append((given[0], output[0])))
    try:
        alone(tiny_pipe, "a cat", num_inference_steps=1)
        with spliced(tiny_pipe, sae, lambda z, x, moment: 3 * z, branch=branch):
            alone(tiny_pipe, "a cat", num_inference_steps=1)
    finally:
        handle.remove()
    (given, before), (same, after) = calls
    assert torch.equal(given, same)
    z = sae.encode((before - given).permute(0, 2, 3, 1))
    expected = (sae.decode(3 * z) - sae.decode(z)).permute(0, 3, 1, 2)
    for number, half in enumerate(("uncond", "cond")):
        moved = after[number] - before[number]
        if branch in (half, "both"):
            torch.testing.assert_close(moved, expected[number], rtol=1e-4, atol=1e-4)
            assert moved.abs().max() > 0.1
        else:
            assert not moved.any()


def test_only_steps_of_the_stage_are_changed(tiny_pipe, sae):
    def latents_by_step(run):
        seen = []
        run(lambda pipe, index, timestep, tensors: seen.append(tensors["latents"].clone()) or tensors)
        return seen

    def run(callback):
        alone(tiny_pipe, "a cat", callback_on_step_end=callback)

    plain = latents_by_step(run)
    for stage, changed in (((0.6, 1.0), 0), ((0.2, 0.6), 1), ((0.0, 0.2), 2)):
        with spliced(tiny_pipe, sae, lambda z, x, moment: 0 * z, stage=stage):
            found = latents_by_step(run)
        assert [torch.equal(a, b) for a, b in zip(plain, found, strict=True)] == [i < changed for i in range(3)]


def test_an_outer_context_reads_what_an_inner_one_left(tiny_pipe, sae):
    seen = []

    def see(z, x, moment):
        seen.append(x.clone())
        return z

    def double(z, x, moment):
        return 2 * z

    for outer, inner in ((see, double), (double, see)):
        with spliced(tiny_pipe, sae, outer), spliced(tiny_pipe, sae, inner):
            alone(tiny_pipe, "a cat", num_inference_steps=1)
    changed, plain = seen
    latents = sae.encode(plain)
    torch.testing.assert_close(changed, plain + sae.difference(2 * latents, latents), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=0.1)


def by_hand(pipe, sae, latent, mode, *, calls=None, steps=2):
    """The clean, the corrupted and the changed run by a hook that knows nothing of the package's, in some calls."""
    n_calls = itertools.count()
    own, other = CASE.prompt, CASE.corrupted_prompt
    changed = own if mode != "restore" else other

    def hook(module, given, output):
        if next(n_calls) not in (calls or range(99)):
            return output
        z = sae.encode((output[0] - given[0]).permute(0, 2, 3, 1))
        # conditional rows: 3 clean, 4 corrupted, 5 changed
        value = {"restore": z[3, ..., latent], "knock_out": z[4, ..., latent], "ablate": 0}[mode]
        added = (value - z[5, ..., latent])[..., None] * sae.decoder[latent] * sae.scale
        result = output[0].clone()
        result[5] += added.permute(2, 0, 1)
        return (result,)

    handle = block(pipe).register_forward_hook(hook)
    try:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(CASE.seed)).expand(3, -1, -1, -1)
        options = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent"}
        return pipe([own, other, changed], latents=noise, **options).images
    finally:
        handle.remove()


def most_active(pipe, sae):
    """The latent that is largest in the clean run: random weights differ between versions of diffusers."""
    added = []
    handle = block(pipe).register_forward_hook(lambda module, given, output: added.append(output[0] - given[0]))
    try:
        alone(pipe, CASE.prompt)
    finally:
        handle.remove()
    return int(sae.encode(torch.cat(added).permute(0, 2, 3, 1)).mean((0, 1, 2)).argmax())


@pytest.mark.parametrize("mode", LATENT_MODES)
def test_a_map_of_latents_is_what_hooks_make_by_hand(tiny_pipe, sae, mode):
    hooks = hooks_of(tiny_pipe)
    effects = mediation.trace_latents(
        tiny_pipe, sae, CASE, latents=[2, 7, 11], mode=mode, metric=LatentDistance(), **FAST
    )
    assert effects.restored.dims == ("case", "draw", "site", "latent")
    assert effects.latent.values.tolist() == [2, 7, 11]
    assert effects.site.values.tolist() == [f"{SITE}.transformer"]
    moved = []
    for latent in (2, 7, 11):
        rows = by_hand(tiny_pipe, sae, latent, mode)
        untouched = rows[1] if mode == "restore" else rows[0]
        moved.append(rms(rows[2], untouched))
        found = float(effects.restored.sel(latent=latent).squeeze())
        assert -found == pytest.approx(rms(rows[2], rows[0]), rel=1e-3, abs=1e-5)
    assert max(moved) > 1e-3
    assert hooks_of(tiny_pipe) == hooks


# diffusers' Heun scheduler makes arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "n_calls", "calls"),
    [
        (diffusers.HeunDiscreteScheduler, 5, {2}),
        (diffusers.PNDMScheduler, 4, {1, 2}),
        (diffusers.DDIMScheduler, 3, {1}),
    ],
)
def test_windows_are_those_of_other_maps_whatever_the_scheduler_repeats(
    tiny_pipe, sae, monkeypatch, scheduler, n_calls, calls
):
    """Heun and PNDM call the denoiser twice at a timestep; windows count calls, as in `mediation.trace`."""
    config = {**tiny_pipe.scheduler.config, "skip_prk_steps": True}
    monkeypatch.setattr(tiny_pipe, "scheduler", scheduler.from_config(config))
    window = (min(calls) / n_calls, (max(calls) + 1) / n_calls)
    options = {"metric": LatentDistance(), "windows": [window], **FAST, "num_inference_steps": 3}
    latent = most_active(tiny_pipe, sae)
    effects = mediation.trace_latents(tiny_pipe, sae, CASE, latents=[latent], mode="ablate", **options)
    assert len(tiny_pipe.scheduler.timesteps) == n_calls
    rows = by_hand(tiny_pipe, sae, latent, "ablate", calls=calls, steps=3)
    assert rms(rows[2], rows[0]) > 1e-4
    assert -float(effects.restored.squeeze()) == pytest.approx(rms(rows[2], rows[0]), rel=1e-3)
    for one in sorted({min(calls) - 1, max(calls) + 1} & set(range(n_calls))):
        others = by_hand(tiny_pipe, sae, latent, "ablate", calls=calls | {one}, steps=3)
        assert rms(others[2], others[0]) != pytest.approx(rms(rows[2], rows[0]), rel=1e-3), "each call counts"


def test_maps_of_latents_are_maps(tiny_pipe, sae, tmp_path):
    options = {"latents": [2, 7], "metric": LatentDistance(), **FAST}
    whole = mediation.trace_latents(tiny_pipe, sae, CASE, **options)
    by_step = mediation.trace_latents(tiny_pipe, sae, CASE, windows="each", **options)
    assert by_step.restored.dims == ("case", "draw", "site", "latent", "window")
    mediation.summarize(by_step)
    assert mediation.top_latents(whole, k=1) == [2 if numpy.argmax(mediation.indirect_effect(whole).values) == 0 else 7]
    mediation.compare(whole, whole, k=1)
    ax = mediation.plot_effects(whole)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "7"]
    save_map(whole, tmp_path / "map.nc")
    again = open_map(tmp_path / "map.nc")
    assert again.latent.values.tolist() == [2, 7]
    assert json.loads(again.autoencoder) == sae.config
    assert again.autoencoder_fingerprint == sae.fingerprint, "of two that were made alike, which one"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latents": []}, "different integers"),
        ({"latents": [24]}, "from 0 to 23"),
        ({"latents": [1, 1]}, "different integers"),
        ({"mode": "swap"}, "must be one of restore"),
        ({"branch": "none"}, "branch must be"),
    ],
)
def test_maps_that_cannot_be_made_are_errors(tiny_pipe, sae, wrong, message):
    with pytest.raises(ValueError, match=message):
        mediation.trace_latents(tiny_pipe, sae, CASE, **FAST, **wrong)


def test_latents_are_named_by_integers_and_not_by_what_is_close(tiny_pipe, sae):
    with pytest.raises(TypeError, match=r"named by integers, from 0 to 23, got \[1\.7\]"):
        mediation.trace_latents(tiny_pipe, sae, CASE, latents=[1.7], **FAST)
    for same in ([3, 5], (3, 5), numpy.array([3, 5]), torch.tensor([3, 5]), range(3, 6, 2)):
        found = sae.check_latents(same)
        assert (found, {type(latent) for latent in found}) == ([3, 5], {int})


def test_autoencoders_that_do_not_fit_are_errors(tiny_pipe, sae):
    with (
        pytest.raises(ValueError, match="does not know its place"),
        spliced(tiny_pipe, SparseAutoencoder(8, 24, 4), None),
    ):
        pass
    wide = SparseAutoencoder(9, 24, 4, place=Place(SITE))
    with pytest.raises(ValueError, match="9 features"), spliced(tiny_pipe, wide, lambda z, x, moment: z):
        alone(tiny_pipe, "a cat")
    with (
        pytest.raises(ValueError, match="no uncond branch"),
        spliced(tiny_pipe, sae, lambda z, x, moment: z, branch="uncond"),
    ):
        alone(tiny_pipe, "a cat", guidance_scale=1.0)
    with pytest.raises(ValueError, match="0 <= start < stop <= 1"), spliced(tiny_pipe, sae, None, stage=(1.0, 0.6)):
        pass
