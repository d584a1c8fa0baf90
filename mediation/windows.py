"""Windows: spans of sampling in which sites of the denoiser are changed, as fractions of it."""

import itertools
from collections.abc import Iterable

from diffusers import DiffusionPipeline

from mediation.rows import Intervention
from mediation.sampling import n_iterations

Window = tuple[float, float]

WHOLE: Window = (0.0, 1.0)


def check_windows(
    pipe: DiffusionPipeline, windows: str | Iterable[Window] | None, num_inference_steps: int
) -> tuple[Window, ...] | None:
    """The windows that a user asks for, each of which is open at some iteration of sampling.

    Args:
        pipe: the pipeline.
        windows: (start, stop) fractions, or "each" for one per iteration; None stays None.
        num_inference_steps: sampler steps.

    Raises:
        TypeError: if a window is no pair of numbers.
        ValueError: if one lies outside of sampling, holds no iteration of it, or is given twice.

    Example:
        >>> import mediation
        >>> check_windows(mediation.load_pipeline(), "each", 2)
        ((0.0, 0.5), (0.5, 1.0))
    """
    if windows is None:
        return None
    # Heun's and PNDM's schedulers iterate more often than they are told to step
    n = n_iterations(pipe, num_inference_steps)
    if isinstance(windows, str):
        if windows != "each":
            raise ValueError(f'windows is "each", for one per iteration, or a list of (start, stop), got {windows!r}')
        windows = itertools.pairwise(i / n for i in range(n + 1))
    found = tuple(map(_pair, windows if isinstance(windows, Iterable) else [windows]))
    if not found:
        raise ValueError("windows is empty: pass None, or a list of (start, stop) fractions of sampling")
    names = [window_name(window) for window in found]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"windows are given twice: {', '.join(repeated)}")
    for window in found:
        if not any(Intervention(window=window).covers(i / n) for i in range(n)):
            raise ValueError(
                f"nothing happens in the window {window}: this scheduler's {n} iterations are at 0, 1/{n}, …,"
                f" {n - 1}/{n} of sampling; widen it, or sample in more steps"
            )
    return found


def window_name(window: Window) -> str:
    """How results call a window.

    Example:
        >>> window_name((0.0, 1 / 3))
        '0–0.333333'
    """
    return "–".join(f"{fraction:g}" for fraction in window)


def _pair(window: Window) -> Window:
    try:
        start, stop = map(float, window)
    except (TypeError, ValueError) as error:
        raise TypeError(f"windows are (start, stop) fractions of sampling, as [(0, 0.5)]; got {window!r}") from error
    if not 0 <= start < stop <= 1:
        raise ValueError(f"a window is (start, stop) with 0 <= start < stop <= 1, got {(start, stop)}")
    return start, stop
