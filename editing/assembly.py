"""From solved changes to an edit: the report and the metadata that all closed forms share."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline

from editing.clock import Clock
from editing.concepts import Request
from editing.edit import Edit, measure
from editing.regularization import Regularization, describe_lambda
from editing.updates import LowRank
from mediation.provenance import provenance


def closed_form_edit(
    pipe: DiffusionPipeline,
    request: Request,
    updates: Mapping[str, LowRank],
    base: Mapping[str, Mapping],
    report: Mapping,
    clock: Clock,
    *,
    method: str,
    regularization: Regularization,
    **options: object,
) -> Edit:
    """An edit that tells all that is needed to make it again.

    Args:
        pipe: the pipeline that it was made for.
        request: what was asked for.
        updates: by parameter name.
        base: fingerprints of the same parameters.
        report: what the method reports of its own; norms and times are added.
        clock: of the method; the time since its last lap counts towards the report.
        method: its name.
        regularization: as the user passed it.
        **options: others, as plain JSON.
    """
    parameters = measure(updates, base)
    clock.lap("report")
    metadata = {"method": method, **request.describe(), "regularization": describe_lambda(regularization), **options}
    metadata |= {"base": base, **provenance(pipe)}
    return Edit(updates, {**report, "parameters": parameters} | clock.report, metadata)
