"""FIPA's streamed server step against dense matrices, the paper's thin QR, numpy's pinv and lstsq; all in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics import gram as module
from common.numerics.gram import combine, gram, solve
from common.numerics.quantise import pack, unpack
from tests.common.strategies import bits

F64 = torch.float64


def cut(V, size):
    """Return V as blocks, each in one buffer that is overwritten, as a file's are."""
    V = torch.as_tensor(V)

    def blocks():
        buffer = torch.empty(len(V), size, dtype=V.dtype)
        for start in range(0, V.shape[1], size):
            where = slice(start, min(start + size, V.shape[1]))
            part = buffer[:, : where.stop - start]
            part.copy_(V[:, where])
            yield where, part
            part.fill_(-7)

    return blocks


def cut_once(V):
    return lambda: [(slice(0, V.shape[1]), V)]


def whole(blocks, c):
    return torch.cat([part for _, part in combine(blocks, c)])


def step(V, sigma, a, *, size=7, **options):
    blocks = cut(V, size)
    return whole(
        blocks, solve(gram(blocks)[0], torch.as_tensor(sigma), torch.as_tensor(a), **options)
    ).numpy()


def paper_step(V, sigma, a, beta):
    """The paper's and its code's form: V = Q R, K = R Σ Rᵀ, (K + βI) z = Qᵀ b; the step Q z, and b − Q Qᵀ b."""
    Q, R = np.linalg.qr(V.T)
    b = V.T @ (sigma * a)
    z = np.linalg.solve(R @ np.diag(sigma) @ R.T + beta * np.eye(len(R)), Q.T @ b)
    return Q @ z, b - Q @ (Q.T @ b)


def dense_step(V, sigma, a, beta, rcond=1e-10):
    H, b = sum(s * np.outer(v, v) for s, v in zip(sigma, V, strict=True)), V.T @ (sigma * a)
    if beta:
        return np.linalg.solve(H + beta * np.eye(len(H)), b)
    return np.linalg.pinv(H, rcond=rcond, hermitian=True) @ b


def close(got, want, tolerance=1e-8):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(1e-300, np.abs(want).max())


def sites(count, rank, size, seed):
    """Return stacked orthonormal sketches, σ = share times λ, and U Δ, of sites with steps of their own."""
    rng = np.random.default_rng(seed)
    V = np.concatenate([np.linalg.qr(rng.standard_normal((size, rank)))[0].T for _ in range(count)])
    share = rng.dirichlet(np.ones(count)).repeat(rank)
    sigma = share * np.tile(10.0 ** -np.linspace(0, 2, rank), count)
    a = np.concatenate([V[m * rank : (m + 1) * rank] @ rng.standard_normal(size) for m in range(count)])
    return V, sigma, a


def psd(size, rng, rank=None):
    A = rng.standard_normal((rank or 2 * size, size))
    return A.T @ A / len(A)


def eigen(H):
    lam, Q = np.linalg.eigh(H)
    return Q.T[::-1].copy(), lam[::-1].copy()


# ---- the two passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("limit", [1, 30, 1 << 23])
def test_the_products_are_those_of_a_loop_in_every_dtype_and_block(monkeypatch, dtype, limit):
    monkeypatch.setattr(module, "BLOCK_VALUES", limit)
    numbers = torch.Generator().manual_seed(1)
    V, x = torch.randn(6, 41, generator=numbers).to(dtype), torch.randn(41, generator=numbers)
    W, y = V.to(F64).tolist(), x.to(F64).tolist()
    want = [[math.fsum(p * q for p, q in zip(u, w, strict=True)) for w in W] for u in W]
    for size in (1, 5, 41):
        G, v = gram(cut(V, size), lambda where: x[where])
        assert G.dtype == v.dtype == F64
        assert bits(G) == bits(G.T.contiguous())
        close(G, want, 1e-14)
        close(v, [math.fsum(p * q for p, q in zip(u, y, strict=True)) for u in W], 1e-14)
        c = torch.randn(6, generator=numbers, dtype=F64)
        close(whole(cut(V, size), c), V.to(F64).numpy().T @ c.numpy(), 1e-13)


def test_the_gram_matrix_is_symmetric_to_the_bit_and_the_same_every_time():
    V = torch.randn(37, 2000, generator=torch.Generator().manual_seed(3))
    (first, nothing), (again, _) = gram(cut(V, 171)), gram(cut(V, 171), None)
    assert bits(first) == bits(again) == bits(first.T.contiguous())
    assert bits(nothing) == bits(torch.zeros(37, dtype=F64))


