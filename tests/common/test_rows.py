"""Orthonormal bases of long rows, against numpy's and scipy's dense linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics import rows
from common.numerics.rows import fix_signs, orthonormal, random_start, residual_gram, right_singular
from tests.common.strategies import bits
from tests.common.test_subspace import F32, F64, LIMIT, defect, rotation, sine


def test_orthonormal_rows_span_what_was_given():
    V = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 90)))
    before = V.clone()
    Q = orthonormal(V)
    assert torch.equal(V, before)
    assert defect(Q) < 1e-14
    assert sine(Q, V) < 1e-13


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("decades", [3, 6, 9, 12, 30])
def test_orthonormal_survives_bad_condition_numbers(dtype, decades):
    rng = np.random.default_rng(decades)
    graded = 10.0 ** -np.linspace(0, decades, 20)
    A = rotation(20, 1) @ (graded[:, None] * rotation(150, 2)[:20])
    V = torch.from_numpy(A[rng.permutation(20)]).to(dtype)
    Q = orthonormal(V)
    assert Q.shape == V.shape
    assert Q.dtype == dtype
    assert defect(Q) < {F32: 6e-7, F64: 6e-15}[dtype]
    unit = V.to(F64) / V.to(F64).norm(dim=1, keepdim=True)
    assert float((unit - (unit @ Q.T.to(F64)) @ Q.to(F64)).norm(dim=1).max()) < LIMIT[dtype]


@pytest.mark.parametrize(("dtype", "powers"), [(F32, (-44, 38)), (F64, (-300, 300))])
def test_orthonormal_does_not_care_for_the_lengths_of_rows(dtype, powers):
    # rows of random directions: only their lengths differ, up to the ends of the dtype's range
    V = torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, (6, 40)))
    lengths = torch.logspace(powers[1], powers[0] + 12, 6, dtype=F64)
    Q = orthonormal((V * lengths[:, None]).to(dtype))
    assert defect(Q) < LIMIT[dtype]
    assert sine(Q, V) < 100 * torch.finfo(dtype).eps


def test_dependent_rows_are_replaced_or_dropped():
    rng = np.random.default_rng(4)
    basis = rng.standard_normal((3, 50))
    V = torch.from_numpy(
        np.vstack([basis, np.zeros(50), basis[0] - 2 * basis[1], rng.standard_normal((3, 3)) @ basis])
    )
    kept = orthonormal(V, dependent="drop")
    assert kept.shape == (3, 50)
    assert sine(kept, basis) < 1e-13
    full = orthonormal(V)
    assert full.shape == (8, 50)
    assert defect(full) < 1e-13
    assert sine(full[:3], basis) < 1e-13  # the independent ones come first
    assert bits(full) == bits(orthonormal(V))


def test_what_is_left_of_a_row_is_counted_over_all_its_relatives():
    """Sums with ever smaller new parts; every part is an exact float64 entry, so the rank is known."""
    e = torch.eye(8, dtype=F64)
    for part, rank in ((1e-12, 3), (1e-14, 2)):  # 1e-13 of its length is the border
        V = torch.stack([e[0], e[0] + 1e-10 * e[1], e[0] + 1e-10 * e[1] + part * e[2]])
        assert len(orthonormal(V, dependent="drop")) == rank
        assert defect(orthonormal(V)) < 1e-14
    near, far = e[0] + 1e-6 * e[1], e[0] + 1e-9 * e[3]
    V = torch.stack([e[0], near, near + 1e-12 * e[2], far, far + 1e-16 * e[4]])
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        kept = orthonormal(V[order], dependent="drop")
        assert len(kept) == 4
        assert sine(kept, e[:4]) < 1e-3


def test_all_rows_zero_or_as_many_as_columns():
    assert orthonormal(torch.zeros(4, 9), dependent="drop").shape == (0, 9)
    assert defect(orthonormal(torch.zeros(9, 9))) < 1e-6
    assert orthonormal(torch.zeros(0, 9)).shape == (0, 9)
    assert torch.equal(orthonormal(torch.full((1, 1), -3.0)), torch.full((1, 1), -1.0))


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 20),
    st.sampled_from([F32, F64]),
)
@settings(max_examples=30, deadline=None)
def test_orthonormal_finds_the_rank(seed, count, rank, extra, dtype):
    rng = np.random.default_rng(seed)
    rank = min(rank, count)
    A = rng.standard_normal((count, rank)) @ rng.standard_normal((rank, count + extra))
    scale = 10.0 ** rng.uniform(-8, 8, (count, 1))
    V = torch.from_numpy(A * scale).to(dtype)
    assert defect(orthonormal(V)) < LIMIT[dtype]
    kept = orthonormal(V, dependent="drop")
    assert defect(kept) < LIMIT[dtype]
    if dtype == F64:
        assert len(kept) == rank
    assert residual_gram(V / V.norm(dim=1, keepdim=True), kept).diagonal().max().sqrt() < 10 * LIMIT[dtype]


def test_blocks_change_nothing_but_rounding(monkeypatch):
    V = random_start(5, 1001, 3, F64)
    whole, W = orthonormal(V), random_start(4, 1001, 4, F64)
    gram = residual_gram(W, whole)
    monkeypatch.setattr(rows, "BLOCK_VALUES", 70)
    cut = orthonormal(V)
    assert float((cut - whole).abs().max()) < 1e-14
    assert float((residual_gram(W, whole) - gram).abs().max()) < 1e-11


def test_orthonormal_refuses():
    with pytest.raises(ValueError, match="do not fit into 3 dimensions"):
        orthonormal(torch.ones(4, 3))
    with pytest.raises(ValueError, match="finite"):
        orthonormal(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="finite"):
        orthonormal(torch.tensor([[1.0, 2.0, float("inf")]]))
    with pytest.raises(ValueError, match="float32 or float64"):
        orthonormal(torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="shape"):
        orthonormal(torch.ones(3))


def test_random_start_is_one_sequence_for_all_dtypes_and_lengths():
    state = torch.random.get_rng_state()
    first = random_start(3, 50, 7, F32, "cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, random_start(5, 50, 7)[:3])
    assert torch.equal(first.to(F64), random_start(3, 50, 7, F64))
    assert not torch.equal(first, random_start(3, 50, 8))
    assert 0.7 < float(first.std()) < 1.3


def test_the_largest_entry_is_positive_and_the_first_at_ties():
    U = torch.tensor([[0.1, -0.9, 0.2], [-0.5, 0.5, 0.5], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    fixed = fix_signs(U)
    expected = torch.tensor([[-0.1, 0.9, -0.2], [0.5, -0.5, -0.5], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(fixed, expected)
    assert torch.equal(fix_signs(-U), expected)
    assert float(U[0, 1]) < 0  # the argument is left alone


def test_right_singular_vectors_far_below_the_largest_value():
    left, right = rotation(6, 1), rotation(40, 2)[:6]
    values = 10.0 ** -np.arange(0, 12, 2)
    U, found = right_singular(torch.from_numpy(left @ (values[:, None] * right)))
    assert np.allclose(found, values, rtol=1e-4, atol=1e-15)
    assert defect(U) < 1e-13
    for one, other in zip(U.numpy(), right, strict=True):
        assert abs(one @ other) > 1 - 1e-8
