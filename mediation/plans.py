"""Plans: everything that a backend needs to know of a trace, checked before any work starts."""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Sequence

import numpy
import torch
from diffusers import DiffusionPipeline

from mediation.cases import TOKEN_GROUPS, Case
from mediation.encoding import clean_groups, token_pairs
from mediation.guards import check_traceable
from mediation.metrics import Metric, default_metric, metric_name
from mediation.pipelines import expansion, family_of, tokenizers_of
from mediation.rows import MODES, N_CONTROLS, Intervention
from mediation.sampling import Sampling, sample_rows
from mediation.sites import Site, group_name, resolve
from mediation.windows import WHOLE, check_windows


@dataclasses.dataclass(frozen=True)
class Plan:
    """A trace, checked: what to run, and the labels of its results.

    Attributes:
        cases: the cases, all with the same number of draws.
        groups: sites that are restored together, one tuple per entry of the `site` dimension.
        metrics: what is measured.
        tokens: labels of the `token` dimension, or None.
        windows: (start, stop) fractions along the `window` dimension, or None.
        mode: "restore" or "knock_out", as of every intervention.
        sampling: how images are sampled.
        batch_size: rows of one call of the pipeline, controls included.
        several_metrics: whether results have a `metric` dimension.
        pictured: indices of the groups whose images are kept, next to the clean and the corrupted image; None keeps no
            image at all.
        progress: whether to show a progress bar.
        places: indices (site, token, window) of the only interventions to run; None is all.
    """

    cases: tuple[Case, ...]
    groups: tuple[tuple[Site, ...], ...]
    metrics: tuple[Metric, ...]
    tokens: tuple[str | int, ...] | None
    windows: tuple[tuple[float, float], ...] | None
    mode: str
    sampling: Sampling
    batch_size: int
    several_metrics: bool
    pictured: tuple[int, ...] | None
    progress: bool
    places: frozenset[tuple[int, int, int]] | None = None

    @property
    def n_draws(self) -> int:
        """Draws per case."""
        return self.cases[0].corruption.draws

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes of (site, token, window); a dimension that is absent from results counts 1."""
        return len(self.groups), len(self.tokens or (None,)), len(self.windows or (None,))

    def blank(self) -> dict[str, numpy.ndarray]:
        """What a backend fills in: NaN for every number of a map, by variable, in the order of `schema.DIMS`."""
        whole = (len(self.cases), self.n_draws, len(self.metrics))
        each = (*whole[:2], *self.shape, whole[2])
        shapes = {"clean": whole, "corrupted": whole, "sham": each, "restored": each}
        return {name: numpy.full(shape, numpy.nan) for name, shape in shapes.items()}

    def absent(self, pipe: DiffusionPipeline) -> numpy.ndarray:
        """Where a case has no token to change, (case, site, token)."""
        found = numpy.ones((len(self.cases), *self.shape[:2]), bool)
        for c, case in enumerate(self.cases):
            for (i, j, _), _ in self.interventions(pipe, case):
                found[c, i, j] = False
        return found

    def interventions(self, pipe: DiffusionPipeline, case: Case) -> Iterator[tuple[tuple[int, int, int], Intervention]]:
        """Every intervention of a case by its index (site, token, window), but those without a token to change."""
        tokenizers = tokenizers_of(pipe)
        tokens = self.tokens or ("all",)
        pairs = {encoder: token_pairs(found, case, tokens) for encoder, found in tokenizers.items()}
        for i, group in enumerate(self.groups):
            encoders = {site.network for site in group} & set(tokenizers)
            for j in range(len(tokens)):
                here = {encoder: pairs[encoder][j] for encoder in encoders}
                if encoders and not any(here.values()):
                    continue
                for k, window in enumerate(self.windows or (WHOLE,)):
                    if self.places is None or (i, j, k) in self.places:
                        yield (i, j, k), Intervention(group, here, window, self.mode)

    def sample(self, pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention]) -> torch.Tensor:
        """Final latents of the clean row, the corrupted row and these rows, as of `sample_rows`."""
        return sample_rows(pipe, case, draw, rows, self.sampling)


def make_plan(
    pipe: DiffusionPipeline,
    cases: Case | Sequence[Case],
    *,
    sites: Sequence | None,
    metric: Metric | Sequence[Metric] | None,
    tokens: str | Sequence[str | int] | None,
    windows: str | Sequence[tuple[float, float]] | None,
    mode: str,
    sampling: Sampling,
    batch_size: int | None,
    images: str | Sequence | None,
    progress: bool,
) -> Plan:
    """Checks a trace's arguments against the pipeline. See `mediation.trace` for their meaning and errors."""
    family = family_of(pipe)
    check_traceable(pipe)
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(map(repr, MODES))}, got {mode!r}")
    cases = (cases,) if isinstance(cases, Case) else tuple(cases)
    if not cases:
        raise ValueError("no cases were given: pass at least one mediation.Case")
    for case in cases:
        if not isinstance(case, Case):
            raise TypeError(f"cases are mediation.Case objects, got {type(case).__name__}")
    if len({case.corruption.draws for case in cases}) > 1:
        raise ValueError("the cases have different numbers of draws: trace them separately")
    groups = _check_groups(pipe, sites, tokens, windows, sampling.branch)
    tokenizers = tokenizers_of(pipe)
    traces_text = any(site.network in tokenizers for group in groups for site in group)
    for case in cases:
        if traces_text and getattr(case.corruption, "where", "input") == "output":
            raise ValueError(
                'a corruption with where="output" enters behind the text encoder, so restoring sites of that cannot'
                ' matter: choose sites of the denoiser, or where="input"'
            )
        for tokenizer in tokenizers.values():  # raises if a subject is truncated
            for prompt in (case.prompt, case.corrupted_prompt):
                if expansion(pipe, tokenizer)(prompt) != prompt:
                    raise ValueError(
                        f"{prompt!r} holds a textual-inversion token of several vectors, which shifts all others: only"
                        " those of one vector can be traced"
                    )
            token_pairs(tokenizer, case, ())
    several = metric is not None and not callable(metric)
    metrics = tuple(metric) if several else (metric or default_metric(pipe),)
    for found in metrics:
        if not callable(found):
            raise TypeError(f"a metric is a function of (images, latents, cases), got {type(found).__name__}")
        getattr(found, "check", lambda cases: None)(cases)
    _check_names(metrics)
    if batch_size is None:
        # as much activation memory as 16 rows of 64×64 latents, within reason
        _, height, width = family.latent_shape(pipe)
        batch_size = max(4, min(64, 16 * 64 * 64 // (height * width)))
    batch_size = checked_integer("batch_size", batch_size)
    if batch_size <= N_CONTROLS:
        raise ValueError(f"batch_size counts the clean and the sham row too: it must be at least 3, got {batch_size}")
    return Plan(
        cases=cases,
        groups=groups,
        metrics=metrics,
        tokens=_check_tokens(pipe, cases, tokens),
        windows=check_windows(pipe, windows, sampling.num_inference_steps),
        mode=mode,
        sampling=sampling,
        batch_size=batch_size,
        several_metrics=several,
        pictured=_check_images(groups, images),
        progress=progress,
    )


def checked_integer(name: str, value: int) -> int:
    """A whole number, of whatever type.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is a whole number, got {value!r}")
    return int(value)


def _check_names(metrics: Sequence[Metric]) -> None:
    if not metrics:
        raise ValueError("metric is an empty list: pass at least one, or None for the default")
    names = [metric_name(metric) for metric in metrics]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"several metrics are called {', '.join(repeated)}: give each a name of its own")


def _check_groups(pipe, sites, tokens, windows, branch) -> tuple[tuple[Site, ...], ...]:
    encoders = tokenizers_of(pipe)
    groups = resolve(pipe, sites)
    if tokens is not None and windows is not None:
        raise ValueError("tokens are places in the text encoder, which runs once; windows are times of the denoiser")
    if sites is None and tokens is not None:
        groups = [group for group in groups if group[0].network in encoders]
    elif sites is None and (windows is not None or branch == "uncond"):
        groups = [group for group in groups if group[0].network not in encoders]
    if branch == "uncond" and any(site.network in encoders for group in groups for site in group):
        raise ValueError('text-encoder sites feed the conditional half only: branch must be "cond" or "both"')
    together = [frozenset(group) for group in groups]
    if repeated := [group_name(group) for i, group in enumerate(groups) if together[i] in together[:i]]:
        raise ValueError(f"the same sites are given twice: {', '.join(repeated)}")
    for group in groups:
        for site in group:
            if tokens is not None and site.network not in encoders:
                raise ValueError(f"tokens restores positions of text-encoder sites, and {site.name!r} has none")
            if windows is not None and site.network in encoders:
                raise ValueError(
                    f"windows restores the denoiser for a while, and {site.name!r} runs only once, before it"
                )
    return tuple(groups)


def _check_images(groups, images) -> tuple[int, ...] | None:
    if images is None:
        return None
    if images == "all":
        return tuple(range(len(groups)))
    names = [group_name(group) for group in groups]
    wanted = [group_name(entry) for entry in ([images] if isinstance(images, str | Site) else images)]
    for name in wanted:
        if name not in names:
            raise KeyError(f'images of {name!r}, but this site is not traced; images is "all", or names among sites')
    return tuple(names.index(name) for name in dict.fromkeys(wanted))


def _check_tokens(pipe, cases, tokens) -> tuple[str | int, ...] | None:
    if tokens is None:
        return None
    tokenizers = tokenizers_of(pipe).values()
    if isinstance(tokens, str) and tokens == "each":
        n_tokens = [clean_groups(tokenizer, case)["eos"][0] + 1 for tokenizer in tokenizers for case in cases]
        return tuple(range(max(n_tokens)))
    window = max(tokenizer.model_max_length for tokenizer in tokenizers)
    is_one = isinstance(tokens, str) or not isinstance(tokens, Iterable)
    tokens = tuple(_check_token(token, window) for token in ([tokens] if is_one else tokens))
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"tokens must name at least one group or position, each once; got {tokens}")
    return tokens


def _check_token(token, window: int) -> str | int:
    if isinstance(token, str):
        if token not in TOKEN_GROUPS:
            raise ValueError(f'no token group {token!r}; the groups are {", ".join(TOKEN_GROUPS)}, or "each"')
        return str(token)
    if not isinstance(token, numbers.Integral) or isinstance(token, bool):
        raise TypeError(f"tokens are names of groups or positions, which are integers; got {token!r}")
    if not 0 <= token < window:
        raise ValueError(f"token position {token} is outside the window of {window}")
    return int(token)
