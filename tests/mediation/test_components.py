"""Scores of single weights against an objective typed anew, in float64, at latents seen by hooks of the test's own."""

import pickle

import matplotlib.pyplot
import numpy
import pytest
import torch
from PIL import Image

import mediation
from mediation import Attribution, attribute, tensorfiles
from mediation.mapfiles import open_map, save_map
from mediation.parameters import choose
from tests import tiny
from tests.runs import double, hooks_of, networks, visited

CONCEPT, BASE, STEPS, GUIDANCE, SEED = "a ink cat", "a photo", 2, 3.0, 5
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "progress": False}
# of every kind: feed-forward, attention, convolution, text encoder, and what is in no site
KINDS = ["unet.mid.0.feed_forward", "unet.down.0.0.cross_attention", "unet.up.1.0.resnet", "text_encoder.1.*"]
KINDS += ["unet.conv_out.weight"]


@pytest.fixture(scope="module")
def double_pipe():
    return double(tiny.shallow())


@pytest.fixture
def own_pipe():
    return tiny.shallow()


@pytest.fixture(scope="module")
def objective(double_pipe):
    """J of one trajectory as a function of the weights, typed anew."""
    pipe = double_pipe
    steps, _ = visited(pipe, CONCEPT, SEED, steps=STEPS, guidance_scale=GUIDANCE)

    @torch.no_grad()
    def predict(prompt, x, t):
        states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        return pipe.unet(x, t, encoder_hidden_states=states).sample

    targets = [predict(BASE, x, t) for x, t, _ in steps]

    def value():
        misses = [target - predict(CONCEPT, x, t) for target, (x, t, _) in zip(targets, steps, strict=True)]
        return sum(float(miss.square().sum()) for miss in misses) / len(misses)

    return value


@pytest.fixture(scope="module")
def found(double_pipe):
    return attribute(double_pipe, CONCEPT, base=BASE, parameters=KINDS, seeds=SEED, **OPTIONS)


def parameter(pipe, name):
    network, _, path = name.partition(".")
    return getattr(pipe, network).get_parameter(path)


def with_factor(pipe, name, place, factor, value):
    """J with one weight multiplied."""
    flat = parameter(pipe, name).data.view(-1)
    before = flat[place].clone()
    flat[place] = before * factor
    try:
        return value()
    finally:
        flat[place] = before


def test_the_value_is_the_formula_and_every_step_counts_at_its_own_time(found, objective):
    assert found.metadata["value"] == pytest.approx(objective(), rel=1e-6)
    assert found.metadata["value"] > 0
    assert found.metadata["n_rows"] == STEPS


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_scores_are_derivatives_by_the_logarithm_of_a_weight(double_pipe, found, objective, kind):
    """w dJ/dw = d J(w · f) / df at f = 1, by a central difference."""
    of_kind = attribute_names(double_pipe, KINDS[kind])
    for name in of_kind:
        score = found.scores[name].flatten()
        place = int(score.abs().argmax())
        assert score[place] != 0
        up, down = (with_factor(double_pipe, name, place, 1 + step, objective) for step in (1e-4, -1e-4))
        assert float(score[place]) == pytest.approx((up - down) / 2e-4, rel=1e-4), name


def attribute_names(pipe, entry):
    return list(choose(pipe, entry))


def test_scores_predict_the_ablation_of_one_weight(double_pipe, found, objective):
    name = attribute_names(double_pipe, KINDS[0])[1]
    score, whole = found.scores[name].flatten(), objective()
    places = score.abs().argsort(descending=True)[::40].tolist()
    assert len(places) > 10
    ablated = [whole - with_factor(double_pipe, name, place, 0.0, objective) for place in places]
    assert numpy.corrcoef(score[places].numpy(), ablated)[0, 1] > 0.99


@pytest.mark.parametrize("objective", ["erase", "amplify", "amplify pictures"])
def test_several_seeds_are_their_mean_however_they_are_batched(shallow_pipe, objective):
    options = {"parameters": ["unet.mid.*", "text_encoder.0.mlp"], "objective": objective.split()[0], **OPTIONS}
    if objective.endswith("pictures"):
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        options |= {"images": images, "guidance_scale": None}
    alone = [attribute(shallow_pipe, CONCEPT, seeds=seed, **options) for seed in (1, 2)]
    assert not torch.allclose(*(next(iter(one.scores.values())) for one in alone), rtol=0.1)
    for batch_size in (1, 3, None):
        both = attribute(shallow_pipe, CONCEPT, seeds=[1, 2], batch_size=batch_size, **options)
        assert both.metadata["value"] == pytest.approx(sum(one.metadata["value"] for one in alone) / 2, rel=1e-4)
        for name, score in both.scores.items():
            mean = (alone[0].scores[name] + alone[1].scores[name]) / 2
            torch.testing.assert_close(score, mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max()))