def test_parts_of_the_result_are_not_overwritten_and_cover_all_columns():
    V = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=F64)
    where, parts = zip(*combine(cut(V, 6), torch.ones(3)), strict=True)
    assert where == (slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 20))
    close(torch.cat(parts), V.sum(0), 1e-14)


def test_float32_rows_are_summed_in_float64_and_may_be_differentiable():
    """In float32 the ones would be lost beside the large value."""
    V = torch.ones(2, 3000)
    V[:, 0] = 2.0**14
    for rows in (V.requires_grad_(), V.double()):
        G, v = gram(cut_once(rows), lambda where: V[0, where])
        assert G.tolist() == [[2.0**28 + 2999] * 2] * 2
        assert not G.requires_grad
        assert not v.requires_grad


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 5), size=st.integers(1, 12), width=st.integers(1, 13), seed=st.integers(0, 99))
def test_block_length_changes_nothing_beyond_rounding(rows, size, width, seed):
    numbers = torch.Generator().manual_seed(seed)
    V, x = torch.randn(rows, size, generator=numbers), torch.randn(size, generator=numbers)
    G, v = gram(cut(V, width), lambda where: x[where])
    one, w = gram(cut_once(V), lambda where: x[where])
    assert (G - one).abs().sum() <= 1e-13 * max(1, float(one.abs().sum()))
    assert (v - w).abs().sum() <= 1e-13 * (1 + float(one.abs().sum()) + float(x.square().sum()))
    assert whole(cut(V, width), torch.ones(rows)).shape == (size,)


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.5, 30.0])
@pytest.mark.parametrize(("count", "rank", "size"), [(1, 4, 30), (3, 5, 40), (4, 5, 20), (4, 6, 15)])
def test_the_step_is_that_of_the_papers_thin_qr_and_of_the_dense_system(count, rank, size, beta):
    V, sigma, a = sites(count, rank, size, seed=rank)
    got = step(V, sigma, a, beta=beta)
    want, complement = paper_step(V, sigma, a, beta)
    close(got, want)
    close(got, dense_step(V, sigma, a, beta))
    b = V.T @ (sigma * a)
    assert (
        np.abs(complement).max() <= 1e-13 * np.abs(b).max()
    )  # the code's "orthogonal-complement correction"


@pytest.mark.parametrize(("count", "rank", "size"), [(1, 4, 30), (3, 5, 40), (4, 5, 20), (4, 6, 15)])
def test_without_beta_the_step_is_the_dense_pseudo_inverse(count, rank, size):
    V, sigma, a = sites(count, rank, size, seed=rank)
    got = step(V, sigma, a)
    close(got, dense_step(V, sigma, a, 0))
    if count * rank <= size:
        close(got, paper_step(V, sigma, a, 0)[0])


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.1])
def test_overlapping_and_dependent_subspaces(beta):
    V, sigma, a = sites(2, 4, 25, seed=5)
    rng = np.random.default_rng(6)
    turned = np.linalg.qr(rng.standard_normal((4, 4)))[0] @ V[:4]  # the first site's span in another basis
    part = np.stack([V[4], (V[0] + V[5]) / np.linalg.norm(V[0] + V[5])])
    V = np.concatenate([V, turned, part, V[:1], np.zeros((1, 25))])
    sigma = np.concatenate([sigma, rng.uniform(0.1, 1, 8)])
    a = np.concatenate([a, rng.standard_normal(8)])
    got = step(V, sigma, a, beta=beta)
    close(got, dense_step(V, sigma, a, beta))
    assert np.linalg.matrix_rank(V) == 8


def test_a_beta_below_all_rounding_is_the_pseudo_inverse():
    """(D + β)⁻¹ of what is zero but for rounding would be large noise."""
    V, sigma, a = sites(2, 4, 25, seed=5)
    V, sigma, a = np.concatenate([V, V]), np.concatenate([sigma, sigma]), np.concatenate([a, -3 * a[::-1]])
    close(step(V, sigma, a, beta=1e-30), dense_step(V, sigma, a, 0))


def test_small_eigenvalues_are_cut_as_numpys_pinv_cuts_those_of_the_matrix():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.standard_normal((12, 6)))[0].T
    sigma, a = 10.0 ** -np.arange(0, 12, 2.0), rng.standard_normal(6)
    for rcond, kept in ((1e-1, 1), (1e-5, 3), (3e-9, 5), (1e-11, 6)):
        close(step(V, sigma, a, rcond=rcond), V[:kept].T @ a[:kept], 1e-5 if kept == 6 else 1e-8)
        close(dense_step(V, sigma, a, 0, rcond), V[:kept].T @ a[:kept], 1e-4)


