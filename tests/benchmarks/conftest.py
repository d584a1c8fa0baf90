"""Fixtures of the benchmarks' tests."""

import pytest


@pytest.fixture(autouse=True)
def without_coverage(no_cover):
    """What is covered is told by the packages' own tests; on Python 3.11, measuring it costs half the time again."""


@pytest.fixture(scope="session")
def tiny_pipe():
    """As deep as SD 1.x, since reports count its 70 sites; shared: leave it as it was."""
    from tests import tiny

    return tiny.stable_diffusion(unet={"layers_per_block": 2})


@pytest.fixture(scope="session")
def small_pipe():
    """As `tiny_pipe` with every kind of site, but fewer of each: 29 in the U-Net. Shared: leave it as it was."""
    from tests import tiny

    unet = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    return tiny.stable_diffusion(unet=unet, text_encoder={"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def few_resamples():
    """Intervals of planted effects are told from their margins by fewer resamples than published ones have."""
    from benchmarks.reproduce import agreement, simultaneous

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simultaneous, "N_RESAMPLES", 2000)
        patch.setattr(agreement, "N_RESAMPLES", 400)
        simultaneous._draws.cache_clear()
        yield
    simultaneous._draws.cache_clear()
