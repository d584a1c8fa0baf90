"""Lambda in units of the keys, and found by leaving templates out."""

import functools
import math

import pytest
import torch

import editing
from editing.associations import associate, text_sites
from editing.concepts import Request
from editing.pairing import pair_tokens
from editing.solvers import ridge

TEMPLATES = ("{}", "a {}", "a photo of {}", "A  {} in red")
FOLDS = torch.tensor([0, 1, 2, 1])  # by what stands before the concept


def known_of(pipe, **options):
    request = Request.of({"ink": "noto", "cat": "bird"}, TEMPLATES, ["dog"], {"ink": 2.0}, **options)
    (site,) = text_sites(pipe, None)
    return associate(pipe, site, pair_tokens(pipe, site.network, request, "last_subject"))


def edit_of(pipe, regularization):
    return editing.quickfix(
        pipe,
        {"ink": "noto", "cat": "bird"},
        templates=TEMPLATES,
        preserve=["dog"],
        weights={"ink": 2.0},
        regularization=regularization,
    )


def only(records):
    (record,) = records.values()
    return record


def test_relative_is_a_share_of_the_mean_eigenvalue(tiny_pipe):
    known = known_of(tiny_pipe)
    gram = (known.pairs.weights[:, None] * known.keys).T @ known.keys
    expected = 0.1 * float(torch.linalg.eigvalsh(gram).mean())
    edit = edit_of(tiny_pipe, editing.Relative(0.1))
    assert only(edit.report["regularization"])["lambda"] == pytest.approx(expected)
    assert edit.metadata["regularization"] == {"relative": 0.1}
    absolute = edit_of(tiny_pipe, expected)
    torch.testing.assert_close(only(edit.updates).dense(), only(absolute.updates).dense(), rtol=0, atol=1e-6)


def test_relative_does_not_depend_on_the_scale_of_the_keys():
    keys, residuals = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    answers = []
    for scale in (1.0, 1000.0):
        value = editing.Relative(0.3).value(float((scale * keys).square().sum()), 4)
        up, down = ridge(scale * keys, residuals, regularization=value)
        answers.append(scale * keys @ (up @ down).T)
    torch.testing.assert_close(*answers)


def test_auto_takes_the_lambda_that_serves_unseen_templates_best(tiny_pipe):
    """Every candidate is tried in the plainest way: an edit without a template and those like it, measured in them."""
    edit, known = edit_of(tiny_pipe, "auto"), known_of(tiny_pipe)
    found = only(edit.report["regularization"])
    wanted = torch.cat([known.residuals, torch.zeros(4, known.residuals.shape[1], dtype=torch.float64)])
    weights, templates = known.pairs.weights, FOLDS.repeat(3)
    unedited = float((weights[:, None] * wanted.square()).sum())
    errors = []
    for candidate in found["candidates"]:
        total = 0.0
        for out in range(3):
            seen = torch.where(templates == out, 0.0, weights)
            up, down = ridge(known.keys, known.residuals, regularization=candidate, weights=seen)
            missed = (known.keys @ (up @ down).T - wanted)[templates == out]
            total += float((weights[templates == out, None] * missed.square()).sum())
        errors.append(math.sqrt(total / unedited))
    assert found["held_out_errors"] == pytest.approx(errors, rel=1e-6)
    assert found["lambda"] == found["candidates"][errors.index(min(errors))]
    assert min(errors) < 0.98 * max(errors), "there was something to choose"
    chosen = edit_of(tiny_pipe, found["lambda"])
    assert torch.equal(only(edit.updates).dense(), only(chosen.updates).dense())
    again = edit_of(tiny_pipe, editing.Relative(found["relative"]))
    torch.testing.assert_close(only(again.updates).dense(), only(chosen.updates).dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("templates", [["{}"], ["a {}", "A {} in red", "a  {} cat"]])
def test_auto_needs_templates_that_start_differently(tiny_pipe, templates):
    """A causal encoder gives a word the same key whatever follows: what is left out would be there all the same."""
    known = [key for template in templates for key in associated(tiny_pipe, template)]
    assert all(torch.allclose(key, known[0], atol=1e-6) for key in known)
    for make in (editing.quickfix, functools.partial(editing.cross_attention_edit, tokens="last_subject")):
        with pytest.raises(ValueError, match=r'"auto" leaves out the templates that start with the same words'):
            make(tiny_pipe, {"ink": "noto"}, templates=templates, regularization="auto")


def associated(pipe, template):
    """Keys of the last token of "ink" in a template."""
    (site,) = text_sites(pipe, None)
    request = Request.of({"ink": "noto"}, [template], (), None)
    return associate(pipe, site, pair_tokens(pipe, site.network, request, "last_subject")).keys


@pytest.mark.parametrize(("factor", "error"), [(0, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_relative_is_checked_when_it_is_made(factor, error):
    with pytest.raises(error, match="regularization must be"):
        editing.Relative(factor)
