"""Steering adds and takes away what its formulas say."""

import json
import re
import shlex

import numpy
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import editing
import mediation
from editing.cli import app
from editing.steering import steered
from mediation import Place, SparseAutoencoder
from mediation.autoencoders.concepts import _example
from mediation.autoencoders.splicing import spliced
from tests.runs import alone, hooks_of

SITE = "unet.down.0.0"
# one row of a 1×2 site with three latents: norms 5 and 2
Z = torch.tensor([[[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]]])
X = torch.tensor([[[[1.0, 2.0, 2.0], [0.0, 0.0, 4.0]]]])  # norms 3 and 4


@pytest.fixture(scope="module")
def sae():
    sae = SparseAutoencoder(8, 24, 4, place=Place(SITE)).requires_grad_(False)
    sae.scale.fill_(1.5)
    return sae


def test_everywhere_the_paper_s_amounts_are_added():
    options = {"strength": 2.0, "inside": None}
    # 2·5 and 2·2 more of the first latent
    by_norm = steered(Z, X, [0], 1.0, units="norm", **options)
    assert by_norm.tolist() == [[[[13.0, 4.0, 0.0], [4.0, 0.0, 2.0]]]]
    # shares of 5/7 and 2/7
    by_share = steered(Z, X, [0], 1.0, units="share", **options)
    torch.testing.assert_close(by_share[..., 0], torch.tensor([[[3 + 10 / 7, 4 / 7]]]))
    assert torch.equal(by_share[..., 1:], Z[..., 1:])


def test_in_a_region_the_concept_is_added_and_outside_it_is_taken_away():
    inside = torch.tensor([[0.0, 1.0]])
    found = steered(Z, X, [0, 1], 1.0, strength=0.5, inside=inside, units="norm")
    assert found.tolist() == [[[[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]]]]
    assert Z[0, 0, 0].tolist() == [3, 4, 0], "latents themselves stay"


@pytest.mark.parametrize("inside", [None, torch.tensor([[0.0, 1.0]])])
def test_relative_strength_is_the_size_of_what_is_added(inside):
    size, strength = 2.5, 0.7
    found = steered(Z, X, [1], size, strength=strength, inside=inside, units="relative")
    kept = Z.clone()
    if inside is not None:
        kept[..., 1] *= inside
    added = size * (found - kept)[..., 1]
    there = X.square().sum(-1) * (1 if inside is None else inside)
    assert float(added.square().sum().sqrt()) == pytest.approx(strength * float(there.sum().sqrt()))
    ratio = added / Z.norm(dim=-1)
    assert inside is not None or float(ratio[0, 0, 0]) == pytest.approx(float(ratio[0, 0, 1])), "in proportion to norms"


def test_rows_are_steered_by_themselves_and_silence_gains_nothing():
    z = torch.cat([Z, torch.zeros_like(Z)])
    found = steered(z, torch.cat([X, X]), [0], 1.0, strength=1.0, inside=None, units="relative")
    torch.testing.assert_close(found[:1], steered(Z, X, [0], 1.0, strength=1.0, inside=None, units="relative"))
    assert not found[1].any()


@pytest.mark.parametrize("branch", ["cond", "both"])
def test_a_pipeline_is_steered_by_splicing(tiny_pipe, sae, branch):
    hooks, plain = hooks_of(tiny_pipe), alone(tiny_pipe, "a cat")
    mask = numpy.zeros((16, 16), bool)
    mask[:, :8] = True
    inside = torch.zeros(8, 8)
    inside[:, :4] = 1
    size = sae.scale * sae.decoder[[3, 5]].sum(0).norm()

    def edit(z, x, moment):
        return steered(z, x, [3, 5], size, strength=0.4, inside=inside, units="relative")

    with spliced(tiny_pipe, sae, edit, stage=(0.4, 1.0), branch=branch):
        expected = alone(tiny_pipe, "a cat")
    for region in (mask, "left"):
        with editing.steer(tiny_pipe, sae, [3, 5], strength=0.4, region=region, stage=(0.4, 1.0), branch=branch):
            found = alone(tiny_pipe, "a cat")
        assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(alone(tiny_pipe, "a cat"), plain)
    assert hooks_of(tiny_pipe) == hooks


def test_no_strength_everywhere_changes_no_bit(tiny_pipe, sae):
    plain = alone(tiny_pipe, "a cat")
    for units in ("relative", "norm", "share"):
        with editing.steer(tiny_pipe, sae, 3, strength=0.0, units=units):
            assert torch.equal(alone(tiny_pipe, "a cat"), plain)


def test_several_concepts_each_in_its_stage(tiny_pipe, sae):
    """Contexts that share no step do what each does in its own."""
    early, late = {"strength": 0.3, "stage": (0.6, 1.0)}, {"strength": 0.3, "stage": (0.0, 0.2)}
    with editing.steer(tiny_pipe, sae, 3, **early), editing.steer(tiny_pipe, sae, 5, **late):
        one = alone(tiny_pipe, "a cat")
    with editing.steer(tiny_pipe, sae, 5, **late), editing.steer(tiny_pipe, sae, 3, **early):
        other = alone(tiny_pipe, "a cat")
    assert torch.equal(one, other)
    with editing.steer(tiny_pipe, sae, 3, **early):
        assert not torch.equal(alone(tiny_pipe, "a cat"), one)


