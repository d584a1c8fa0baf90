"""Autoencoders compute their formula, and come back from files; those of others compute what theirs does."""

import json

import numpy
import pytest
import safetensors.torch
import torch

from mediation import Place, SparseAutoencoder


def random_sae(**options):
    """An autoencoder none of whose weights is trivial."""
    sae = SparseAutoencoder(5, 9, 3, **options).requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for name, tensor in sae.state_dict().items():
        if name not in ("threshold", "decoder"):
            tensor.copy_(torch.randn(tensor.shape, generator=random))
    sae.scale.fill_(1.7)
    sae.threshold.fill_(0.8)
    return sae


def numpy_encode(sae, x):
    weights = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    pre = (x / weights["scale"] - weights["bias"]) @ weights["encoder"].T + weights["latent_bias"]
    active = numpy.maximum(pre, 0)
    if sae.activation == "batch_topk":
        return numpy.where(active >= weights["threshold"], active, 0)
    kept = numpy.argsort(-active, axis=-1)[..., : sae.k]
    z = numpy.zeros_like(active)
    numpy.put_along_axis(z, kept, numpy.take_along_axis(active, kept, -1), -1)
    return z


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_encoding_and_decoding_follow_the_formula(activation):
    sae = random_sae(activation=activation)
    x = numpy.random.default_rng(0).normal(size=(4, 6, 5))
    z = numpy_encode(sae, x)
    found = sae.encode(torch.from_numpy(x))
    torch.testing.assert_close(found, torch.from_numpy(z).float(), rtol=1e-5, atol=1e-5)
    reconstruction = 1.7 * (z @ sae.decoder.double().numpy() + sae.bias.double().numpy())
    torch.testing.assert_close(sae(torch.from_numpy(x)), torch.from_numpy(reconstruction).float(), rtol=1e-5, atol=1e-5)
    assert (z > 0).any()
    if activation == "topk":
        assert int((found > 0).sum(-1).max()) <= 3
    changed = found * 2
    expected = sae.decode(changed) - sae.decode(found)
    torch.testing.assert_close(sae.difference(changed, found), expected, rtol=1e-4, atol=1e-4)


def test_directions_begin_with_norm_1_and_depend_on_the_seed():
    one, same, other = (SparseAutoencoder(5, 9, 3, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(one.decoder.norm(dim=1), torch.ones(9))
    assert torch.equal(one.decoder, same.decoder)
    assert not torch.equal(one.decoder, other.decoder)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_files_bring_everything_back(tmp_path, activation):
    place = Place("unet.up.1.0", (1.0, 0.5), "uncond")
    sae = random_sae(activation=activation, place=place, metadata={"training": {"history": [1]}})
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert (again.place, again.config) == (place, sae.config)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(x), sae(x))
    assert json.loads((tmp_path / "config.json").read_text()) == sae.config
    assert not any(parameter.requires_grad for parameter in again.parameters())
    damaged = bytearray((tmp_path / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="tampered"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_what_was_read_of_a_transformer_is_read_again(tmp_path):
    place = Place("unet.up.1.0", reads="output")
    random_sae(place=place).save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).place == place
    elsewhere = Place("unet.mid.0", (0.5,), reads="output")
    assert SparseAutoencoder.from_pretrained(tmp_path, place=elsewhere).place == elsewhere
    with pytest.raises(ValueError, match=r"trained on a transformer.s output: pass reads='output'"):
        SparseAutoencoder.from_pretrained(tmp_path, place=Place("unet.up.1.0"))
    random_sae().save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, place=place).place == place, "a file that says nothing of it"


def theirs():
    random = torch.Generator().manual_seed(3)
    shapes = {"encoder": (9, 5), "decoder": (9, 5), "latent_bias": (9,), "bias": (5,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def by_hand(w, x, k):
    """What both SAeUron and sdxl-unbox compute at a position."""
    values, latents = (w["encoder"] @ (x - w["bias"]) + w["latent_bias"]).relu().topk(k)
    return values @ w["decoder"][latents] + w["bias"]


def test_saeuron_folders_compute_what_saeuron_does(tmp_path):
    w = theirs()
    names = {"encoder.weight": "encoder", "encoder.bias": "latent_bias", "W_dec": "decoder", "b_dec": "bias"}
    tensors = {name: w[ours] for name, ours in names.items()}
    safetensors.torch.save_file(tensors, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 5, "num_latents": 9, "k": 2, "batch_topk": True}))
    sae = SparseAutoencoder.from_pretrained(tmp_path, place=Place("unet.up.1.1", reads="output"))
    for x in torch.randn(5, 5, generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(sae(x), by_hand(w, x, 2))
    with pytest.raises(ValueError, match=r"trained on a transformer.s output"):
        SparseAutoencoder.from_pretrained(tmp_path, place=Place("unet.up.1.1"))
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 5, "k": 2, "input_unit_norm": True}))
    with pytest.raises(ValueError, match="input_unit_norm"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_unbox_folders_compute_what_unbox_does_and_pickles_are_refused(tmp_path):
    w = theirs()
    settings = {"n_dirs_local": 9, "d_model": 5, "k": 2, "auxk": 3, "dead_steps_threshold": 10}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"pickles can run code.*save_file"):
        SparseAutoencoder.from_pretrained(tmp_path)
    tensors = {"encoder.weight": w["encoder"], "latent_bias": w["latent_bias"], "pre_bias": w["bias"]}
    safetensors.torch.save_file(tensors, tmp_path / "state_dict.safetensors")
    with pytest.raises(ValueError, match=r"has no decoder\.weight"):
        SparseAutoencoder.from_pretrained(tmp_path)
    tensors["decoder.weight"] = w["decoder"].T.contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "state_dict.safetensors")
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    for x in torch.randn(5, 5, generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(sae(x), by_hand(w, x, 2))
    assert sae.metadata["origin"] == "sdxl-unbox"


def test_mistakes_are_errors(tmp_path):
    for wrong in ({"k": 0}, {"k": 10}, {"n_features": 0}, {"activation": "relu"}):
        with pytest.raises(ValueError, match=r"1 <= k <= n_latents|must be one of"):
            SparseAutoencoder(**{"n_features": 5, "n_latents": 9, "k": 3} | wrong)
    with pytest.raises(ValueError, match="5 features"):
        SparseAutoencoder(5, 9, 3).encode(torch.zeros(2, 4))
    with pytest.raises(FileNotFoundError, match="has no autoencoder"):
        SparseAutoencoder.from_pretrained(tmp_path)
