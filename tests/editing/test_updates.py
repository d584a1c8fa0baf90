"""Changes of single weights, alone and on top of low-rank ones, against dense arithmetic."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editing.updates import LowRank, Mixed, Sparse, assemble, describe_extent, merged_extent

SHAPE = (4, 5)


def sparse(seed, shape=SHAPE):
    random = numpy.random.default_rng(seed)
    n = int(numpy.prod(shape))
    indices = numpy.flatnonzero(random.random(n) < 0.4)
    return Sparse(shape, torch.tensor(indices), torch.tensor(random.normal(size=len(indices))))


def low_rank(seed, shape=SHAPE):
    random = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(shape[0], 2, generator=random), torch.randn(2, shape[1], generator=random))


KINDS = {"low_rank": low_rank, "sparse": sparse, "mixed": lambda seed: low_rank(seed) + sparse(seed + 100)}


def test_a_sparse_change_puts_values_where_indices_say():
    update = Sparse((2, 2, 1), torch.tensor([0, 3]), torch.tensor([1.5, -2.0]))
    assert update.dense().tolist() == [[[1.5], [0.0]], [[0.0], [-2.0]]]
    assert update.dense().dtype == torch.float64
    assert update.norm() == 2.5
    assert update.scaled(-2).dense().flatten().tolist() == [-3.0, 0.0, 0.0, 4.0]


@given(a=st.sampled_from(list(KINDS)), b=st.sampled_from(list(KINDS)), seed=st.integers(0, 20))
def test_sums_of_all_kinds_are_dense_sums(a, b, seed):
    first, second = KINDS[a](seed), KINDS[b](seed + 50)
    total = first + second
    numpy.testing.assert_allclose(total.dense(), first.dense() + second.dense(), rtol=1e-6, atol=1e-6)
    assert total.norm() == pytest.approx(numpy.linalg.norm(total.dense().numpy()), rel=1e-6)
    numpy.testing.assert_allclose(total.scaled(0.5).dense(), total.dense() / 2, rtol=1e-6, atol=1e-6)
    assert type(total) is (type(first) if a == b else Mixed), "no low-rank change becomes dense, nor a sparse one"
    assert total.shape == SHAPE


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_what_the_update_is(kind):
    update = KINDS[kind](0)
    again = assemble(SHAPE, update.tensors)
    assert type(again) is type(update)
    assert torch.equal(again.dense(), update.dense())
    if kind == "sparse":
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in update.tensors.values())
        assert n_bytes == 8 * len(update.indices), "four for the index, four for the value"


def test_extents_are_added_up_and_told():
    extents = [{"rank": 4}, {"n_changed": 1200}, {"rank": 2, "n_changed": 34}]
    assert merged_extent(extents) == {"rank": 4, "n_changed": 1234}
    assert describe_extent(merged_extent(extents)) == "rank 4, 1,234 weights"
    assert describe_extent({"n_changed": 1}) == "1 weight"
    assert describe_extent({}) == "rank 0"


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        ([0, 1], [1.0], r"one value for each index, got \(2,\) and \(1,\)"),
        ([[0]], [[1.0]], "expected indices and values"),
        ([1, 0], [1.0, 1.0], "indices must ascend from 0 to at most 3"),
        ([1, 1], [1.0, 1.0], "indices must ascend"),
        ([-1], [1.0], "indices must ascend"),
        ([4], [1.0], r"the last of shape \(2, 2\)"),
        ([0], [float("nan")], "the values are not finite"),
    ],
)
def test_indices_and_values_must_fit(indices, values, message):
    with pytest.raises(ValueError, match=message):
        Sparse((2, 2), torch.tensor(indices), torch.tensor(values))


def test_shapes_must_agree():
    for other in (sparse(0, (5, 4)), low_rank(0, (5, 4))):
        for update in (low_rank(0), sparse(0), low_rank(0) + sparse(0)):
            with pytest.raises(ValueError, match=r"cannot add changes of shapes"):
                update + other
    with pytest.raises(TypeError):
        sparse(0) + 1
    with pytest.raises(TypeError):
        KINDS["mixed"](0) + 1
