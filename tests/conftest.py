"""Fixtures and settings of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download anything

import hypothesis
import pytest

# Nothing here imports torch: xdist's controller reads this file before it starts the workers, which wait for it.

# Seeds fixed, no deadlines: results must not depend on how busy a machine is.
hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are not worth handing out to several threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipe():
    """A tiny random SD 1.x pipeline, shared: leave it as it was."""
    from tests import tiny

    return tiny.stable_diffusion()


@pytest.fixture(scope="session")
def shallow_pipe():
    """As `tiny_pipe` with two levels in place of four, where depth does not matter; shared: leave it as it was."""
    from tests import tiny

    return tiny.shallow()


@pytest.fixture
def fresh_pipe():
    """A tiny random SD 1.x pipeline for one test, which may change it."""
    from tests import tiny

    return tiny.stable_diffusion()


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def sd_pipe(request):
    """A tiny random pipeline of SD 1.x or 2.x, shared: leave it as it was."""
    from tests import tiny

    return tiny.FAMILIES[request.param]()