def test_a_cut_of_zero_still_leaves_out_what_is_only_rounding():
    V, sigma, a = sites(2, 4, 25, seed=5)
    turned = np.linalg.qr(np.random.default_rng(6).standard_normal((4, 4)))[0] @ V[:4]
    V, sigma, a = np.concatenate([V, turned]), np.concatenate([sigma, sigma[:4]]), np.concatenate([a, -a[:4]])
    close(step(V, sigma, a, rcond=0.0), dense_step(V, sigma, a, 0))


def test_with_beta_small_eigenvalues_are_damped_and_not_cut():
    V, a = np.linalg.qr(np.random.default_rng(7).standard_normal((9, 2)))[0].T, np.array([1.0, 1.0])
    got = step(V, np.array([1.0, 1e-12]), a, beta=1e-12)
    close(V @ got, [1.0, 0.5], 1e-3)


def test_one_site_of_full_rank_gives_its_update_unchanged():
    rng = np.random.default_rng(2)
    (U, lam), move = eigen(psd(9, rng)), rng.standard_normal(9)
    close(step(U, lam, U @ move), move, 1e-11)
    shrunk = U.T @ (lam / (lam + 0.5) * (U @ move))
    close(step(U, lam, U @ move, beta=0.5), shrunk, 1e-12)
    close(step(U[:4], lam[:4], U[:4] @ move), U[:4].T @ U[:4] @ move, 1e-12)  # of low rank


def test_equal_matrices_of_full_rank_give_the_weighted_mean():
    rng = np.random.default_rng(4)
    U, lam = eigen(psd(8, rng))
    moves, share = rng.standard_normal((3, 8)), np.array([0.5, 0.3, 0.2])
    V = np.concatenate([U, -U, U])  # a site's eigenvectors may have any sign
    a = np.concatenate([V[8 * m : 8 * m + 8] @ moves[m] for m in range(3)])
    close(step(V, np.outer(share, lam).ravel(), a), share @ moves, 1e-10)


@pytest.mark.parametrize("cases", [(30, 12, 20), (4, 5, 3)])
def test_linear_least_squares_with_exact_local_solutions_is_solved_in_one_step(cases):
    """Also where no site's own problem has one solution: each takes the nearest to where it began."""
    rng = np.random.default_rng(sum(cases))
    theta, total = rng.standard_normal(10), sum(cases)
    X = [rng.standard_normal((n, 10)) for n in cases]
    y = [rng.standard_normal(n) for n in cases]
    V, sigma, a = [], [], []
    for rows, target in zip(X, y, strict=True):
        U, lam = eigen(rows.T @ rows / len(rows))
        rank = min(rows.shape)
        move = np.linalg.lstsq(rows, target - rows @ theta, rcond=None)[0]
        V.append(U[:rank])
        sigma.append(len(rows) / total * lam[:rank])
        a.append(U[:rank] @ move)
    got = theta + step(np.concatenate(V), np.concatenate(sigma), np.concatenate(a))
    close(got, np.linalg.lstsq(np.concatenate(X), np.concatenate(y), rcond=None)[0], 1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_the_order_of_the_sites_changes_only_rounding_and_a_fixed_order_no_bit(beta):
    V, sigma, a = sites(5, 4, 60, seed=1)
    first = step(V, sigma, a, beta=beta)
    assert first.tobytes() == step(V, sigma, a, beta=beta).tobytes()
    order = np.concatenate([np.arange(4 * m, 4 * m + 4) for m in (3, 0, 4, 2, 1)])
    close(step(V[order], sigma[order], a[order], beta=beta), first, 1e-12)
    for size in (1, 11, 60):
        close(step(V, sigma, a, size=size, beta=beta), first, 1e-12)


@pytest.mark.parametrize("how", ["bf16", "int8"])
@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_rows_that_quantising_left_not_orthonormal(how, beta):
    V, sigma, a = sites(3, 4, 50, seed=8)
    V = torch.cat([unpack(pack(part, how)) for part in torch.from_numpy(V).split(4)]).double().numpy()
    assert 1e-4 < np.abs(V[:4] @ V[:4].T - np.eye(4)).max() < 0.1
    close(step(V, sigma, a, beta=beta), dense_step(V, sigma, a, beta))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 6),
    rank=st.integers(1, 6),
    beta=st.sampled_from([0.0, 1e-3, 1.0]),
    scale=st.sampled_from([1e-200, 1.0, 1e200]),
    seed=st.integers(0, 9999),
)
def test_any_rows_weights_and_units_agree_with_the_dense_system(rows, size, rank, beta, scale, seed):
    rng = np.random.default_rng(seed)
    V = rng.integers(-3, 4, (rows, min(rank, rows))) @ rng.integers(-2, 3, (min(rank, rows), size)) / 4.0
    sigma, a = rng.integers(0, 4, rows) / 2.0, rng.standard_normal(rows)
    got = step(V, sigma * scale, a, size=2, beta=beta * scale)
    want = dense_step(V, sigma, a, beta)
    assert np.abs(got - want).max() <= 1e-8 * (1 + np.abs(want).max())


