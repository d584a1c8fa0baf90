"""Direct effects of text against runs in which a layer is given another prompt by hand."""

import contextlib

import numpy
import pytest
import torch

import editing
import mediation
from mediation import Case, LatentDistance, ReplaceSubject, textlayers
from mediation.direct import text_layers
from mediation.pipelines import family_of
from tests.runs import hooks_of

CASE = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("strawberry"), seed=3)
FAST = {"metric": LatentDistance(), "num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


@contextlib.contextmanager
def reading(pipe, layers, prompt):
    """Gives some cross-attentions another prompt's states in the conditional half."""
    with torch.no_grad():
        states = family_of(pipe).encode(pipe, [prompt])["prompt_embeds"]

    def swap(module, arguments, options):
        read = options["encoder_hidden_states"]
        return arguments, options | {"encoder_hidden_states": torch.cat([read[:1], states])}

    handles = [layer.module(pipe).register_forward_pre_hook(swap, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(pipe, prompt):
    noise = torch.randn(1, *family_of(pipe).latent_shape(pipe), generator=torch.Generator().manual_seed(CASE.seed))
    return pipe(prompt, latents=noise, num_inference_steps=2, guidance_scale=4.0, output_type="latent").images


@pytest.mark.parametrize("mode", ["restore", "knock_out"])
def test_a_layer_reads_the_other_prompt(shallow_pipe, mode):
    chosen = text_layers(shallow_pipe)[2:4]
    effects = mediation.trace(shallow_pipe, CASE, sites=[chosen], backend="direct_effect", mode=mode, **FAST)
    (name,) = effects.site.values
    assert name == "+".join(layer.name for layer in chosen)
    own, other = CASE.prompt, CASE.corrupted_prompt
    if mode == "restore":
        own, other = other, own
    with reading(shallow_pipe, chosen, other):
        by_hand = drawn(shallow_pipe, own)
    clean, untouched = drawn(shallow_pipe, CASE.prompt), drawn(shallow_pipe, own)
    expected = -float((by_hand - clean).square().mean().sqrt())
    assert float(effects.restored.squeeze()) == pytest.approx(expected, rel=1e-2)
    assert float((by_hand - untouched).square().mean().sqrt()) > 1e-2 * abs(expected)


def test_all_layers_together_are_the_total_effect(shallow_pipe):
    layers = text_layers(shallow_pipe)
    effects = mediation.trace(shallow_pipe, CASE, sites=[layers, layers[0]], backend="direct_effect", **FAST)
    every, one = mediation.indirect_effect(effects, normalize=True).values.ravel()
    assert every == pytest.approx(1, abs=1e-3)
    assert one < 0.99


def test_the_default_is_each_cross_attention(shallow_pipe):
    effects = mediation.trace(shallow_pipe, CASE, backend="direct_effect", **FAST)
    assert effects.site.values.tolist() == [layer.name for layer in text_layers(shallow_pipe)]
    assert set(effects.component.values) == {"cross_attention"}


def test_the_search_ends_at_the_shortest_run_that_is_enough(shallow_pipe):
    hooks = hooks_of(shallow_pipe)
    options = FAST | {"num_inference_steps": 1}
    single = mediation.trace(shallow_pipe, CASE, backend="direct_effect", mode="restore", **options)
    best_alone = float(mediation.indirect_effect(single, normalize=True).max())
    found = mediation.find_text_layers(shallow_pipe, CASE, mode="restore", share=best_alone * 1.01, **options)
    m, names = len(found.layers), [layer.name for layer in text_layers(shallow_pipe)]
    first = names.index(found.layers[0])
    assert m > 1
    assert list(found.layers) == names[first : first + m]
    shares = mediation.indirect_effect(found.effects, normalize=True).squeeze(("case", "draw"))
    n_layers = [len(name.split("+")) for name in found.effects.site.values]
    assert n_layers == [n for n in range(1, m + 1) for _ in range(len(names) - n + 1)]
    longest = shares[[n == m for n in n_layers]]
    assert str(longest.site.values[longest.values.argmax()]).split("+") == list(found.layers)
    assert float(longest.max()) >= best_alone * 1.01 > float(shares[[n < m for n in n_layers]].max())
    again = mediation.find_text_layers(shallow_pipe, CASE, mode="restore", share=best_alone * 0.99, **options)
    assert len(again.layers) == 1
    assert hooks_of(shallow_pipe) == hooks


def test_the_layers_found_are_what_an_edit_takes(shallow_pipe):
    options = FAST | {"num_inference_steps": 1}
    found = mediation.find_text_layers(shallow_pipe, CASE, mode="restore", share=0.01, **options)
    edit = editing.cross_attention_edit(shallow_pipe, {"cat": "dog"}, method="loco", layers=found.layers)
    edited = {name.rsplit(".", 2)[0] for name in edit.updates}
    chosen = [layer for layer in text_layers(shallow_pipe) if layer.name in found.layers]
    assert edited == {f"unet.{layer.path}" for layer in chosen}


def test_a_share_that_is_not_reached_is_an_error_with_the_best(shallow_pipe):
    with pytest.raises(
        ValueError, match=r"no 1 consecutive layers have 0.999 of the total effect; the best, unet\..*, have 0"
    ):
        mediation.find_text_layers(
            shallow_pipe, CASE, mode="restore", share=0.999, max_layers=1, **FAST | {"num_inference_steps": 1}
        )


@pytest.mark.parametrize("mode", ["restore", "knock_out"])
def test_the_search_does_not_depend_on_which_way_a_metric_counts(shallow_pipe, mode):
    def size(images, latents, cases):
        return latents.square().mean((1, 2, 3)).numpy()

    size.needs_images = False
    options = FAST | {"num_inference_steps": 1, "mode": mode, "share": 0.1}
    found = [
        mediation.find_text_layers(shallow_pipe, CASE, **options | {"metric": metric})
        for metric in (size, lambda *outcome: -size(*outcome))
    ]
    signs = [float(mediation.total_effect(one.effects).squeeze()) > 0 for one in found]
    assert sorted(signs) == [False, True]
    assert found[0].layers == found[1].layers


def test_a_search_without_any_effect_ends_at_once(shallow_pipe, monkeypatch):
    lengths = []

    def traced(pipe, cases, *, sites, **options):
        lengths.append(len(sites[0]))
        return mediation.trace(pipe, cases, sites=sites, **options)

    monkeypatch.setattr(textlayers, "trace", traced)
    metric = lambda images, latents, cases: numpy.zeros(len(latents))  # noqa: E731
    with pytest.raises(ValueError, match="no case has a total effect above the noise floor"):
        mediation.find_text_layers(shallow_pipe, CASE, **FAST | {"num_inference_steps": 1, "metric": metric})
    assert lengths == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "between 0 and 1"),
        ({"max_layers": 5}, "between 1 and the 4 layers"),
        ({"images": "all"}, "pass no images"),
        ({"windows": [(0, 1)]}, "pass no windows"),
        ({"metric": [LatentDistance()]}, "a single one"),
        ({"branch": "both"}, "only the conditional half"),
    ],
)
def test_a_search_that_cannot_be_made_is_an_error_before_any_work(shallow_pipe, monkeypatch, wrong, message):
    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(shallow_pipe.unet, "forward", no_work)
    monkeypatch.setattr(shallow_pipe.text_encoder, "forward", no_work)
    with pytest.raises(ValueError, match=message):
        mediation.find_text_layers(shallow_pipe, CASE, **{**FAST, **wrong})


def test_other_sites_have_no_direct_effect_of_text(shallow_pipe):
    for site in ("unet.mid.0.resnet", "unet.mid.0.cross_attention.head.0"):
        with pytest.raises(ValueError, match="whole cross-attention layers"):
            mediation.trace(shallow_pipe, CASE, sites=[site], backend="direct_effect", **FAST)