def test_every_text_encoder_of_sdxl_is_reached_but_for_what_nothing_reads():
    pipe = tiny.shallow("sdxl")
    chosen = ["text_encoder.*.mlp", "text_encoder_2.*.mlp"]
    found = attribute(pipe, CONCEPT, parameters=chosen, **OPTIONS).to_dataset()
    reached = {str(site): bool(p > 0) for site, p in zip(found.site.values, found.positive.values, strict=True)}
    last = len(reached) // 2 - 1
    expected = {f"text_encoder{which}.{layer}.mlp": True for which in ("", "_2") for layer in range(last + 1)}
    assert reached == expected | {f"text_encoder.{last}.mlp": False}, "the U-Net reads the last layer but one"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same_scores_in_float32(own_pipe, dtype):
    options = {"parameters": ["unet.mid.*", "text_encoder.0.mlp"], **OPTIONS}
    exact = attribute(own_pipe, CONCEPT, **options)
    rough = attribute(own_pipe.to(dtype), CONCEPT, **options)
    assert {score.dtype for score in rough.scores.values()} == {torch.float32}
    a, b = (torch.cat([score.flatten() for score in one.scores.values()]) for one in (exact, rough))
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.95


def test_nothing_is_left_changed(own_pipe):
    own_pipe.unet.requires_grad_(False)
    frozen, hooks = [p.requires_grad for p in own_pipe.unet.parameters()], hooks_of(own_pipe)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks(own_pipe)]
    found = attribute(own_pipe, CONCEPT, **OPTIONS)
    assert any(score.any() for score in found.scores.values()), "frozen weights have scores too"
    assert [p.requires_grad for p in own_pipe.unet.parameters()] == frozen
    assert all(p.requires_grad for p in own_pipe.text_encoder.parameters())
    assert all(p.grad is None for network in networks(own_pipe) for p in network.parameters())
    assert hooks_of(own_pipe) == hooks
    for network, state in zip(networks(own_pipe), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_pil_images_and_tensors_are_read_alike(shallow_pipe):
    pixels = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = {"objective": "amplify", "parameters": "unet.mid.0.feed_forward", **OPTIONS, "guidance_scale": None}
    tensor = attribute(shallow_pipe, CONCEPT, images=pixels.permute(0, 3, 1, 2).float() / 255, **options)
    images = attribute(shallow_pipe, CONCEPT, images=[Image.fromarray(image.numpy()) for image in pixels], **options)
    assert images.metadata["n_images"] == 2
    assert images.metadata["value"] == pytest.approx(tensor.metadata["value"], rel=1e-6)
    assert images.metadata["guidance_scale"] is None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_pil_images_of_other_modes_are_read_as_rgb(shallow_pipe, mode):
    options = {"objective": "amplify", "parameters": "unet.mid.0.feed_forward", **OPTIONS, "guidance_scale": None}
    image = Image.linear_gradient("L").resize((16, 16)).convert(mode)
    values = [
        attribute(shallow_pipe, CONCEPT, images=[one], **options).metadata["value"]
        for one in (image, image.convert("RGB"))
    ]
    assert values[0] == values[1]


def test_seeds_are_integers_of_any_kind(shallow_pipe, tmp_path):
    options = {"parameters": "unet.mid.0.feed_forward", **OPTIONS}
    plain = attribute(shallow_pipe, CONCEPT, seeds=3, **options)
    for seeds in (numpy.int64(3), [numpy.int32(3)], numpy.array([3]), range(3, 4)):
        found = attribute(shallow_pipe, CONCEPT, seeds=seeds, **options)
        found.save(tmp_path / "scores.safetensors")
        assert found.metadata == plain.metadata
        assert found.metadata["seeds"] == [3]


def test_what_is_drawn_is_guided_by_3_unless_told_otherwise(shallow_pipe):
    options = {"parameters": "unet.mid.0.feed_forward", "num_inference_steps": 2, "progress": False}
    for objective in ("erase", "amplify"):
        default, three, four = (
            attribute(shallow_pipe, CONCEPT, objective=objective, **options, **guided).metadata
            for guided in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 4.0})
        )
        assert default["guidance_scale"] == 3.0
        assert default["value"] == three["value"] != four["value"]


def test_the_map_is_the_sums_by_site(found, shallow_pipe, tmp_path):
    effects = found.to_dataset()
    sums = {}
    for name, score in found.scores.items():
        values = score.double().numpy().ravel()
        entry = sums.setdefault(found.sites[name].name, [0.0, 0.0, 0])
        entry[0] += values[values > 0].sum()
        entry[1] += values[values < 0].sum()
        entry[2] += values.size
    assert effects.site.values.tolist() == list(sums)
    for i, column in enumerate(("positive", "negative", "n_weights")):
        numpy.testing.assert_allclose(effects[column].values, [entry[i] for entry in sums.values()], rtol=1e-6)
    value = found.metadata["value"]
    assert effects.clean.item() == effects.sham.values.flat[0] == value
    for sign, pick in (("both", lambda e: e[0] + e[1]), ("positive", lambda e: e[0]), ("negative", lambda e: e[1])):
        effects, expected = found.to_dataset(sign=sign), [pick(entry) for entry in sums.values()]
        effect = mediation.indirect_effect(effects).values.ravel()
        numpy.testing.assert_allclose(effect, expected, rtol=1e-6, atol=1e-9 * value)
        assert mediation.total_effect(effects).item() == pytest.approx(sum(expected), rel=1e-6)
    save_map(effects, tmp_path / "map.nc")
    assert open_map(tmp_path / "map.nc").equals(effects)


