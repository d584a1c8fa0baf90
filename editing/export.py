"""Edits for other programs: a pipeline folder with the edit in its weights; and LoRA files back to edits."""

import os
import pathlib

from diffusers import DiffusionPipeline

from editing import lora
from editing.edit import Edit, measure
from mediation.parameters import fingerprint
from mediation.provenance import provenance

EDIT_FILE = "edit.safetensors"


def export_pipeline(edit: Edit, pipe: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Writes the edited pipeline to a folder that `DiffusionPipeline.from_pretrained` loads; `pipe` stays as it is.

    The edit itself goes beside it, as "edit.safetensors", so that the folder tells what was done to it.

    Args:
        edit: what is added to the weights, as `Edit.apply` does.
        pipe: a pipeline with the weights that the edit was made for.
        folder: a new or an empty folder.

    Raises:
        FileExistsError: if the folder is not empty.
        RuntimeError, ValueError: as `Edit.apply` does.

    Example:
        >>> import editing, mediation, tempfile
        >>> pipe = mediation.load_pipeline()
        >>> edit = editing.quickfix(pipe, {"ink": "noto"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     editing.export_pipeline(edit, pipe, folder)
        ...     edited = mediation.load_pipeline(folder)
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    with edit.applied(pipe):
        pipe.save_pretrained(folder, safe_serialization=True)
    edit.save(folder / EDIT_FILE)


def import_lora(path: str | os.PathLike, pipe: DiffusionPipeline) -> Edit:
    """Reads a LoRA file as an edit of a pipeline: to apply, revert, add, compress or evaluate it.

    Args:
        path: a safetensors file by `Edit.export_lora`, or by others whose keys are laid out alike: a layer's path in
            the pipeline, as "unet.mid_block.….to_k", and "lora_A.weight" and "lora_B.weight" (PEFT), or
            "lora_linear_layer.down.weight", "lora.down.weight" and "….up.weight" (diffusers before that); or kohya's
            name for it, as "lora_unet_mid_block_…_to_k" or "lora_te_text_model_…", and "lora_down.weight",
            "lora_up.weight", "alpha". The alphas and rank-stabilised scales of PEFT's configuration, which diffusers
            keeps in the header, are heeded; where nothing tells alpha, it is the rank.
            Convolutions, DoRA, LoHa and the like are not read, nor layers named as in Stability's own checkpoints.
        pipe: the pipeline that it is for.

    Returns:
        The edit, not applied, with the pipeline's present weights as its base.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or changes what the pipeline has not, or something else than linear layers,
            or its header states another rank than its factors have.

    Example:
        >>> import editing, mediation, tempfile
        >>> pipe = mediation.load_pipeline()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     editing.quickfix(pipe, {"ink": "noto"}).export_lora(f"{folder}/ink.safetensors", format="kohya")
        ...     editing.import_lora(f"{folder}/ink.safetensors", pipe)
        <Edit by import_lora: 1 parameter, rank 4>
    """
    updates, note = lora.read(path, pipe)
    base = {name: fingerprint(pipe, name) for name in updates}
    metadata = {"method": "import_lora", "file": pathlib.Path(path).name, "base": base, **provenance(pipe)}
    return Edit(updates, {"parameters": measure(updates, base)}, metadata | ({"of": [note]} if note else {}))
