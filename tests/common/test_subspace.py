"""Leading eigenpairs by subspace iteration and Nyström; all against dense float64 linear algebra."""

import numpy as np
import pytest
import scipy.linalg
import torch

from common.numerics import rows
from common.numerics.subspace import (
    captured_energy,
    dense_eigenpairs,
    fix_signs,
    nystrom,
    random_start,
    subspace_iteration,
)
from tests.common.strategies import bits

F32, F64 = torch.float32, torch.float64
LIMIT = {F32: 1e-6, F64: 1e-13}


class Dense:
    """An operator over a dense matrix that counts what it is asked for."""

    def __init__(self, H):
        self.H, self.size, self.columns, self.calls = H, len(H), 0, 0

    def matmat(self, V):
        self.columns, self.calls = self.columns + len(V), self.calls + 1
        return V @ self.H.to(V)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def spectrum(lam, seed=0):
    """Return a dense matrix with these eigenvalues, and its eigenvectors as rows."""
    Q = rotation(len(lam), seed)
    H = (Q * np.asarray(lam)) @ Q.T
    return torch.from_numpy((H + H.T) / 2), Q.T


def decaying(size, rate, seed=0):
    return spectrum(rate ** np.arange(size), seed)


def defect(Q):
    Q = Q.to(F64).numpy()
    return np.abs(Q @ Q.T - np.eye(len(Q))).max()


def sine(A, B):
    """Return the sine of the largest principal angle between row spaces, by scipy."""
    angles = scipy.linalg.subspace_angles(np.asarray(A, np.float64).T, np.asarray(B, np.float64).T)
    return np.sin(angles.max())


def test_blocks_of_columns_change_nothing(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_VALUES", 70)
    H, _ = decaying(60, 0.5)
    found, basis = subspace_iteration(Dense(H), 4, oversampling=3, iterations=9, dtype=F64)
    assert np.allclose(found.lam, 0.5 ** np.arange(4), rtol=1e-10)
    assert defect(basis) < 1e-13
    assert float(found.residuals.max()) < 1e-8
    assert captured_energy(Dense(H), found.U, 2.0) == pytest.approx(0.9375, abs=1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(F64, 1e-8), (F32, 3e-5)])
def test_leading_pairs_equal_those_of_the_dense_solver(dtype, close):
    H, _ = decaying(120, 0.8)
    op = Dense(3 * H)
    found, basis = subspace_iteration(op, 8, oversampling=8, iterations=12, dtype=dtype)
    oracle = dense_eigenpairs(3 * H, 8)
    assert np.allclose(oracle.lam, 3 * 0.8 ** np.arange(8), atol=1e-12)
    assert float((found.lam.to(F64) - oracle.lam).abs().max()) < close
    assert float((found.U.to(F64) - oracle.U).abs().max()) < 100 * close  # signs included
    assert found.U.dtype == found.lam.dtype == found.residuals.dtype == dtype
    assert found.products == op.columns == 16 * 13
    assert op.calls == 13
    assert torch.equal(basis[:8], found.U)
    assert basis.shape == (16, 120)
    assert defect(basis) < LIMIT[dtype]


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_iterations_are_those_of_the_paper(iterations):
    """Eq. 10-12 with numpy's QR from the same start: same subspace, same Ritz values, after every q."""
    H, _ = decaying(30, 0.9, seed=5)
    start = random_start(6, 30, 11, F64)
    V = np.linalg.qr(start.numpy().T)[0]
    for _ in range(iterations):
        V = np.linalg.qr(H.numpy() @ V)[0]
    ritz, small = np.linalg.eigh(V.T @ H.numpy() @ V)
    U = (V @ small)[:, ::-1][:, :4]
    residuals = np.linalg.norm(H.numpy() @ U - U * ritz[::-1][:4], axis=0)
    found, basis = subspace_iteration(
        Dense(H), 4, oversampling=2, iterations=iterations, start=start, dtype=F64
    )
    assert np.allclose(found.lam, ritz[::-1][:4], atol=1e-12)
    assert np.allclose(found.residuals, residuals, atol=1e-10)
    assert residuals.max() > 1e-3  # far from converged, so this is the formula and no rounding
    assert sine(found.U, U.T) < 1e-10
    assert np.allclose((basis @ H @ basis.T).numpy(), np.diag(ritz[::-1]), atol=1e-12)
    assert torch.equal(fix_signs(basis), basis)


def test_degenerate_eigenvalues_give_the_right_projectors():
    lam = np.concatenate([[5.0, 5.0, 5.0, 2.0, 2.0], 0.1 * 0.8 ** np.arange(45)])
    H, vectors = spectrum(lam)
    found, _ = subspace_iteration(Dense(H), 5, oversampling=5, iterations=12, dtype=F64)
    for part in (slice(0, 3), slice(3, 5)):
        U = found.U[part].numpy()
        assert np.allclose(U.T @ U, vectors[part].T @ vectors[part], atol=1e-8)
    assert np.allclose(found.lam, lam[:5], atol=1e-10)