def test_the_map_is_on_the_sites_of_a_causal_map(shallow_pipe):
    effects = attribute(shallow_pipe, CONCEPT, parameters="unet.mid.*", **OPTIONS).to_dataset()
    case = mediation.Case("a ink cat", subject="ink")
    traced = mediation.trace(
        shallow_pipe, case, sites=mediation.sites(shallow_pipe, name="unet.mid.*"), num_inference_steps=1
    )
    for name in ("site", "network", "component", "layer", "block", "path"):
        assert effects[name].values.tolist() == traced[name].values.tolist()
    agreement = mediation.compare(effects, effects, k=2).estimate
    assert agreement.values.tolist() == pytest.approx([1, 1, 1])
    assert mediation.compare(effects, traced, k=2).attrs["n_places"] == 5
    ax = mediation.plot_effects(effects)
    drawn = numpy.ma.compressed(ax.images[0].get_array())
    matplotlib.pyplot.close(ax.figure)
    assert sorted(drawn[~numpy.isnan(drawn)]) == pytest.approx(
        sorted(mediation.indirect_effect(effects).values.ravel())
    )


def same(a, b):
    return (
        all(torch.equal(a.scores[name], b.scores[name]) for name in a.scores)
        and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
        and (list(a.scores), a.sites, a.base, a.metadata) == (list(b.scores), b.sites, b.base, b.metadata)
    )


def test_what_is_loaded_is_what_was_saved(found, tmp_path):
    found.save(tmp_path / "scores.safetensors")
    loaded = Attribution.load(tmp_path / "scores.safetensors")
    assert same(loaded, found)
    assert same(pickle.loads(pickle.dumps(found)), found)
    assert repr(loaded) == repr(found)
    with pytest.raises(ValueError, match=r"end in .safetensors"):
        found.save(tmp_path / "scores.pt")
    edit = tmp_path / "edit.safetensors"
    tensorfiles.write(edit, {}, {}, "editing.Edit/1")
    with pytest.raises(ValueError, match="is no attribution file"):
        Attribution.load(edit)
    damaged = bytearray((tmp_path / "scores.safetensors").read_bytes())
    damaged[-1] ^= 1
    edit.write_bytes(damaged)
    with pytest.raises(ValueError, match="tampered with, or damaged"):
        Attribution.load(edit)


GIVEN = {"objective": "amplify", "guidance_scale": None}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "explain"}, ValueError, "objective must be one of erase, amplify; got 'explain'"),
        ({"concept": " "}, ValueError, "the concept is empty"),
        ({"concept": 3}, TypeError, "the concept must be a string, got int"),
        ({"base": "a ink cat "}, ValueError, "are the same prompt"),
        ({"base": "a cat", "objective": "amplify"}, ValueError, 'base is for objective="erase"'),
        ({"images": torch.zeros(1, 3, 8, 8)}, ValueError, 'images are for objective="amplify"'),
        ({"images": torch.zeros(3, 8, 8), **GIVEN}, ValueError, r"got \(3, 8, 8\)"),
        ({"images": torch.full((1, 3, 8, 8), 2.0), **GIVEN}, ValueError, r"real numbers in \[0, 1\]"),
        ({"images": ["cat.png"], **GIVEN}, TypeError, "or a list of PIL images"),
        ({"images": torch.zeros(1, 3, 8, 8), "objective": "amplify"}, ValueError, "guidance_scale is of pictures that"),
        ({"seeds": [1, 1]}, ValueError, "seeds must be different integers"),
        ({"seeds": []}, ValueError, "seeds must be different integers"),
        ({"seeds": True}, ValueError, r"seeds must be different integers of at least 0, got \[True\]"),
        ({"seeds": 1.5}, ValueError, r"got \[1.5\]"),
        ({"seeds": ["1", 2]}, ValueError, r"got \['1', 2\]"),
        ({"seeds": [0, -1]}, ValueError, r"got \[0, -1\]"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1"),
        ({"parameters": "unet.engine"}, KeyError, "matches no site and no parameter"),
    ],
)
def test_mistakes_are_told_before_any_work(shallow_pipe, monkeypatch, options, error, message):
    monkeypatch.setattr(shallow_pipe.unet, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        attribute(shallow_pipe, options.pop("concept", CONCEPT), **OPTIONS | options)


def test_a_map_of_an_unknown_sign_is_refused(found):
    with pytest.raises(ValueError, match="sign must be one of both, positive, negative; got 'all'"):
        found.to_dataset(sign="all")
