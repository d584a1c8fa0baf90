"""Autoencoders that other programs saved: the layouts of SAeUron and of sdxl-unbox.

SAeUron (github.com/cywinski/SAeUron, SAE/sae.py): cfg.json, and sae.safetensors with encoder.weight (latent, feature),
encoder.bias, W_dec (latent, feature), b_dec. It is trained on the output of a transformer. However it was trained, it
is used with the k largest latents of each position (scripts/gather_sae_acts_ca_prompts.py).

sdxl-unbox (github.com/surkovv/sdxl-unbox, SAE/sae.py): config.json, and state_dict.pth with encoder.weight (latent,
feature), decoder.weight (feature, latent), pre_bias, latent_bias. It is trained on output − input of a transformer.
"""

import json
import pathlib

import torch

from mediation.tensorfiles import read_tensors

# our names of weights, with what each layout calls them
_SAEURON = {"encoder": "encoder.weight", "latent_bias": "encoder.bias", "decoder": "W_dec", "bias": "b_dec"}
_UNBOX = {
    "encoder": "encoder.weight",
    "latent_bias": "latent_bias",
    "decoder": "decoder.weight",
    "bias": "pre_bias",
}


def read(folder: pathlib.Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments of `SparseAutoencoder`, with what its activations must be as "reads", and the weights.

    Raises:
        FileNotFoundError: if nothing in the folder is known.
        ValueError: if the weights are pickled or lack something, or the autoencoder is of another kind.
    """
    if (folder / "cfg.json").exists() and (folder / "sae.safetensors").exists():
        return _read_saeuron(folder)
    if (folder / "config.json").exists() and "n_dirs_local" in _json(folder / "config.json"):
        return _read_unbox(folder)
    raise FileNotFoundError(
        f"{folder} has no autoencoder: expected model.safetensors, or cfg.json and sae.safetensors (SAeUron), or"
        " config.json and state_dict.safetensors (sdxl-unbox)"
    )


def _read_saeuron(folder: pathlib.Path) -> tuple[dict, dict[str, torch.Tensor]]:
    settings = _json(folder / "cfg.json")
    if settings.get("input_unit_norm"):
        raise ValueError(
            f"the autoencoder in {folder} divides every position by its own spread (input_unit_norm), so a latent adds"
            " another amount at each position; here a latent is a fixed direction, and such files cannot be read"
        )
    tensors = _renamed(folder / "sae.safetensors", _SAEURON)
    return _config(settings["k"], "output", "SAeUron", settings, tensors), tensors


def _read_unbox(folder: pathlib.Path) -> tuple[dict, dict[str, torch.Tensor]]:
    settings, path = _json(folder / "config.json"), folder / "state_dict.safetensors"
    if not path.exists():
        raise ValueError(
            f"the weights in {folder} are not there, or pickled, and pickles can run code; if you trust them, convert"
            " them once: safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in torch.load("
            '"state_dict.pth", weights_only=True)["state_dict"].items()}, "state_dict.safetensors")'
        )
    tensors = _renamed(path, _UNBOX)
    tensors["decoder"] = tensors["decoder"].T.contiguous()
    return _config(settings["k"], "update", "sdxl-unbox", settings, tensors), tensors


def _renamed(path: pathlib.Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    found, _ = read_tensors(path)
    if missing := sorted(set(names.values()) - set(found)):
        raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(found))}")
    tensors = {ours: found[theirs].float() for ours, theirs in names.items()}
    return tensors | {"scale": torch.ones(()), "threshold": torch.zeros(())}


def _config(k: int, reads: str, origin: str, settings: dict, tensors: dict[str, torch.Tensor]) -> dict:
    n_latents, n_features = tensors["encoder"].shape
    metadata = {"origin": origin, "settings": settings}
    return {"n_features": n_features, "n_latents": n_latents, "k": int(k), "metadata": metadata, "reads": reads}


def _json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
