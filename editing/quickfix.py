"""Diff-QuickFix: edits a concept in closed form where a text encoder first reads it (Basu et al., arXiv:2310.13730)."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from diffusers import DiffusionPipeline

from editing.assembly import closed_form_edit
from editing.associations import associate, outcome, parameter_name, text_sites
from editing.clock import Clock
from editing.concepts import Prompt, Request
from editing.edit import Edit
from editing.pairing import pair_tokens
from editing.regularization import Regularization, checked_lambda, choose_lambda
from editing.solvers import ridge
from editing.updates import LowRank
from mediation.parameters import fingerprint
from mediation.pipelines import family_of
from mediation.sites import Site


def quickfix(
    pipe: DiffusionPipeline,
    pairs: Mapping[str, str],
    *,
    templates: Iterable[str] | None = None,
    preserve: Iterable[str | Prompt] = (),
    regularization: Regularization = 0.01,
    tokens: str = "last_subject",
    site: Site | str | Sequence[Site | str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Edit:
    """Makes a text encoder read source concepts as target concepts; the pipeline is left as it was.

    A key k_i is the input of one linear layer at a token of a source prompt; its wanted value v_i = W0 k'_i is what the
    layer, bias apart, gives at the token's partner k'_i in the target prompt. With D the change of the layer's W0,

        minimise over D:  sum_i w_i ||(W0 + D) k_i - v_i||^2 + sum_j w_j ||D p_j||^2 + lambda ||D||^2

    where p_j are the keys of what is preserved. All concepts are solved for at once, in float64; the rank of the
    change is at most the number of edited keys.

    Args:
        pipe: a pipeline of a supported family; it runs up to the edited layer of its text encoder.
        pairs: source concept -> target concept, in words: {"ink": "noto"}.
        templates: texts with one "{}" each, which every concept is put through; None is the paper's four: "{}",
            "A photo of {}", "An image of {}", "A picture of {}".
        preserve: what is to keep its values. A string is a concept, put through the same templates; `Prompt(text)` is
            a whole prompt, all of whose tokens count, first and end token included and padding left out.
        regularization: lambda > 0, in squared units of the keys. Smaller follows the targets more closely and changes
            more; the paper uses 0.01. `Relative(factor)` is factor * trace(K W K^T) / d_in. "auto" is the lambda,
            among `Relative` ones, with which solutions found without one template miss least in that template, summed
            over templates, concepts and preserved concepts. Templates with the same words before "{}" are left out
            together, since a concept's last token has the same key in all of them. No image is made, and concepts not
            named have no say.
        tokens: which tokens are edited. "last_subject": the last token of each concept. "subject": all its tokens,
            aligned from the end; the first tokens of the longer concept have no partner, and are left alone.
            "from_subject": the last token and every later position of the window, by offset, as the paper's code.
            "all": the whole window; tokens before the concept are thereby preserved.
        site: self_attention or mlp sites of text encoders, or their names; None is the first self-attention of every
            text encoder, as in the paper. Several in one encoder are solved for in the order in which they run, each
            with the keys that it receives once those before it are edited.
        weights: concept, edited or preserved -> weight of each of its keys; 1 where absent. More templates, or more
            tokens, make more keys. A `Prompt` carries its own weight.

    Returns:
        The edit, not applied. Its report has, for each concept and network, the residual ||W K - V|| / ||V|| before
        and after, and the interference ||D P|| / ||W0 P|| on whatever is preserved; and, for each site, the lambda.

    Raises:
        KeyError: if `site` names no site of the pipeline.
        TypeError: if an argument is of another kind than documented.
        ValueError: if an argument is out of range, concepts are empty, equal or contradict each other or a preserved
            prompt, one is truncated by the text encoder's window, a site is not in a text encoder, or weights are
            not finite.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> edit = quickfix(pipe, {"ink": "noto"}, preserve=["cat"])
        >>> edit
        <Edit by quickfix: 1 parameter, rank 4>
        >>> before, after = (edit.report["residual"][0][when] for when in ("before", "after"))
        >>> after < before
        True
    """
    clock = Clock()
    family_of(pipe)
    request = Request.of(pairs, templates, preserve, weights)
    chosen = text_sites(pipe, site)
    # Find all tokens first: a truncated concept must fail before anything runs.
    found = [pair_tokens(pipe, site.network, request, tokens) for site in chosen]
    regularization = checked_lambda(regularization, *found)
    clock.lap("tokens")

    updates, base, report = {}, {}, {"residual": [], "interference": [], "regularization": {}}
    with contextlib.ExitStack() as edited:
        for i, (site, token_pairs) in enumerate(zip(chosen, found, strict=True)):
            known = associate(pipe, site, token_pairs)
            clock.lap("keys")
            value, report["regularization"][site.name] = choose_lambda(regularization, known)
            update = LowRank(*ridge(known.keys, known.residuals, regularization=value, weights=token_pairs.weights))
            clock.lap("solve")
            name = parameter_name(pipe, site)
            updates[name], base[name] = update, fingerprint(pipe, name)
            for kind, entries in outcome({"network": site.network, "site": site.name}, known, update).items():
                report[kind] += entries
            clock.lap("report")
            if any(later.network == site.network for later in chosen[i + 1 :]):
                edited.enter_context(Edit({name: update}, {}, {"base": {name: base[name]}}).applied(pipe))
    options = {"regularization": regularization, "tokens": tokens, "sites": [site.name for site in chosen]}
    return closed_form_edit(pipe, request, updates, base, report, clock, method="quickfix", **options)
