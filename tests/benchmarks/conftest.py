"""Fixtures of the tests of benchmarks."""

import pytest


@pytest.fixture(scope="session")
def tiny_pipe():
    """As deep as SD 1.x, since reports count its 70 sites; shared: leave it as it was."""
    from tests import tiny

    return tiny.stable_diffusion(unet={"layers_per_block": 2})
