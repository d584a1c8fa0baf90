"""Loading a pipeline, and finding what is known of its architecture."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from torch import nn
from transformers import PreTrainedTokenizerBase

from mediation.families import FAMILIES


def load_pipeline(name: str | pathlib.Path | None = None, **options) -> DiffusionPipeline:
    """Loads a text-to-image pipeline: the bundled Emoji Diffusion, a local folder, or a hub id.

    Args:
        name: a pipeline's folder or hub id; None is the bundled model.
        **options: passed to `DiffusionPipeline.from_pretrained`; without a dtype among them, weights become float32.

    Returns:
        The pipeline, loaded from safetensors files only, on the CPU and in evaluation mode.

    Raises:
        ValueError: if the pipeline belongs to no supported family, or pickled weights are asked for.

    Example:
        >>> pipe = load_pipeline()
        >>> pipe.unet.config.sample_size
        16
    """
    if name is None:
        from mediation.bundled import pipeline_folder

        name = pipeline_folder()
    if not options.get("use_safetensors", True):
        raise ValueError("weights are read from safetensors files only: pickles can run code when they are loaded")
    options = {"use_safetensors": True, "low_cpu_mem_usage": is_accelerate_available()} | options
    pipe = DiffusionPipeline.from_pretrained(str(name), **options)
    if not {"torch_dtype", "dtype"} & set(options):
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.float(part)  # diffusers' own method warns, even where there is nothing to warn of
    family_of(pipe)
    return pipe


def family_of(pipe: DiffusionPipeline) -> type:
    """The family whose facts describe `pipe`.

    Raises:
        TypeError: if `pipe` is not a diffusers pipeline.
        ValueError: if its class belongs to no supported family, or if it lacks a part.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"expected a diffusers pipeline, got {type(pipe).__name__}; see mediation.load_pipeline")
    for family in FAMILIES:
        if type(pipe).__name__ in family.pipelines:
            if problem := family.problem(pipe):
                raise ValueError(f"this {type(pipe).__name__} cannot be used: {problem}")
            return family
        if type(pipe).__name__ in family.image_pipelines:
            raise ValueError(
                f"a {type(pipe).__name__} starts from an image, which a case does not have; use its networks as text to"
                f" image, with diffusers.{family.pipelines[0]}.from_pipe(pipe)"
            )
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ValueError(f"no family is known for {type(pipe).__name__}; supported pipelines: {known}")


def tokenizers_of(pipe: DiffusionPipeline) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of every text encoder, by the encoder's name, in the order in which they run."""
    return {encoder: getattr(pipe, tokenizer) for encoder, tokenizer in family_of(pipe).text_encoders}


def expansion(pipe: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """How the pipeline spells out textual-inversion tokens that stand for several vectors."""
    convert, added = getattr(pipe, "maybe_convert_prompt", None), tokenizer.added_tokens_encoder
    # Further vectors of a token are called so. Without any, the pipeline would tokenize each text to find nothing.
    several = any(f"{token}_1" in added for token in added)
    return (lambda text: convert(text, tokenizer)) if convert and several else (lambda text: text)


@contextlib.contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Silences the pipeline's own progress bar for a while."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
