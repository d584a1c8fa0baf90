"""What sets one family apart from the others."""

import collections

import diffusers
import pytest
import torch

import mediation
from mediation import LatentDistance
from mediation.encoding import clean_groups
from mediation.pipelines import family_of, tokenizers_of
from mediation.rows import CLEAN
from mediation.sampling import sample_rows
from tests import tiny
from tests.runs import CASE, SAMPLING, alone, rms


def test_sd1_has_the_seventy_layers_of_the_paper():
    """22 ResNets, 16 self-attentions, 16 cross-attentions, 16 feed-forwards (arXiv:2310.13730)."""
    pipe = tiny.stable_diffusion(unet={"layers_per_block": 2})
    counts = collections.Counter(site.component for site in mediation.sites(pipe, network="unet"))
    assert counts == {"resnet": 22, "self_attention": 16, "cross_attention": 16, "feed_forward": 16}


def test_sdxl_has_seventy_transformer_layers():
    """With the depths of its published configuration: 4 + 20 down, 10 in the middle, 30 + 6 up."""
    pipe = tiny.stable_diffusion_xl(unet={"transformer_layers_per_block": (1, 2, 10)})
    counts = collections.Counter(site.component for site in mediation.sites(pipe, network="unet"))
    assert counts == {"resnet": 17, "self_attention": 70, "cross_attention": 70, "feed_forward": 70}
    assert "unet.down.2.1.9.self_attention" in {site.name for site in mediation.sites(pipe)}
    assert mediation.sites(pipe, network="text_encoder_2")[0].name == "text_encoder_2.0.self_attention"


def test_sd2_pads_with_a_token_that_is_no_end():
    pipe = tiny.stable_diffusion_2()
    found = clean_groups(pipe.tokenizer, CASE)
    ids = pipe.tokenizer(CASE.prompt, padding="max_length").input_ids
    assert ids[found["eos"][0]] == pipe.tokenizer.eos_token_id
    assert {ids[position] for position in found["padding"]} == {0}
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_sdxl_guides_as_the_pipeline_does_without_forced_zeros():
    pipe = tiny.shallow("sdxl")
    family = family_of(pipe)
    assert not any(value.any() for value in family.encode_negative(pipe).values())
    forced = alone(pipe, CASE.prompt)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    expected = alone(pipe, CASE.prompt)
    assert rms(forced, expected) > 1e-3
    assert rms(sample_rows(pipe, CASE, 0, [], SAMPLING)[CLEAN], expected[0]) < 1e-4 * expected.std().item()


def test_sdxl_decodes_in_full_precision_where_half_would_overflow():
    pipe = tiny.shallow("sdxl")
    latents = alone(pipe, CASE.prompt).half()
    pipe.vae.half()
    images = family_of(pipe).decode(pipe, latents)
    assert images.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
    pipe.vae.float()  # the same rounded weights
    torch.testing.assert_close(images, family_of(pipe).decode(pipe, latents.float()), atol=1e-3, rtol=1e-3)


def test_sdxl_restores_each_tokenizers_own_positions():
    """With the words spelled out for the second encoder, the subject stands elsewhere in it."""
    pipe = tiny.shallow("sdxl", tokenizer_2=tiny.tokenizer(("in", "cat"), padding="!"))
    first, second = (clean_groups(tokenizer, CASE)["subject"] for tokenizer in tokenizers_of(pipe).values())
    assert first != second
    embeddings = [mediation.sites(pipe, network=encoder, layer=0) for encoder in tokenizers_of(pipe)]
    together = [site for found in embeddings for site in found]
    effects = mediation.trace(
        pipe, CASE, sites=[together], tokens=["before", "subject"], metric=LatentDistance(), num_inference_steps=2,
        progress=False,
    )  # fmt: skip
    indirect = mediation.indirect_effect(effects).squeeze()
    assert abs(float(indirect.sel(token="before"))) < 1e-5  # causal encoders: no noise before the subject
    assert abs(float(indirect.sel(token="subject"))) > 1e-3


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_pipelines_that_start_from_an_image_say_what_to_do(kind):
    for pipe in (tiny.shallow(), tiny.shallow("sdxl")):
        text_to_image = type(pipe)
        from_image = getattr(diffusers, text_to_image.__name__.replace("Pipeline", f"{kind}Pipeline"))
        other = from_image.from_pipe(pipe)
        with pytest.raises(ValueError, match=rf"starts from an image.*{text_to_image.__name__}\.from_pipe"):
            mediation.sites(other)
        assert mediation.sites(text_to_image.from_pipe(other)) == mediation.sites(pipe)
