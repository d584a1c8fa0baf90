"""Trainings are compared on the same batches, by what they explain of activations that none of them saw."""

import importlib.metadata
import importlib.util

import pytest
import torch

from benchmarks.speed import autoencoders


@pytest.fixture
def activations():
    """Positions that hold one of four directions each."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(4, (1000,), generator=random)
    return torch.eye(6)[chosen] * (1 + torch.rand(1000, 1, generator=random))


def test_what_is_installed_is_compared(activations, monkeypatch):
    seen = []

    def by_the_mean(batches, n_latents, k, rate):
        def run():
            seen.append(torch.cat(list(batches)))
            return lambda held_out: seen[-1].mean(0).expand_as(held_out)

        return run

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "sae_lens" or None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"version of {name}")
    monkeypatch.setattr(autoencoders, "by_saelens", by_the_mean)
    found = autoencoders.compare(activations, n_latents=8, k=1, batch_size=100, repeats=2)
    assert found["n_positions"] == 900, "50 are held out, and the last 50 fill no batch"
    assert [len(batch) for batch in seen] == [900] * 3, "one turn warms up"
    size = activations.square().mean().sqrt()
    rows = {tuple(row) for row in (activations / size).tolist()}
    assert {tuple(row) for row in seen[0].tolist()} < rows
    explained = found["explained_variance"]
    assert explained["sae-lens"]["median"] == pytest.approx(0, abs=0.02)
    assert explained["this project"]["low"] == explained["this project"]["high"] > 0.1
    assert found["missing"] == ["dictionary-learning"]
    assert found["versions"] == {"sae-lens": "version of sae-lens"}
    speeds = found["positions_per_second"]
    ours, others = speeds["this project"], speeds["sae-lens"]
    assert ours["low"] / others["high"] <= found["speedup"]["sae-lens"]["median"] <= ours["high"] / others["low"]


def test_the_report_says_what_was_measured():
    spread = {"median": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    training = {
        "n_positions": 1000,
        "n_features": 128,
        "n_latents": 512,
        "k": 10,
        "batch_size": 100,
        "missing": ["dictionary-learning"],
        "positions_per_second": {"this project": spread, "sae-lens": spread},
        "explained_variance": {"this project": spread, "sae-lens": spread},
        "speedup": {"sae-lens": {"median": 2.0, "low": 1.5, "high": 2.5, "n": 3}},
    }
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "load": 0.5}
    page = autoencoders.markdown({"machine": machine, "training": training, "memory": {8192: 12.3}})
    assert "| sae-lens | 0.5 [0.4, 0.6] | 50.0% [40.0%, 60.0%] | 2x [1.5, 2.5] as fast |" in page
    assert "Not installed, and not compared: dictionary-learning." in page
    assert "| 8,192 | 4 | 12 |" in page