def test_a_rank_deficient_matrix_has_exact_zeros_and_full_vectors():
    for dtype in (F32, F64):
        H, vectors = spectrum(np.concatenate([[4.0, 2.0, 1.0], np.zeros(37)]))
        found, basis = subspace_iteration(Dense(H), 7, oversampling=4, iterations=3, dtype=dtype)
        assert np.allclose(found.lam[:3], [4, 2, 1], atol=1e-5)
        assert found.lam[3:].tolist() == [0.0] * 4
        assert defect(basis) < LIMIT[dtype]
        assert sine(found.U[:3], vectors[:3]) < 1e-5
    found, basis = subspace_iteration(Dense(torch.zeros(9, 9)), 3, iterations=2)
    assert found.lam.tolist() == found.residuals.tolist() == [0.0] * 3
    assert defect(basis) < 1e-6


def test_rank_and_oversampling_are_clamped_to_the_size():
    H, _ = decaying(5, 0.5)
    found, basis = subspace_iteration(Dense(H), 50, dtype=F64)
    assert found.U.shape == basis.shape == (5, 5)
    assert np.allclose(found.lam, 0.5 ** np.arange(5), atol=1e-13)
    assert found.products == 15
    assert nystrom(Dense(H), 50, dtype=F64)[0].lam.shape == dense_eigenpairs(H, 50).lam.shape == (5,)
    alone, _ = subspace_iteration(Dense(torch.full((1, 1), 3.0)), 1)
    assert alone.lam.tolist() == [3.0]
    assert alone.U.tolist() == [[1.0]]


def test_the_same_call_gives_the_same_bytes():
    H, _ = decaying(200, 0.9)
    for solve in (subspace_iteration, nystrom):
        one, other, elsewhere = (solve(Dense(H), 6, seed=seed) for seed in (3, 3, 4))
        assert bits(one[0].U) == bits(other[0].U)
        assert bits(one[0].lam) == bits(other[0].lam)
        assert bits(one[1]) == bits(other[1])
        assert bits(one[1]) != bits(elsewhere[1])


def test_a_start_is_completed_cut_and_left_alone():
    H, vectors = decaying(40, 0.7)
    exact = torch.from_numpy(vectors[:4].copy())
    before = exact.clone()
    found, basis = subspace_iteration(Dense(H), 4, oversampling=3, iterations=0, start=exact, dtype=F64)
    assert torch.equal(exact, before)
    assert basis.shape == (7, 40)
    assert np.allclose(found.lam, 0.7 ** np.arange(4), atol=1e-3)
    cut, basis = subspace_iteration(Dense(H), 1, oversampling=1, iterations=0, start=exact, dtype=F64)
    assert np.allclose(cut.lam, 1.0, atol=1e-12)
    assert basis.shape == (2, 40)
    assert sine(basis, exact[:2]) < 1e-7


class Same:
    """The identity, which gives back what it was given."""

    size = 6

    def matmat(self, V):
        return V


def test_an_operator_may_return_its_argument():
    found, basis = subspace_iteration(Same(), 3, oversampling=1, dtype=F64)
    assert np.allclose(found.lam, 1, atol=1e-14)
    assert float(found.residuals.max()) < 1e-14
    assert defect(basis) < 1e-14
    assert np.allclose(nystrom(Same(), 3, dtype=F64)[0].lam, 1, atol=1e-14)


@pytest.mark.parametrize("rate", [0.9, 0.3])
def test_nystrom_is_the_dense_formula(rate):
    """H V⁺-form: W T⁺ Wᵀ of Tropp et al. with numpy's pseudo-inverse."""
    H, _ = decaying(40, rate, seed=2)
    start = random_start(9, 40, 1, F64)
    op = Dense(H)
    found, basis = nystrom(op, 5, oversampling=4, start=start, dtype=F64)
    W = H.numpy() @ start.numpy().T
    lam, vectors = np.linalg.eigh(W @ np.linalg.pinv(start.numpy() @ W, rcond=1e-14) @ W.T)
    assert np.allclose(found.lam, lam[::-1][:5], atol=1e-10)
    assert sine(found.U, vectors[:, ::-1][:, :5].T) < 1e-6
    assert found.residuals is None
    assert found.products == op.columns == 9
    assert defect(basis) < 1e-13
    assert torch.equal(basis[:5], found.U)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nystrom_is_exact_for_a_matrix_of_low_rank(dtype):
    H, vectors = spectrum(np.concatenate([[9.0, 3.0, 1.0], np.zeros(60)]))
    found, basis = nystrom(Dense(H), 6, oversampling=4, dtype=dtype)
    assert np.allclose(found.lam[:3], [9, 3, 1], rtol=3e-5 if dtype == F32 else 1e-10)
    assert found.lam[3:].tolist() == [0.0] * 3
    assert sine(found.U[:3], vectors[:3]) < (1e-4 if dtype == F32 else 1e-10)
    assert defect(basis) < LIMIT[dtype]
    found, basis = nystrom(Dense(torch.zeros(8, 8)), 2)
    assert found.lam.tolist() == [0.0, 0.0]
    assert defect(basis) < 1e-6


