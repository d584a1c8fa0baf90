"""Sites have names, and are selected by what they are; pipelines without known sites are refused."""

import matplotlib.pyplot
import numpy
import pytest
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

import mediation
from mediation.families import StableDiffusion
from mediation.sites import resolve
from tests.runs import CASE


def test_names_are_those_of_the_design(tiny_pipe):
    names = [site.name for site in mediation.sites(tiny_pipe)]
    assert names[:2] == ["text_encoder.0.self_attention", "text_encoder.0.mlp"]
    assert "unet.down.0.0.cross_attention" in names
    assert "unet.mid.1.resnet" in names
    first = mediation.sites(tiny_pipe, name="unet.down.0.0.cross_attention")[0]
    assert (first.network, first.component, first.layer, first.block) == ("unet", "cross_attention", 0, "down.0")


def test_selection(tiny_pipe):
    up = mediation.sites(tiny_pipe, network="unet", component="cross_attention", block="up.1")
    assert [site.name for site in up] == [f"unet.up.1.{i}.cross_attention" for i in range(2)]
    assert mediation.sites(tiny_pipe, name="unet.up.1.*.cross_attention") == up
    assert [site.component for site in mediation.sites(tiny_pipe, network="text_encoder", layer=1)] == [
        "self_attention",
        "mlp",
    ]
    for wrong in ({"network": "vae"}, {"component": "conv"}, {"layer": 99}, {"block": "left"}, {"name": "*.nothing"}):
        with pytest.raises(ValueError, match="no site"):
            mediation.sites(tiny_pipe, **wrong)


def test_heads_transformers_and_blocks_are_listed_on_request(tiny_pipe):
    heads = mediation.sites(tiny_pipe, network="text_encoder", component="self_attention", layer=1, heads=True)
    assert [head.name for head in heads] == [f"text_encoder.1.self_attention.head.{i}" for i in range(4)]
    assert [head.features(32) for head in heads[:2]] == [slice(0, 8), slice(8, 16)]
    assert {(head.layer, head.n_heads, head.path.endswith("self_attn.out_proj")) for head in heads} == {(1, 4, True)}
    assert {head.component for head in mediation.sites(tiny_pipe, heads=True)} == {"self_attention", "cross_attention"}
    blocks = mediation.sites(tiny_pipe, network="unet", component="block")
    assert [block.name for block in blocks] == [
        *(f"unet.down.{i}.block" for i in range(4)),
        "unet.mid.block",
        *(f"unet.up.{i}.block" for i in range(4)),
    ]
    transformers = mediation.sites(tiny_pipe, component="transformer", block="up.1")
    assert [site.name for site in transformers] == [f"unet.up.1.{i}.transformer" for i in range(2)]
    assert transformers[1].path == "up_blocks.1.attentions.1"
    assert not {"transformer", "block"} & {site.component for site in mediation.sites(tiny_pipe)}
    names = [block.name for block in mediation.sites(tiny_pipe, network="unet", name="unet.*.block")]
    assert names == [block.name for block in blocks], "a name that nothing else has"
    middle = mediation.sites(tiny_pipe, name="unet.mid.*")
    assert "block" not in {site.component for site in middle}, "one that other sites have"
    for wrong in ("mlp", "block"):
        with pytest.raises(ValueError, match=f"no head has component='{wrong}'; this pipeline has self_attention"):
            mediation.sites(tiny_pipe, component=wrong, heads=True)


def test_other_networks_are_not_searched_for_the_sites_of_one(tiny_pipe, monkeypatch):
    """Listing a U-Net takes longer than the edit of a text encoder."""
    whole = [*mediation.sites(tiny_pipe), *mediation.sites(tiny_pipe, heads=True)]
    expected = [site for site in whole if site.network == "text_encoder"]
    monkeypatch.setattr(StableDiffusion, "denoiser_spots", staticmethod(lambda _: pytest.fail("the U-Net was listed")))
    found = [mediation.sites(tiny_pipe, network="text_encoder", heads=heads) for heads in (False, True)]
    assert [site for part in found for site in part] == expected
    assert resolve(tiny_pipe, [site.name for site in expected]) == [(site,) for site in expected]


def test_neighbours_are_all_runs_of_n_layers(tiny_pipe):
    layers = mediation.sites(tiny_pipe, component="resnet")
    for n in (1, 2, len(layers)):
        groups = mediation.neighbours(layers, n)
        assert all(len(group) == n for group in groups)
        assert [group[0] for group in groups] == layers[: len(layers) - n + 1]
        assert [site.layer for site in groups[-1]] == list(range(len(layers) - n, len(layers)))


def test_neighbours_are_traced_and_drawn_at_their_middle(tiny_pipe):
    groups = mediation.neighbours(mediation.sites(tiny_pipe, component="cross_attention")[:5], 3)
    effects = mediation.trace(
        tiny_pipe, CASE, sites=groups, metric=mediation.LatentDistance(), num_inference_steps=1, progress=False
    )
    middle = [group[1] for group in groups]
    assert effects.layer.values.tolist() == [site.layer for site in middle] == [1, 2, 3]
    assert effects.path.values.tolist() == [site.path for site in middle]
    ax = mediation.plot_effects(effects)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cross attention, 3 together"]
    positions = [site.name.removeprefix("unet.").removesuffix(".cross_attention") for site in middle]
    assert [label.get_text() for label in ax.get_xticklabels()] == positions
    numpy.testing.assert_allclose(ax.images[0].get_array()[0], mediation.indirect_effect(effects).squeeze())
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("choose", "n", "error", "message"),
    [
        (
            lambda resnets, others: ["unet.mid.0.resnet"],
            1,
            TypeError,
            "Site objects, as mediation.sites lists them, got",
        ),
        (lambda resnets, others: [resnets[0], others[0]], 2, ValueError, "got unet resnet, unet feed_forward"),
        (lambda resnets, others: resnets[::2], 2, ValueError, r"follow one another.*got layers \[0, 2"),
        (lambda resnets, others: resnets[::-1], 2, ValueError, "in execution order"),
        (lambda resnets, others: [resnets[0]] * 2, 2, ValueError, "each given once"),
        (lambda resnets, others: resnets[:3], 4, ValueError, "from 1 to the 3 layers that there are, got 4"),
        (lambda resnets, others: resnets[:3], 0, ValueError, "got 0"),
        (lambda resnets, others: resnets[:3], 1.0, ValueError, r"got 1\.0"),
        (lambda resnets, others: [], 1, ValueError, "the 0 layers that there are"),
    ],
)
def test_what_has_no_neighbours_is_refused(tiny_pipe, choose, n, error, message):
    resnets, others = (mediation.sites(tiny_pipe, component=component) for component in ("resnet", "feed_forward"))
    with pytest.raises(error, match=message):
        mediation.neighbours(choose(resnets, others), n)
    with pytest.raises(ValueError, match="is a single head"):
        mediation.neighbours(mediation.sites(tiny_pipe, heads=True), 2)


def test_other_pipelines_are_refused_by_name():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(
        ValueError, match="no family is known for DDPMPipeline; supported pipelines: StableDiffusionPipeline"
    ):
        mediation.sites(pipe)
    with pytest.raises(TypeError, match="expected a diffusers pipeline, got AutoencoderKL"):
        mediation.sites(AutoencoderKL())


def test_a_pipeline_without_a_text_encoder_is_refused(tiny_pipe):
    pipe = type(tiny_pipe)(**tiny_pipe.components | {"text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="it has no text_encoder"):
        mediation.sites(pipe)
