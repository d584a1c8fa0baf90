"""Fixtures and settings of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download anything

import hypothesis
import pytest
import torch

from tests import tiny

torch.set_num_threads(1)  # tiny tensors are not worth handing out to several threads

# Seeds fixed, no deadlines: results must not depend on how busy a machine is.
hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session")
def tiny_pipe():
    """A tiny random SD 1.x pipeline, shared: leave it as it was."""
    return tiny.stable_diffusion()


@pytest.fixture
def fresh_pipe():
    """A tiny random SD 1.x pipeline for one test, which may change it."""
    return tiny.stable_diffusion()