def test_weights_of_zero_and_rows_of_zero_take_no_part():
    V, sigma, a = sites(2, 3, 12, seed=0)
    for beta in (0.0, 1e-300, 0.1):
        assert not step(V, np.zeros(6), a, beta=beta).any()
        assert not step(np.zeros((6, 12)), sigma, a, beta=beta).any()
    silent = np.where(np.arange(6) < 3, sigma, 0.0)
    close(step(V, silent, a), step(V[:3], sigma[:3], a[:3]), 1e-13)
    assert not step(np.zeros((0, 12)), np.zeros(0), np.zeros(0)).any()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([], "at least one block"),
        ([(slice(0, 2), torch.ones(2, 3))], "0 to 3, got 0 to 2"),
        ([(slice(0, 2), torch.ones(2, 2)), (slice(3, 4), torch.ones(2, 1))], "2 to 3, got 3 to 4"),
        ([(slice(0, 2), torch.ones(2, 2)), (slice(2, 4), torch.ones(3, 2))], "same rows, got 2 and 3"),
        ([(slice(0, 2), torch.ones(2))], "floating-point"),
        ([(slice(0, 2), torch.ones(2, 2, dtype=torch.int8))], "floating-point"),
        ([(slice(0, 2), torch.tensor([[1.0, math.nan], [1, 1]]))], "finite"),
        ([(slice(0, 2), torch.tensor([[1.0, 1.0], [-math.inf, 1]]))], "finite"),
        ([(slice(0, 1), torch.tensor([[1e200]], dtype=F64))], "range of float64"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, said):
    with pytest.raises(ValueError, match=said):
        gram(lambda: blocks, None)


@pytest.mark.parametrize(
    ("part", "said"),
    [(torch.ones(2), r"\(3,\).*0 to 3, got \(2,\)"), (torch.tensor([1.0, math.inf, 0]), "finite")],
)
def test_a_vector_beside_the_blocks_that_does_not_fit_is_refused(part, said):
    with pytest.raises(ValueError, match=said):
        gram(lambda: [(slice(0, 3), torch.ones(2, 3))], lambda where: part)


GOOD = {"G": torch.eye(2), "sigma": torch.ones(2), "a": torch.ones(2)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"G": torch.ones(2, 3)}, "square"),
        ({"G": torch.tensor([[1.0, math.nan], [math.nan, 1.0]])}, "G must be finite"),
        ({"G": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "no negative eigenvalue"),
        ({"G": -torch.eye(2)}, "squares on its diagonal"),
        ({"sigma": torch.ones(3)}, r"sigma must be.*\(2\), got \(3,\)"),
        ({"sigma": torch.tensor([1.0, -1e-9])}, "at least 0, got -1e-09"),
        ({"sigma": torch.tensor([1.0, math.nan])}, "sigma must be finite"),
        ({"a": torch.ones(2, 1)}, "a must be a vector"),
        ({"a": torch.tensor([1.0, math.inf])}, "a must be finite"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"rcond": 1.0}, "rcond"),
        ({"rcond": math.nan}, "rcond"),
    ],
)
def test_a_system_that_does_not_fit_is_refused(wrong, said):
    assert solve(**GOOD).tolist() == [1, 1]
    with pytest.raises(ValueError, match=said):
        solve(**GOOD | wrong)


def test_coefficients_that_do_not_fit_are_refused():
    blocks = cut(torch.ones(2, 3), 3)
    with pytest.raises(ValueError, match=r"2 rows.* 3 coefficients"):
        list(combine(blocks, torch.ones(3)))
    with pytest.raises(ValueError, match="finite"):
        list(combine(blocks, torch.tensor([1.0, math.nan])))
