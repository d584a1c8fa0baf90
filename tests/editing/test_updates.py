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


def ablation(weight, places, share=1.0):
    places = torch.tensor(places, dtype=torch.int64)
    shares = torch.full((len(places),), share, dtype=torch.float64)
    return Sparse(weight.shape, places, -share * weight.flatten()[places], shares)


WEIGHT = torch.arange(1.0, 7.0).view(2, 3) / 3


@pytest.mark.parametrize("changed_before", [0.0, 5.0])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 2.0, -1.0, 0.0])
def test_an_ablation_takes_its_share_of_what_is_there(share, changed_before):
    update = ablation(WEIGHT, [0, 4]).scaled(share)
    now = WEIGHT + changed_before * (share != 0)  # else it adds 0
    expected = now.double().flatten()
    expected[[0, 4]] *= 1 - share
    assert torch.equal(update.changed(now).flatten(), expected)
    assert torch.equal(update.dense().float(), ablation(WEIGHT, [0, 4], share).dense().float())


def test_ablations_take_what_they_share_once():
    a, b = ablation(WEIGHT, [0, 1, 5]), ablation(WEIGHT, [1, 2, 5])
    for total in (a + b, b + a, a + b + a):
        assert total.indices.tolist() == [0, 1, 2, 5]
        assert total.changed(WEIGHT).flatten().tolist() == [0, 0, 0, WEIGHT[1, 0], WEIGHT[1, 1], 0]
        assert torch.equal(total.dense().float(), total.changed(WEIGHT).float() - WEIGHT), "what norms are taken of"
        assert torch.equal(b.changed(a.changed(WEIGHT)), total.changed(WEIGHT)), "as one on top of the other"
    assert torch.equal((a + b).scaled(0.5).changed(WEIGHT).flatten()[[0, 1, 2, 5]], WEIGHT.flatten()[[0, 1, 2, 5]] / 2)
    parts = a.scaled(0.5), b.scaled(0.75)
    for first, second in (parts, parts[::-1]):
        total = first + second
        expected = WEIGHT.double().flatten() * torch.tensor([1 / 2, 1 / 8, 1 / 4, 1, 1, 1 / 8])
        torch.testing.assert_close(total.changed(WEIGHT).flatten(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(second.changed(first.changed(WEIGHT)).flatten(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(total.dense(), total.changed(WEIGHT) - WEIGHT, rtol=1e-6, atol=1e-6)


def test_single_weights_are_taken_whatever_is_added_to_them_and_low_rank_changes_come_last():
    a, plain = ablation(WEIGHT, [0, 1]), Sparse((2, 3), torch.tensor([1, 2]), torch.tensor([5.0, 7.0]))
    for total in (a + plain, plain + a):
        assert total.changed(WEIGHT).flatten()[:3].tolist() == [0, 0, WEIGHT[0, 2] + 7]
        assert total.dense().flatten()[1] == -WEIGHT[0, 1]
    factors = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    for total in (a + factors, factors + a, (a + factors) + a):
        assert total.changed(WEIGHT).flatten()[:2].tolist() == [1, 1]
        assert torch.equal(total.changed(WEIGHT).flatten()[2:], WEIGHT.double().flatten()[2:] + 1)


@pytest.mark.parametrize(("places", "share"), [([0, 4], 1.0), ([0, 4], 0.3), ([], 1.0)])
def test_files_of_ablations_tell_shares(places, share):
    one, other = ablation(WEIGHT, places, share), ablation(WEIGHT, [1], 0.5)
    stored = [len(update.tensors.get("shares", ())) for update in (one, one + other)]
    assert stored == [len(places[:1]), len(places) + 1], "one for all if all are the same"
    for update in (one, one + other):
        again = assemble(WEIGHT.shape, update.tensors)
        assert torch.equal(again.shares, update.shares)
        assert torch.equal(again.changed(WEIGHT), update.changed(WEIGHT))
    silent = {name: tensor for name, tensor in one.tensors.items() if name != "shares"}
    assert assemble(WEIGHT.shape, silent, share=0.25).shares.tolist() == [0.25] * len(places)
    assert assemble(WEIGHT.shape, silent).shares.tolist() == [0] * len(places)


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
        ([0, 1], [1.0], r"one of each for each index, got \(2,\), \(1,\) and \(2,\)"),
        ([[0]], [[1.0]], "expected indices, values and shares"),
        ([1, 0], [1.0, 1.0], "indices must ascend from 0 to at most 3"),
        ([1, 1], [1.0, 1.0], "indices must ascend"),
        ([-1], [1.0], "indices must ascend"),
        ([4], [1.0], r"the last of shape \(2, 2\)"),
        ([0], [float("nan")], "the values or the shares are not finite"),
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
