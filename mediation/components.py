"""CAD: what each single weight contributes to drawing a concept, to first order (Nguyen et al., arXiv:2412.02542)."""

import numbers
from collections.abc import Iterable, Sequence

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from mediation.adjoint import rows_with_graph, uncheckpointed
from mediation.guards import check_gradients_allowed, check_traceable
from mediation.objectives import amplify_objective, erase_objective
from mediation.parameters import choose, fingerprint, locate
from mediation.pipelines import family_of, tokenizers_of
from mediation.provenance import provenance
from mediation.sampling import Sampling
from mediation.sites import Site
from mediation.weightscores import Attribution

OBJECTIVES = ("erase", "amplify")
GUIDANCE_SCALE = 3.0  # of drawn pictures, as in the paper's release


def attribute(
    pipe: DiffusionPipeline,
    concept: str,
    *,
    base: str = "",
    objective: str = "erase",
    parameters: Site | str | Sequence[Site | str] | None = None,
    images: torch.Tensor | Sequence[PIL.Image.Image] | None = None,
    seeds: int | Sequence[int] = 0,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Attribution:
    """Scores single weights by what they contribute to drawing a concept; the pipeline is only read.

    The score of a weight is w_i · dJ/dw_i: to first order, by how much J would fall if it were 0. With e the denoiser's
    prediction (of the noise, or of whatever it was trained on), c the concept and E the mean over x_t and t,

        erase:    J =  E ||e(x_t, base, t) − e(x_t, c, t)||²    with the first term held fixed
        amplify:  J = −E ||noise − e(x_t, c, t)||²              on images of the concept

    For erasing, one trajectory from each seed serves every t: each x_t that the sampler visits, on its way to a
    picture of the concept, is scored at its own t. Gradients are summed in float32.

    Args:
        pipe: a diffusers pipeline of a supported family.
        concept: a prompt, such as "ink style".
        base: for erasing, the prompt that stands for its absence.
        objective: "erase" or "amplify".
        parameters: sites, or globs of their names, which stand for their weights without biases; or globs of names of
            parameters, as "unet.conv_in.*". None is the feed-forwards of the denoiser.
        images: for amplifying, pictures of the concept: PIL images, read as RGB, or a tensor (image, 3, height, width)
            in [0, 1], resized to the pipeline's size, and each noised from every seed. None draws one from each seed.
        seeds: of the trajectories and the noise.
        num_inference_steps: sampler steps, and t per trajectory or image.
        guidance_scale: classifier-free guidance of what is drawn; None is 3, as in the paper. It has no meaning where
            images are given.
        batch_size: (x_t, t) that go through the denoiser together. None suits the latents' size.
        progress: shows progress bars on a terminal.

    Returns:
        The scores, with the weights that they are of.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> found = mediation.attribute(pipe, "ink style", parameters="unet.mid.*", num_inference_steps=2)
        >>> found.scores["unet.mid_block.resnets.0.conv1.weight"].shape
        torch.Size([192, 192, 3, 3])
    """
    check_traceable(pipe)
    check_gradients_allowed()
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    _check(pipe, concept, base, objective, images, guidance_scale, seeds, batch_size)
    seeds = [int(seed) for seed in seeds]
    sampling = Sampling(num_inference_steps, GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
    sites = choose(pipe, parameters)
    places = {name: locate(pipe, name) for name in sites}  # raises if one is offloaded
    pixels = None if images is None else _pixels(pipe, images)
    options = {"seeds": seeds, "sampling": sampling, "batch_size": batch_size or rows_with_graph(pipe)}
    options["progress"] = progress
    # The denoiser may save memory by checkpointing. Text encoders read no gradient, and so could lose those of weights.
    with uncheckpointed(getattr(pipe, name) for name in tokenizers_of(pipe)):
        if objective == "erase":
            found = erase_objective(pipe, concept, base, **options)
        else:
            found = amplify_objective(pipe, concept, pixels, **options)
        value, gradients = found.gradients(pipe, sites, batch_size=options["batch_size"], progress=progress)
    weights = {name: getattr(*place).detach().cpu().clone() for name, place in places.items()}
    metadata = {
        "objective": objective,
        "concept": concept,
        "base_prompt": base,
        "value": value,
        "n_rows": len(found.latents),
        "n_images": None if pixels is None else len(pixels),
        "seeds": seeds,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": sampling.guidance_scale if images is None else None,
        "scheduler": type(pipe.scheduler).__name__,
        **provenance(pipe),
    }
    return Attribution(
        scores={name: weights[name].float() * gradient for name, gradient in gradients.items()},
        weights=weights,
        sites=sites,
        base={name: fingerprint(pipe, name) for name in sites},
        metadata=metadata,
    )


def _check(pipe, concept, base, objective, images, guidance_scale, seeds, batch_size) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    for what, prompt in (("the concept", concept), ("the base", base)):
        if not isinstance(prompt, str):
            raise TypeError(f"{what} must be a string, got {type(prompt).__name__}")
    if not concept.strip():
        raise ValueError("the concept is empty: name it in words")
    if objective == "erase" and concept.strip() == base.strip():
        raise ValueError(f"the concept and the base are the same prompt, {concept!r}: their predictions do not differ")
    if objective == "erase" and images is not None:
        raise ValueError('images are for objective="amplify": erasing scores latents on the way to pictures')
    if images is not None and guidance_scale is not None:
        raise ValueError("guidance_scale is of pictures that are drawn, and images are given: leave out one of them")
    if objective == "amplify" and base:
        raise ValueError(f'base is for objective="erase": amplifying compares with the noise, not with {base!r}')
    whole = all(isinstance(seed, numbers.Integral) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different integers of at least 0, got {seeds}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    predicted = pipe.scheduler.config.get("prediction_type")
    known = predicted in ("epsilon", "v_prediction", "sample") and hasattr(pipe.scheduler, "alphas_cumprod")
    if objective == "amplify" and not known:
        scheduler = f"{type(pipe.scheduler).__name__} with prediction_type={predicted!r}"
        raise ValueError(f"amplifying must know how images are noised, and {scheduler} does not say: use DDIMScheduler")


def _pixels(pipe: DiffusionPipeline, images: torch.Tensor | Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Images as the VAE reads them, in [-1, 1], (image, 3, height, width)."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"expected images of shape (image, 3, height, width), got {tuple(images.shape)}")
        if not (images.is_floating_point() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images must hold real numbers in [0, 1]; these are {images.dtype} of another range")
    elif not images or not all(isinstance(image, PIL.Image.Image) for image in images):
        raise TypeError("images must be a tensor (image, 3, height, width) or a list of PIL images")
    else:
        images = [image.convert("RGB") for image in images]
    height, width = (side * pipe.vae_scale_factor for side in family_of(pipe).latent_shape(pipe)[1:])
    return pipe.image_processor.preprocess(images, height, width)
