"""The direct effect of text: cross-attention layers read another run's prompt, and nothing else changes by hand."""

import dataclasses

import numpy
from diffusers import DiffusionPipeline

from mediation.pipelines import family_of
from mediation.plans import Plan
from mediation.restoration import restoration
from mediation.sites import Site, sites


def direct_effect(pipe: DiffusionPipeline, plan: Plan) -> dict[str, numpy.ndarray]:
    """Lets cross-attention layers read the other run's prompt (Basu et al. 2024, arXiv:2405.01008).

    A corrupted run whose layer reads the clean prompt; with knocked-out sites, a clean run whose layer reads the
    corrupted prompt, as in the paper. The layer's queries stay those of its own run: unlike the output of a
    cross-attention, what is replaced depends on text alone.

    Args:
        pipe: the pipeline.
        plan: its groups are cross-attentions that read the other prompt together.

    Returns:
        As `restoration` does.

    Raises:
        ValueError: before any work, if a site is no cross-attention, or if the branch is not "cond".
    """
    if plan.sampling.branch != "cond":
        raise ValueError(
            f'only the conditional half reads the prompt: branch must be "cond", got {plan.sampling.branch!r}'
        )
    groups = tuple(tuple(door for site in group for door in _doors(pipe, site)) for group in plan.groups)
    return restoration(pipe, dataclasses.replace(plan, groups=groups))


def text_layers(pipe: DiffusionPipeline) -> list[Site]:
    """The layers whose direct effect can be measured, in execution order."""
    return sites(pipe, network=family_of(pipe).denoiser, component="cross_attention")


def _doors(pipe: DiffusionPipeline, site: Site) -> list[Site]:
    """Where a cross-attention reads text, as sites."""
    if site.component != "cross_attention" or site.head is not None:
        raise ValueError(f"a direct effect is one of whole cross-attention layers, and {site.name!r} is none")
    paths = family_of(pipe).text_doors(getattr(pipe, site.network))
    return [dataclasses.replace(site, path=path) for path in paths if path.startswith(f"{site.path}.")]