def test_nystrom_takes_its_shift_off_again():
    """A basis of the whole space makes the formula exact: H + ν I less ν, however large ν had to grow."""
    lam = np.array([1.0, 0.5, 0.25, 0.125, -1e-5, -1e-5])
    H, vectors = spectrum(lam)
    found, _ = nystrom(Dense(H), 4, oversampling=2, dtype=F64)
    assert np.allclose(found.lam, lam[:4], atol=1e-12)
    assert sine(found.U, vectors[:4]) < 1e-10


def drift(size, count):
    """Yield matrices whose eigenvectors turn and whose eigenvalues breathe a little from one to the next."""
    rng = np.random.default_rng(8)
    lam, Q = 1 / (1 + np.arange(size)) ** 0.7, rotation(size, 8)
    skew = rng.standard_normal((size, size)) / np.sqrt(size)
    turn = scipy.linalg.expm(0.01 * (skew - skew.T))
    for step in range(count):
        Q = turn @ Q
        values = lam * (1 + 0.05 * np.sin(step + np.arange(size)))
        yield torch.from_numpy((Q * values) @ Q.T)


def test_a_warm_start_follows_a_slowly_changing_matrix_with_one_product():
    rank, start = 10, None
    warm, cold = [], []
    for H in drift(200, 6):
        op = Dense(0.5 * (H + H.T))
        best = float(dense_eigenpairs(op.H, rank).lam.sum())
        if start is None:
            start = subspace_iteration(op, rank, iterations=6, dtype=F64)[1]
            continue
        found, start = nystrom(op, rank, start=start, dtype=F64)
        warm.append(captured_energy(op, found.U, best))
        cold.append(captured_energy(op, nystrom(op, rank, dtype=F64)[0].U, best))
    assert min(warm) >= 0.98
    assert max(cold) < 0.9
    assert max(warm) <= 1 + 1e-12


def test_captured_energy_is_the_share_of_the_trace():
    H, vectors = decaying(20, 0.5)
    U = torch.from_numpy(vectors[:3].copy())
    assert captured_energy(Dense(H), U, float(H.trace())) == pytest.approx(1.75 / (2 - 2.0**-19), rel=1e-12)
    assert captured_energy(Dense(H), U[:0], 1.0) == 0.0
    for trace in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="trace"):
            captured_energy(Dense(H), U, trace)
    with pytest.raises(ValueError, match="size 3"):
        captured_energy(Dense(H), U[:, :3], 1.0)


def test_dense_pairs_have_their_residuals_and_signs():
    H, _ = decaying(15, 0.6)
    found = dense_eigenpairs(H, 15)
    assert found.products == 0
    assert float(found.residuals.max()) < 1e-14
    assert np.allclose((found.U.T * found.lam) @ found.U, H, atol=1e-14)
    assert torch.equal(fix_signs(found.U), found.U)
    assert dense_eigenpairs(torch.diag(torch.tensor([1.0, -2.0, 3.0])), 3).lam.tolist() == [3.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="symmetric"):
        dense_eigenpairs(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="square"):
        dense_eigenpairs(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match="finite"):
        dense_eigenpairs(torch.tensor([[float("nan")]]), 1)


@pytest.mark.parametrize("solve", [subspace_iteration, nystrom])
def test_eigensolvers_refuse(solve):
    H, _ = decaying(6, 0.5)
    with pytest.raises(ValueError, match="rank"):
        solve(Dense(H), 0)
    with pytest.raises(ValueError, match="oversampling"):
        solve(Dense(H), 2, oversampling=-1)
    with pytest.raises(ValueError, match="start"):
        solve(Dense(H), 2, start=torch.ones(2, 5))
    with pytest.raises(ValueError, match="float32 or float64"):
        solve(Dense(H), 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="finite"):
        solve(Dense(H * float("nan")), 2)
    op = Dense(H)
    op.matmat = lambda V: V[:1]
    with pytest.raises(ValueError, match="product must have the shape"):
        solve(op, 2)


def test_only_what_each_solver_refuses():
    H, _ = decaying(6, 0.5)
    with pytest.raises(ValueError, match="iterations"):
        subspace_iteration(Dense(H), 2, iterations=-1)
    with pytest.raises(ValueError, match="positive semidefinite"):
        nystrom(Dense(-H), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_pairs():
    H, _ = decaying(300, 0.8)
    for solve in (subspace_iteration, nystrom):
        there, basis = solve(Dense(H), 5, dtype=F64, device="cuda")
        here, _ = solve(Dense(H), 5, dtype=F64)
        assert basis.device.type == there.lam.device.type == "cuda"
        assert np.allclose(there.lam.cpu(), here.lam, atol=1e-12)
        assert float((there.U.cpu() - here.U).abs().max()) < 1e-8
        assert defect(basis.cpu()) < 1e-13
