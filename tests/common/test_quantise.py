"""Wire forms of sketches, distances of subspaces, clipping and noise."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics import rows
from common.numerics.quantise import clip_and_noise, pack, projection_error, span_error, unpack
from common.numerics.rows import orthonormal, random_start

F32, F64 = torch.float32, torch.float64
HOW = ["float32", "bf16", "int8"]


def sketch(r, p, seed=0, dtype=F64):
    return orthonormal(random_start(r, p, seed, dtype))


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 30), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_scale(seed, r, p, power):
    U = torch.from_numpy(np.random.default_rng(seed).standard_normal((r, p)) * 10.0**power)
    packed = pack(U, "int8")
    scale = packed["scale"].to(F64)
    assert packed["U"].dtype == torch.int8
    assert packed["scale"].dtype == F32
    assert scale.shape == (r,)
    back = unpack(packed)
    assert back.dtype == F32
    assert back.shape == (r, p)
    # half a step, and the rounding of the product to float32
    bound = scale[:, None] * (0.5 + 127 * 2.0**-23)
    assert ((back.to(F64) - U).abs() <= bound).all()
    assert (packed["U"].to(torch.int64).abs().amax(dim=1) == 127).all()


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 30), st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_floating_forms_keep_their_digits(seed, r, p, power):
    U = torch.from_numpy(np.random.default_rng(seed).standard_normal((r, p)) * 10.0**power)
    for how, digits in (("float32", 24), ("bf16", 8)):
        packed = pack(U, how)
        assert set(packed) == {"U"}
        back = unpack(packed)
        assert back.dtype == F32
        assert ((back.to(F64) - U).abs() <= U.abs() * 2.0**-digits + 1e-38).all()
    exact = U.to(F32)
    assert torch.equal(unpack(pack(exact, "float32")), exact)


def test_int8_by_hand():
    U = torch.tensor(
        [[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0], [0.0] * 7, [1e-37] * 7, [-2.54, 0.0, 1.27, 0, 0, 0, 0]]
    )
    packed = pack(U, "int8")
    assert packed["scale"].tolist() == [1.0, 0.0, 0.0, pytest.approx(0.02)]
    assert packed["U"].tolist() == [[127, 0, 2, 2, 0, -2, -127], [0] * 7, [0] * 7, [-127, 0, 64, 0, 0, 0, 0]]
    assert torch.equal(unpack(packed)[0], torch.tensor([127.0, 0, 2, 2, 0, -2, -127]))


def test_int8_has_one_scale_for_all_blocks_of_a_row(monkeypatch):
    U = sketch(3, 100)
    whole = pack(U, "int8")
    monkeypatch.setattr(rows, "BLOCK_VALUES", 7)
    cut = pack(U, "int8")
    assert torch.equal(cut["U"], whole["U"])
    assert torch.equal(cut["scale"], whole["scale"])
    mirrored = pack(-U, "int8")
    assert torch.equal(mirrored["U"], -whole["U"])


@pytest.mark.parametrize("how", HOW)
def test_forms_at_their_edges(how):
    assert unpack(pack(torch.zeros(0, 4), how)).shape == (0, 4)
    assert unpack(pack(torch.tensor([[-1.0]]), how)).tolist() == [[-1.0]]
    for dtype in (torch.float16, torch.bfloat16, F64):
        assert unpack(pack(torch.tensor([[1.0, -0.5]], dtype=dtype), how)).tolist()[0][0] == 1.0
    for bad in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="finite"):
            pack(torch.tensor([[0.0, 1.0], [bad, 0.0]], dtype=F64), how)
    for bad in (torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="floating-point rows"):
            pack(bad, how)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="int4"):
        pack(torch.ones(1, 2), "int4")


CODES, SCALE = torch.ones(2, 3, dtype=torch.int8), torch.ones(2)
FOREIGN = {
    "nothing": ({}, "needs rows"),
    "no rows": ({"scale": SCALE}, "needs rows"),
    "a vector": ({"U": torch.ones(3)}, "needs rows"),
    "no columns": ({"U": torch.ones(3, 0)}, "needs rows"),
    "float64": ({"U": torch.ones(2, 3, dtype=F64)}, "float64"),
    "float16": ({"U": torch.ones(2, 3, dtype=torch.float16)}, "float16"),
    "uint8": ({"U": CODES.to(torch.uint8), "scale": SCALE}, "uint8"),
    "no scale": ({"U": CODES}, "scale"),
    "a scale too much": ({"U": torch.ones(2, 3), "scale": SCALE}, "scale"),
    "more": ({"U": CODES, "scale": SCALE, "V": SCALE}, "'V'"),
    "one scale for two": ({"U": CODES, "scale": SCALE[:1]}, "one a direction"),
    "scales of rows": ({"U": CODES, "scale": SCALE[:, None]}, "one a direction"),
    "wide scales": ({"U": CODES, "scale": SCALE.to(F64)}, "one a direction"),
    "NaN scale": ({"U": CODES, "scale": torch.tensor([1.0, float("nan")])}, "between 0"),
    "negative scale": ({"U": CODES, "scale": -SCALE}, "between 0"),
    "scale that overflows": ({"U": CODES, "scale": SCALE * 3e36}, "between 0"),
    "-128": ({"U": -CODES - 127, "scale": SCALE}, "-128"),
    "NaN": ({"U": torch.full((2, 3), float("nan"))}, "finite"),
    "infinite bf16": ({"U": torch.full((2, 3), float("inf"), dtype=torch.bfloat16)}, "finite"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_tensors_are_refused(case):
    tensors, sentence = FOREIGN[case]
    with pytest.raises(ValueError, match=sentence):
        unpack(tensors)


def test_the_error_is_the_sine_of_a_known_rotation():
    basis = sketch(6, 40)
    angles = torch.tensor([0.3, 1e-7, 0.0], dtype=F64)
    U, V = basis[:3], torch.cos(angles)[:, None] * basis[:3] + torch.sin(angles)[:, None] * basis[3:]
    mixed = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 1.0]], dtype=F64) @ V
    assert projection_error(U, mixed) == pytest.approx(np.sin(0.3), abs=1e-14)
    assert span_error(U, mixed) == pytest.approx(np.sqrt(2 * (np.sin(0.3) ** 2 + 1e-14)), abs=1e-14)
    assert projection_error(U[1:], V[1:]) == pytest.approx(1e-7, rel=1e-6)  # small angles keep their digits
    assert projection_error(U, 5 * U.flip(0)) < 1e-15
    assert projection_error(U, basis[3:]) == pytest.approx(1.0)
    assert span_error(U, basis[3:]) == pytest.approx(np.sqrt(6))


@pytest.mark.parametrize("how", HOW)
def test_errors_of_packed_sketches_equal_the_dense_ones(how):
    U = sketch(8, 300, 5)
    approx = unpack(pack(U, how)).to(F64)
    A, B = (scipy.linalg.orth(V.numpy().T) for V in (U, approx))
    apart = A @ A.T - B @ B.T
    assert projection_error(U, approx) == pytest.approx(np.linalg.norm(apart, 2), rel=1e-6)
    assert span_error(U, approx) == pytest.approx(np.linalg.norm(apart), rel=1e-6)
    assert projection_error(U, approx) < {"float32": 1e-7, "bf16": 3e-3, "int8": 2e-2}[how]


def test_a_lost_direction_is_an_error_of_one():
    U = sketch(3, 10)
    lost = U.clone()
    lost[1] = 0
    assert projection_error(U, lost) == 1.0
    assert span_error(U, lost) == pytest.approx(1.0)
    assert projection_error(torch.ones(1, 1), torch.zeros(1, 1)) == 1.0
    assert projection_error(U[:0], U[:0]) == span_error(U[:0], U[:0]) == 0.0
    for error in (projection_error, span_error):
        with pytest.raises(ValueError, match="one shape"):
            error(U, U[:2])
        with pytest.raises(ValueError, match="one shape"):
            error(U, U.to(F32))
        with pytest.raises(ValueError, match="independent"):
            error(lost, U)


def test_nothing_to_do_gives_back_the_very_tensors():
    U, lam = sketch(3, 20), torch.tensor([4.0, 1.0, 0.0], dtype=F64)
    for clip in (0.0, 3.0):  # the norm is √5
        same, values = clip_and_noise(U, lam, clip=clip, noise=0.0, seed=1)
        assert same is U
        assert values is lam
    empty, none = U[:0], lam[:0]
    same, values = clip_and_noise(empty, none, clip=1.0, noise=1.0, seed=1)
    assert same is empty
    assert values is none


def test_clipping_scales_the_eigenvalues():
    U, lam = sketch(3, 20), torch.tensor([4.0, 3.0, 2.0], dtype=F64)
    same, values = clip_and_noise(U, lam, clip=1.5, noise=0.0, seed=1)
    assert same is U
    assert float(values.sum().sqrt()) == pytest.approx(1.5, rel=1e-14)
    assert np.allclose(values / lam, 0.25, rtol=1e-14)


@pytest.mark.parametrize(("clip", "noise", "sd"), [(0.0, 0.2, 0.2), (2.0, 0.1, 0.2), (100.0, 0.01, 1.0)])
def test_noise_is_gaussian_on_the_clipped_factor(clip, noise, sd):
    r, p = 4, 5000
    U, lam = sketch(r, p), torch.tensor([9.0, 4.0, 2.0, 1.0], dtype=F64)
    noisy, values = clip_and_noise(U, lam, clip=clip, noise=noise, seed=3)
    shrunk = min(1.0, clip / 4) if clip else 1.0
    F = shrunk * lam.sqrt()[:, None] * U
    expected = float(F.square().sum()) + r * p * sd**2
    assert float(values.sum()) == pytest.approx(expected, rel=0.05)
    assert float((noisy @ noisy.T - torch.eye(r, dtype=F64)).abs().max()) < 1e-13
    assert (values.diff() <= 0).all()
    again, same = clip_and_noise(U, lam, clip=clip, noise=noise, seed=3)
    assert torch.equal(noisy, again)
    assert torch.equal(values, same)
    assert not torch.equal(noisy, clip_and_noise(U, lam, clip=clip, noise=noise, seed=4)[0])


def test_the_noisy_sketch_is_the_svd_of_factor_and_noise(monkeypatch):
    """With the drawn numbers replaced by known ones, H' is exactly (F + sd N)ᵀ (F + sd N)."""
    U, lam = sketch(3, 12), torch.tensor([4.0, 1.0, 0.0], dtype=F64)
    N = random_start(3, 12, 77, F32)
    drawn = iter(N)
    monkeypatch.setattr(torch, "randn", lambda *size, generator, dtype: next(drawn))
    noisy, values = clip_and_noise(U, lam, clip=1.0, noise=0.3, seed=0)
    F = (lam.sqrt()[:, None] * U / 5**0.5 + 0.3 * N).numpy()
    assert np.allclose((noisy.T * values) @ noisy, F.T @ F, atol=1e-13)
    assert np.allclose(values, np.linalg.svd(F)[1] ** 2, atol=1e-13)


def test_noise_on_a_single_number():
    U, lam = clip_and_noise(torch.ones(1, 1), torch.ones(1), clip=0.0, noise=0.5, seed=2)
    assert U.tolist() == [[1.0]]
    assert lam.shape == (1,)
    assert float(lam) != 1.0


def test_clip_and_noise_refuse():
    U, lam = sketch(2, 5), torch.ones(2, dtype=F64)
    for bad in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match="clip"):
            clip_and_noise(U, lam, clip=bad, noise=0.0, seed=0)
        with pytest.raises(ValueError, match="noise"):
            clip_and_noise(U, lam, clip=0.0, noise=bad, seed=0)
        with pytest.raises(ValueError, match="eigenvalues"):
            clip_and_noise(U, lam * bad, clip=1.0, noise=0.0, seed=0)
    with pytest.raises(ValueError, match="one value a row"):
        clip_and_noise(U, lam[:1], clip=1.0, noise=0.0, seed=0)
