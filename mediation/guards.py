"""Guards: pipelines that would ignore interventions, or skip them, are refused before any work."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from mediation.pipelines import family_of

# Of the hooks that diffusers keeps in a module's registry, those that leave every module running at every step. All
# others skip or reuse something: FirstBlockCache, FasterCache, PyramidAttentionBroadcast, MagCache, TaylorSeer, …
_HARMLESS_HOOKS = {
    "group_offloading",
    "layer_execution_tracker",
    "layerwise_casting",
    "lazy_prefetch_group_offloading",
    "peft_autocast_disable",
}
# packages that put a forward of their own in place of a module's, to reuse what earlier steps computed
_CACHING_PACKAGES = {"DeepCache", "cache_dit", "tgate"}
# schedulers that draw noise of their own for every row, which neither the seed of a case nor its generators reach
_UNSEEDED_SCHEDULERS = {"DPMSolverSDEScheduler"}


def check_traceable(pipe: DiffusionPipeline) -> None:
    """Checks that every module of the traced networks runs, with its hooks, whenever its network does.

    Fused projections, LoRA layers, other attention processors, other hooks and whole models that are offloaded to the
    CPU are no obstacle. Caches that are not known here are found out while tracing: see `rows.intervening`.

    Raises:
        ValueError: if something is compiled, cached or offloaded layer by layer, sampling needs more than text, or the
            scheduler's noise cannot be the same in all runs.
    """
    family = family_of(pipe)
    if problem := family.sampling_problem(pipe):
        raise ValueError(f"this {type(pipe).__name__} cannot be traced: {problem}")
    if unseeded := _UNSEEDED_SCHEDULERS & {ancestor.__name__ for ancestor in type(pipe.scheduler).__mro__}:
        raise ValueError(
            f"this {type(pipe).__name__} cannot be traced: its {min(unseeded)} draws noise of its own for every run,"
            ' and no seed reaches it; use DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), which solves'
            " the same equation with the noise of a generator"
        )
    for network in (*(encoder for encoder, _ in family.text_encoders), family.denoiser):
        for path, module in getattr(pipe, network).named_modules():
            if obstacle := _compiled(module) or _cached(module) or _offloaded(module):
                where = f"{network}.{path}" if path else network
                raise ValueError(f"this {type(pipe).__name__} cannot be traced: {where} {obstacle}")


def check_gradients_allowed() -> None:
    """Checks that gradients can be taken here; that `torch.no_grad` is on is no obstacle.

    Raises:
        ValueError: inside `torch.inference_mode`, which cannot be lifted for a while.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "gradients cannot be taken inside torch.inference_mode(): call this outside of it, or use torch.no_grad()"
        )


def _compiled(module: nn.Module) -> str | None:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    if in_place or "_orig_mod" in module._modules or hasattr(_own_forward(module), "_torchdynamo_orig_callable"):
        return "is compiled, and compiled modules ignore new hooks; load the pipeline without torch.compile"
    return None


def _cached(module: nn.Module) -> str | None:
    registry = vars(module).get("_diffusers_hook")  # not getattr, which is slow for what a module does not have
    if hooks := set(getattr(registry, "hooks", ())) - _HARMLESS_HOOKS:
        return f"has the hook {min(hooks)!r} of diffusers, which may skip modules; disable it (disable_cache)"
    package = (getattr(_own_forward(module), "__module__", None) or "").partition(".")[0]
    if package in _CACHING_PACKAGES:
        return f"is run by {package}, which reuses what earlier steps computed; disable it"
    return None


def _offloaded(module: nn.Module) -> str | None:
    if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
        return "is offloaded layer by layer, and its weights cannot be read; use enable_model_cpu_offload() instead"
    return None


def _own_forward(module: nn.Module):
    """The forward that was put in place of the one of the module's class, if any."""
    return vars(module).get("forward")