def test_concepts_have_names(tiny_pipe, sae):
    small = SparseAutoencoder(8, 2, 1, place=Place(SITE)).requires_grad_(False)
    with editing.steer(tiny_pipe, small, 1, strength=0.5):
        expected = alone(tiny_pipe, "a cat")
    with editing.steer(tiny_pipe, small, "dog", strength=0.5, dictionary=_example()):
        assert torch.equal(alone(tiny_pipe, "a cat"), expected)
    with pytest.raises(ValueError, match="pass dictionary="), editing.steer(tiny_pipe, sae, "dog", strength=0.5):
        pass


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SparseAutoencoder(8, 3, 1, place=Place(SITE)), "it has 2 latents, and the autoencoder 3"),
        (SparseAutoencoder(8, 2, 1, place=Place(SITE, (0.5,))), "it is of unet.down.0.0 at t=1, cond, and the"),
        (SparseAutoencoder(8, 2, 1, place=Place(SITE), seed=1), "it was made with an autoencoder of other weights"),
    ],
    ids=["wider", "another place", "other weights"],
)
@pytest.mark.parametrize("concept", ["dog", 1])
def test_names_are_those_of_the_autoencoder_that_steers(tiny_pipe, other, message, concept):
    own = SparseAutoencoder(8, 2, 1, place=Place(SITE))
    dictionary = _example().assign_attrs(place=str(own.place), autoencoder=own.fingerprint)
    with editing.steer(tiny_pipe, own, concept, strength=0.5, dictionary=dictionary):
        pass
    with (
        pytest.raises(ValueError, match=f"not of this autoencoder: {message}"),
        editing.steer(tiny_pipe, other, concept, strength=0.5, dictionary=dictionary),
    ):
        raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"concept": 24}, ValueError, "from 0 to 23"),
        ({"concept": []}, ValueError, "different integers"),
        ({"concept": [1.5]}, TypeError, "named by integers, from 0 to 23"),
        ({"concept": 1.5}, TypeError, "a latent's number"),
        ({"strength": float("nan")}, ValueError, "finite"),
        ({"units": "kg"}, ValueError, "relative, norm, share"),
        ({"region": numpy.zeros((4, 4))}, ValueError, "true somewhere"),
        ({"region": [True]}, ValueError, "mask"),
        ({"region": "middle"}, ValueError, "called left, right, top, bottom"),
        ({"region": "left-right"}, ValueError, "true somewhere"),
        ({"region": ""}, ValueError, "called left"),
        ({"stage": (0.5, 0.5)}, ValueError, "0 <= start < stop"),
        ({"branch": "all"}, ValueError, "branch must be"),
    ],
)
def test_what_cannot_be_steered_is_an_error_before_any_work(tiny_pipe, sae, wrong, error, message):
    options = {"concept": 3, "strength": 0.5} | wrong
    with pytest.raises(error, match=message), editing.steer(tiny_pipe, sae, **options):
        raise AssertionError("work was done")


@pytest.mark.parametrize("mask", [numpy.uint8([[255]]), [[1]], [[0.4]], torch.ones(1, 1)], ids=str)
def test_any_mask_is_inside_where_it_is_not_0(tiny_pipe, sae, mask):
    """One pixel of four, however bright, is no half of a position; three are."""
    plain = numpy.kron(numpy.eye(8, dtype=bool), [[True, True], [True, False]])
    plain[0, 15] = True
    with editing.steer(tiny_pipe, sae, 3, strength=0.4, region=plain):
        expected = alone(tiny_pipe, "a cat", num_inference_steps=1)
    valued = torch.as_tensor(plain) * torch.as_tensor(mask)
    with editing.steer(tiny_pipe, sae, 3, strength=0.4, region=valued):
        assert torch.equal(alone(tiny_pipe, "a cat", num_inference_steps=1), expected)
    with editing.steer(tiny_pipe, sae, 3, strength=0.4, region=numpy.eye(8)):
        assert torch.equal(alone(tiny_pipe, "a cat", num_inference_steps=1), expected)


def test_a_region_too_small_for_the_site_is_an_error(tiny_pipe, sae):
    mask = numpy.zeros((64, 64), bool)
    mask[0, 0] = True
    with (
        pytest.raises(ValueError, match="half of no position"),
        editing.steer(tiny_pipe, sae, 3, strength=1, region=mask),
    ):
        alone(tiny_pipe, "a cat")


def test_the_command_draws_both_pictures(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(mediation, "load_pipeline", lambda name=None: tiny_pipe)
    monkeypatch.chdir(tmp_path)
    SparseAutoencoder(16, 24, 4, place=Place("unet.up.1.0")).save_pretrained("cat-sae")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", CliRunner().invoke(app, ["steer", "--help"]).output).split())
    arguments = shlex.split(re.search(r"Example: editing (steer .*?) (?:Arguments|Options|\*)", text).group(1))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    with PIL.Image.open("steered.png") as picture:
        pixels = numpy.asarray(picture) / 255
    assert pixels.shape == (16, 32, 3)
    moved = numpy.sqrt(((pixels[:, :16] - pixels[:, 16:]) ** 2).mean())
    assert told["rms_change"] == pytest.approx(moved, abs=4e-3)
    assert told["rms_change"] > 0


def test_a_picture_that_cannot_be_kept_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(mediation, "load_pipeline", lambda name=None: pytest.fail("nothing is to be drawn"))
    SparseAutoencoder(16, 24, 4, place=Place("unet.up.1.0")).save_pretrained(tmp_path / "sae")
    arguments = ["steer", str(tmp_path / "sae"), "a cat", "--concept", "5", "--strength", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "nowhere" / "cat.png")])
    assert result.exit_code == 1
    assert "error: there is no folder" in result.output
