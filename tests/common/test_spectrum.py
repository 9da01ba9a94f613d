"""Spectral transfer against direct sums, and what must hold for any image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics.spectrum import Window, amplitudes, bank_of, style_of, transfer, window

SHAPES = [(7,), (8,), (6, 5), (5, 8), (1, 6), (6, 1), (2, 9), (4, 5, 6), (5, 1, 4), (3, 7, 2), (1, 1)]


def images(shape, *, count=2, channels=2, seed=0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, *shape, generator=made, dtype=dtype) + 0.7


def dft(image):
    """F[k] of one image by its definition, one sum per bin; numpy complex128, bins as numpy orders them."""
    values = image.numpy()
    places = np.stack(np.meshgrid(*[np.arange(n) for n in values.shape], indexing="ij"))
    found = np.empty(values.shape, dtype=complex)
    for k in np.ndindex(*values.shape):
        turns = sum(k[axis] * places[axis] / n for axis, n in enumerate(values.shape))
        found[k] = (values * np.exp(-2j * np.pi * turns)).sum()
    return found


def inverse(spectrum):
    places = np.stack(np.meshgrid(*[np.arange(n) for n in spectrum.shape], indexing="ij"))
    found = np.empty(spectrum.shape, dtype=complex)
    for x in np.ndindex(*spectrum.shape):
        turns = sum(x[axis] * places[axis] / n for axis, n in enumerate(spectrum.shape))
        found[x] = (spectrum * np.exp(2j * np.pi * turns)).sum() / spectrum.size
    return found


def bins_of(found):
    """All bins of a window, in the order in which a style counts them."""
    return list(np.ndindex(*[2 * b + 1 for b in found.half]))


def slow_amplitudes(image, found):
    spectrum, bins = np.abs(dft(image)) / image.numel(), bins_of(found)
    return [
        spectrum[tuple((k - b) % n for k, b, n in zip(bin, found.half, image.shape, strict=True))]
        for bin in bins[len(bins) // 2 :]
    ]


def slow_transfer(image, style, found, lam):
    """The definition, bin by bin, over the whole window: every bin and, on its own, its mirror image."""
    spectrum, bins = dft(image), bins_of(found)
    for place, bin in enumerate(bins):
        index = tuple((k - b) % n for k, b, n in zip(bin, found.half, image.shape, strict=True))
        target = float(style[abs(place - len(bins) // 2)]) * image.numel()
        size = (1 - lam) * abs(spectrum[index]) + lam * target
        spectrum[index] = size * np.exp(1j * np.angle(spectrum[index]))
    return inverse(spectrum)


def some_window(shape, width=2):
    return Window(tuple(min(width, (n - 1) // 2) for n in shape))


def some_style(found, *, channels=2, seed=5):
    return torch.rand(
        channels, found.values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_amplitudes_are_those_of_the_direct_sums(shape):
    x, found = images(shape), some_window(shape)
    got = amplitudes(x, found)
    assert got.shape == (2, 2, found.values)
    for n in range(2):
        for c in range(2):
            assert got[n, c].tolist() == pytest.approx(slow_amplitudes(x[n, c], found), abs=1e-13)
    assert torch.allclose(got[..., 0], x.flatten(2).mean(dim=2).abs(), atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_transfer_is_the_direct_one_and_real_by_itself(shape, lam):
    x, found = images(shape), some_window(shape)
    style = some_style(found)
    got = transfer(x, style, found, lam, keep="none")
    for n in range(2):
        for c in range(2):
            slow = slow_transfer(x[n, c], style[c], found, lam)
            assert abs(slow.imag).max() < 1e-12
            assert abs(got[n, c].numpy() - slow.real).max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_phases_stay_and_amplitudes_become_the_styles_inside_and_stay_outside(shape):
    x, found = images(shape, count=1, channels=1), some_window(shape, 1)
    style = some_style(found, channels=1) + 0.1
    before, after = dft(x[0, 0]), dft(transfer(x, style, found, keep="none")[0, 0])
    assert abs(np.angle(after / before)).max() < 1e-9
    inside = np.zeros(shape, dtype=bool)
    inside[np.ix_(*[[k % n for k in range(-b, b + 1)] for b, n in zip(found.half, shape, strict=True)])] = (
        True
    )
    assert inside.sum() == 2 * found.values - 1
    assert np.allclose(after[~inside], before[~inside], rtol=0, atol=1e-12)
    got = slow_amplitudes(torch.from_numpy(inverse(after).real), found)
    assert got == pytest.approx(style[0].tolist(), abs=1e-12)


# ---- what must hold --------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    found = Window(tuple(draw(st.integers(0, (n - 1) // 2)) for n in shape))
    return images(shape, seed=draw(st.integers(0, 999))), found, draw(st.floats(0, 1))


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_twice_is_once_and_mixing_is_linear(case):
    x, found, lam = case
    style = some_style(found)
    once = transfer(x, style, found, keep="none")
    assert torch.allclose(transfer(once, style, found, keep="none"), once, atol=1e-12)
    assert torch.allclose(transfer(x, style, found, lam, keep="none"), (1 - lam) * x + lam * once, atol=1e-12)
    assert torch.equal(transfer(x, style, found, 0.0, keep="rescale"), x)
    assert torch.equal(transfer(x, style, found, 0.0), x)


@settings(deadline=None, max_examples=20)
@given(case=cases())
def test_ones_own_style_changes_nothing(case):
    x, found, lam = case
    own = amplitudes(x, found)
    assert torch.allclose(transfer(x, own, found, lam, keep="none"), x, atol=1e-12)
    assert torch.allclose(style_of([x[:1]], found), own[0], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_keeps_its_dtype_and_follows_float64(dtype):
    x, found = images((8, 6), dtype=dtype), Window((2, 1))
    style = some_style(found)
    got = transfer(x, style, found, 0.6, keep="none")
    assert got.dtype == dtype
    assert torch.equal(transfer(x, style, found, 0.0), x)
    exact = transfer(x.to(torch.float64), style, found, 0.6, keep="none")
    assert (got.to(torch.float64) - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_a_batch_is_its_images_each_with_its_own_style_and_share():
    x, found = images((6, 5, 4), count=3), Window((1, 2, 1))
    styles, lam = torch.stack([some_style(found, seed=n) for n in range(3)]), torch.tensor([0.2, 0.0, 1.0])
    got = transfer(x, styles, found, lam, keep="clip")
    for n in range(3):
        one = transfer(x[n : n + 1], styles[n], found, float(lam[n]), keep="clip")
        assert torch.allclose(got[n : n + 1], one, atol=1e-7)
    assert torch.equal(got[1], x[1])


def test_an_image_resampled_without_loss_has_the_same_style():
    """Three cosines on grids of different sizes over one field of view."""

    def cosines(*shape):
        grid = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) / n for n in shape], indexing="ij")
        x, y = (2 * math.pi * axis for axis in grid)
        return (3 + 2 * torch.cos(x + 0.3) + 0.5 * torch.cos(2 * y - x))[None, None]

    found = Window((2, 2))
    small, large = amplitudes(cosines(8, 9), found), amplitudes(cosines(21, 16), found)
    assert torch.allclose(small, large, atol=1e-14)
    assert sorted(small.flatten().tolist())[-3:] == pytest.approx([0.25, 1.0, 3.0])
    assert torch.allclose(style_of([cosines(8, 9), cosines(21, 16)], found), small[0], atol=1e-14)


# ---- the intensity range ---------------------------------------------------------------------------------------------


def test_the_range_is_that_of_the_source_by_image_and_channel():
    x, found = images((9, 8), count=3), Window((2, 2))
    style = 5 * some_style(found)
    free, clipped = (transfer(x, style, found, keep=keep) for keep in ("none", "clip"))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    assert bool((free > high).any())
    assert bool((free < low).any())
    assert torch.equal(clipped, free.clamp(low, high))
    rescaled = transfer(x, style, found, keep="rescale")
    assert torch.equal(rescaled.amin((2, 3), keepdim=True), low)
    assert torch.allclose(rescaled.amax((2, 3), keepdim=True), high, atol=1e-12)
    for n in range(3):
        for c in range(2):
            assert np.corrcoef(rescaled[n, c].flatten(), free[n, c].flatten())[0, 1] == pytest.approx(1)
    limited = transfer(x, style, found, keep="clip", limits=(-1.0, 4.0))
    assert torch.equal(limited, free.clamp(-1.0, 4.0))


def test_bin_0_alone_is_the_mean_and_rescaling_takes_it_back():
    x, found = images((5, 6)), window((5, 6), beta=0)
    assert found == Window((0, 0))
    style = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    mean = x.mean((2, 3), keepdim=True)
    expected = x - mean + mean.sign() * style[:, :, None]
    assert torch.allclose(transfer(x, style, found, keep="none"), expected, atol=1e-13)
    assert torch.allclose(transfer(x, style, found, keep="rescale"), x, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, -1234.567])
def test_a_flat_image_gets_no_pattern_out_of_rounding(dtype, level):
    x, found = torch.full((1, 1, 37, 53), level, dtype=dtype), Window((3, 3))
    style = torch.full((1, found.values), 2.0)
    got = transfer(x, style, found, keep="none")
    expected = math.copysign(2.0, level) if level else 0.0
    assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * max(abs(level), 1)


# ---- windows, styles, banks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rule", "half"),
    [
        ((256, 256), {"beta": 0.01}, (2, 2)),
        ((384, 384), {"beta": 0.003}, (1, 1)),
        ((100, 40), {"beta": 0.29}, (29, 11)),  # 0.29 * 100 is 28.999999999999996
        ((8, 7, 2, 1), {"beta": 0.5}, (3, 3, 0, 0)),  # the Nyquist bin is never in
        ((10, 3), {"beta": 1e-9}, (1, 1)),
        ((10, 3), {"beta": 0}, (0, 0)),
        ((128, 128, 20), {"cutoff": 0.02, "spacing": (0.5, 0.75, 5.0)}, (1, 1, 2)),
        ((128, 128, 20), {"cutoff": 0.1, "spacing": (0.5, 0.75, 5.0)}, (6, 9, 9)),
        ((64, 64), {"cutoff": 0.0, "spacing": (1.0, 1.0)}, (0, 0)),
    ],
)
def test_the_window_of_a_cut_off(shape, rule, half):
    assert window(shape, **rule).half == half


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"beta": 0.1, "cutoff": 0.1},
        {"beta": 0.51},
        {"beta": -0.1},
        {"beta": math.nan},
        {"beta": 0.1, "spacing": (1.0, 1.0)},
        {"cutoff": 0.1},
        {"cutoff": 0.1, "spacing": (1.0,)},
        {"cutoff": 0.1, "spacing": (1.0, 0.0)},
        {"cutoff": 0.1, "spacing": (1.0, math.inf)},
        {"cutoff": math.inf, "spacing": (1.0, 1.0)},
        {"cutoff": -1.0, "spacing": (1.0, 1.0)},
    ],
)
def test_cut_offs_that_are_refused(rule):
    with pytest.raises(ValueError, match=r"\.$"):
        window((8, 8), **rule)


def test_a_style_is_the_mean_over_images_of_all_batches():
    found = Window((1, 2))
    batches = [images((6, 7), count=3, seed=1), images((9, 8), count=1, seed=2)]
    every = torch.cat([amplitudes(batch, found) for batch in batches])
    got = style_of(iter(batches), found)
    assert got.dtype == torch.float64
    assert torch.allclose(got, every.mean(dim=0), atol=1e-15)
    assert torch.allclose(style_of([batch.float() for batch in batches], found), got, atol=1e-6)


def test_a_bank_holds_different_images_evenly_drawn():
    found = Window((1,))
    x = images((6,), count=10)
    every = amplitudes(x, found)
    drawn = [0] * 10
    for seed in range(400):
        bank = bank_of([x[:4], x[4:]], found, 3, torch.Generator().manual_seed(seed))
        hits = [int((every == one).all(dim=(1, 2)).nonzero()) for one in bank]
        assert len(set(hits)) == 3
        for hit in hits:
            drawn[hit] += 1
    assert all(abs(count - 120) < 5 * math.sqrt(400 * 0.3 * 0.7) for count in drawn)
    few = bank_of([x[:2]], found, 3, torch.Generator().manual_seed(0))
    assert torch.equal(few, every[:2])


def test_what_does_not_fit_is_refused():
    x, found = images((6, 6)), Window((1, 1))
    style = some_style(found)
    wrong = [
        lambda: Window(()),
        lambda: Window((1, -1)),
        lambda: window((0, 4), beta=0.1),
        lambda: amplitudes(x[0], found),
        lambda: amplitudes(x.long(), found),
        lambda: amplitudes(x, Window((1, 3))),  # 7 bins in 6 voxels
        lambda: amplitudes(x.masked_fill(x > 1, math.nan), found),
        lambda: style_of([], found),
        lambda: style_of([x, x[:, :1]], found),
        lambda: bank_of([], found, 2, torch.Generator()),
        lambda: bank_of([x], found, 0, torch.Generator()),
        lambda: transfer(x, style[:, :-1], found),
        lambda: transfer(x, style[:1], found),
        lambda: transfer(x, -style, found),
        lambda: transfer(x, style * math.inf, found),
        lambda: transfer(x, style, found, 1.1),
        lambda: transfer(x, style, found, math.nan),
        lambda: transfer(x, style, found, torch.ones(3)),
        lambda: transfer(x, style, found, keep="crop"),
        lambda: transfer(x, style, found, limits=(1.0, 1.0)),
    ]
    for attempt in wrong:
        with pytest.raises(ValueError, match=r"\.$"):
            attempt()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    x, found = images((6, 5, 8)), Window((2, 1, 2))
    style = style_of([images((6, 5, 8), seed=9)], found)
    got = transfer(x.cuda(), style, found, 0.7, keep="rescale")
    assert got.is_cuda
    assert torch.allclose(got.cpu(), transfer(x, style, found, 0.7, keep="rescale"), atol=1e-12)
