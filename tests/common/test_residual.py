"""Residuals of Fisher information and the masks made of them, against plain loops and closed forms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch import nn

from common.numerics.diagonal_fisher import Likelihood, diagonal_fisher
from common.numerics.residual import (
    density,
    invariant_weights,
    normalise,
    overlap,
    residual,
    sensitive_above,
    sensitive_fraction,
    share,
    smooth,
)
from common.numerics.spectrum import style_of, transfer, window

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.c.weight": (2, 2, 2), "b.c.bias": (1,), "scale": ()}


def some(seed=0, shapes=SHAPES, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=random, dtype=dtype) for name, shape in shapes.items()}


def flat(values):
    return [float(v) for value in values.values() for v in value.flatten()]


@st.composite
def maps(draw, numbers=None, count=1):
    """Values of a few tensors, with many ties; `count` of them with the same names and shapes."""
    numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0]) | st.floats(0, 1e3) if numbers is None else numbers
    shapes = draw(
        st.lists(st.sampled_from([(), (1,), (4,), (2, 3), (0,), (2, 1, 2)]), min_size=1, max_size=4)
    )
    shapes = [(1,), *shapes]
    made = [
        {
            f"layer{n}.weight": torch.tensor(
                draw(st.lists(numbers, min_size=math.prod(s), max_size=math.prod(s))), dtype=torch.float64
            ).reshape(s)
            for n, s in enumerate(shapes)
        }
        for _ in range(count)
    ]
    return made if count > 1 else made[0]


# ---- residuals -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    every=maps(count=4),
    form=st.sampled_from(["abs", "signed", "relative"]),
    reduce=st.sampled_from(["mean", "max"]),
)
def test_residuals_are_those_of_a_plain_loop(every, form, reduce):
    real, *others = every
    if form == "relative" and not any(flat(real)):
        real = {name: value + 1 for name, value in real.items()}
    before = flat(real)
    got = residual(real, iter(others), form=form, reduce=reduce, eps=0.01, noise=0.0)
    floor = 0.01 * sum(before) / len(before)
    expected = []
    for own, *theirs in zip(before, *map(flat, others), strict=True):
        changes = [other - own if form == "signed" else abs(other - own) for other in theirs]
        if form == "relative":
            changes = [change / (own + floor) for change in changes]
        expected.append(max(changes) if reduce == "max" else sum(changes) / len(changes))
    assert flat(got) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert {name: value.shape for name, value in got.items()} == {n: v.shape for n, v in real.items()}
    assert flat(real) == before  # untouched


def test_a_relative_residual_does_not_depend_on_the_scale_of_the_loss():
    def run(factor):
        real, others = some(0), [some(1), some(2)]
        scaled = [{name: factor * value for name, value in each.items()} for each in (real, *others)]
        return flat(residual(scaled[0], scaled[1:], form="relative"))

    assert run(1e-6) == pytest.approx(run(1.0), rel=1e-12)


def test_rounding_noise_is_no_change():
    """A bias before a normalisation: nothing but rounding, which a normalisation by tensor would blow up."""
    real = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor([3e-16, 1e-15])}
    other = {"weight": torch.tensor([1.5, 2.1]), "bias": torch.tensor([1e-15, 2e-16])}
    got = normalise(residual(real, [other]))
    assert got["bias"].tolist() == [0, 0]
    assert got["weight"].tolist() == [1, 0]
    assert normalise(residual(real, [other], noise=0.0))["bias"].max() == 1


def test_the_same_styles_leave_nothing():
    real = some()
    for form in ("abs", "signed", "relative"):
        got = residual(real, [real, some()], form=form)
        assert not any(flat(got))
        assert not any(flat(normalise(got, "tensor")))
        assert not any(flat(normalise(got, "rank")))
        assert share(sensitive_fraction(got, 0.3, above=0.0)) == 0


def test_a_gain_makes_the_weights_sensitive_and_leaves_the_bias():
    """Logistic regression at 0: F_w = E[x²]/4 and F_b = 1/4, so a gain s on x gives R_w = (s² − 1) F_w, R_b = 0."""
    network = nn.Linear(3, 1).double()
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=random, dtype=torch.float64)
    y = torch.randint(2, (50, 1), generator=random).double()

    def fisher(inputs):
        return diagonal_fisher(network, ["weight", "bias"], lambda: [(inputs, y)], Likelihood("bernoulli"))

    got = residual(fisher(x), [fisher(3 * x)])
    assert torch.allclose(got["weight"][0], 8 * (x**2).mean(dim=0) / 4, rtol=1e-12)
    assert float(got["bias"]) == 0
    mask = sensitive_fraction(got, 0.75)
    assert density(mask) == {"weight": 1.0, "bias": 0.0}


@pytest.mark.parametrize("norm", [True, False])
def test_another_sites_brightness_is_found_unless_a_normalisation_takes_it_out(norm):
    """The whole chain: style, transfer of bin 0 (a shift), Fisher information, residual."""
    middle = nn.InstanceNorm2d(3, affine=True) if norm else nn.PReLU()
    network = nn.Sequential(nn.Conv2d(1, 3, 1), middle, nn.Conv2d(3, 2, 1)).double().eval()
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    names = [name for name, _ in network.named_parameters()]
    x = torch.rand(4, 1, 8, 8, generator=random, dtype=torch.float64)
    y, mean = (x > 0.6).long(), window((8, 8), beta=0)

    def fisher(images):
        return diagonal_fisher(network, names, lambda: [(images, y)], Likelihood())

    brighter = transfer(x, style_of([x + 2.0], mean), mean, keep="none")
    assert torch.allclose(brighter.mean((1, 2, 3)), (x + 2.0).mean().expand(4))
    real = fisher(x)
    got = residual(real, [fisher(brighter)])
    if norm:
        assert max(flat(got)) < 1e-9 * max(flat(real))
        assert max(flat(real)) > 1e-3
    else:
        assert float(got["0.weight"].max()) > 0.5 * float(real["0.weight"].max())


# ---- normalisation ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(values=maps(numbers=st.sampled_from([-2.0, 0.0, 0.5, 3.0]) | st.floats(-1e3, 1e3)))
def test_normalised_values_are_numpys_and_scipys(values):
    got = normalise(values, "tensor")
    for name, value in values.items():
        array = value.numpy()
        if array.size and np.ptp(array) > 1e-9:
            assert np.allclose(
                got[name].numpy(), (array - array.min()) / np.ptp(array), rtol=1e-6, atol=1e-12
            )
    every = np.array(flat(values))
    ranks = rankdata(every)  # equal values share the mean of their ranks
    spread = np.ptp(ranks)
    expected = (ranks - ranks.min()) / spread if spread else np.zeros_like(ranks)
    assert np.allclose(flat(normalise(values, "rank")), expected, rtol=0, atol=1e-12)
    for how in ("tensor", "rank"):
        found = normalise(values, how)
        assert all(0 <= value <= 1 for value in flat(found))
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in values.items()}


@pytest.mark.parametrize("scale", [1e308, 1e-320, 1.0])
def test_extreme_values_are_normalised_too(scale):
    got = normalise({"a": torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * scale})["a"]
    assert got.tolist() == pytest.approx([0, 0.5, 1])


# ---- masks -----------------------------------------------------------------------------------------------------------


def slow_mask(values, rho):
    """Sort all parameters by value, the first one first among equals, and take ⌈ρ p⌉."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    chosen = set(order[: math.ceil(Fraction(str(rho)) * len(values))])
    return [index in chosen for index in range(len(values))]


@settings(deadline=None, max_examples=60)
@given(values=maps(), rho=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]) | st.floats(0, 1))
def test_the_mask_has_the_exact_count_and_breaks_ties_by_index(values, rho):
    mask = sensitive_fraction(values, rho)
    got = [bool(v) for part in mask.values() for v in part.flatten()]
    assert got == slow_mask(flat(values), rho)
    assert {name: part.shape for name, part in mask.items()} == {n: v.shape for n, v in values.items()}
    assert all(part.dtype == torch.bool for part in mask.values())
    bounded = sensitive_fraction(values, rho, above=0.25)
    kept = [bool(v) for part in bounded.values() for v in part.flatten()]
    if rho == 1:
        assert all(kept)
    else:
        assert kept == [chosen and value > 0.25 for chosen, value in zip(got, flat(values), strict=True)]


def test_residuals_of_0_stay_invariant_if_asked_but_not_where_all_is_local():
    values = {"a": torch.tensor([0.0, 2.0, 0.0, 0.0])}
    assert sensitive_fraction(values, 0.75)["a"].tolist() == [True, True, True, False]
    assert sensitive_fraction(values, 0.75, above=0.0)["a"].tolist() == [False, True, False, False]
    assert sensitive_fraction(values, 1.0, above=0.0)["a"].all()


@pytest.mark.parametrize(
    ("size", "rho", "count"),
    [(30, 0.1, 3), (100, 0.07, 7), (100, 0.29, 29), (3, 0.01, 1), (1000, 0.2005, 201)],
)
def test_the_share_is_taken_as_it_is_written(size, rho, count):
    mask = sensitive_fraction({"a": torch.rand(size, generator=torch.Generator().manual_seed(0))}, rho)
    assert int(mask["a"].sum()) == count


def test_equal_values_are_taken_in_the_order_of_the_parameters():
    values = {"b": torch.zeros(2, 2), "a": torch.zeros(3)}
    mask = sensitive_fraction(values, 0.7)  # 5 of 7
    assert mask["b"].all()
    assert mask["a"].tolist() == [True, False, False]
    turned = {"b": torch.tensor([[0.0, 1.0], [0.0, 0.0]]).T, "a": torch.zeros(3)}  # not contiguous
    assert sensitive_fraction(turned, 0.2)["b"].tolist() == [[True, False], [True, False]]


def test_a_threshold_is_not_above_itself():
    mask = sensitive_above({"a": torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)}, 0.4)
    assert mask["a"].tolist() == [False, False, True]


def test_soft_weights_are_what_is_left_to_one():
    got = invariant_weights(normalise(some(), "rank"))
    assert flat(got) == pytest.approx([1 - value for value in flat(normalise(some(), "rank"))])
    assert min(flat(got)) == 0
    assert max(flat(got)) == 1


# ---- over rounds -----------------------------------------------------------------------------------------------------


def test_smoothing_is_the_weighted_sum_over_rounds():
    rounds, average = [some(seed) for seed in range(4)], None
    for now in rounds:
        average = smooth(average, now, 0.6)
    weights = [0.6**3, 0.4 * 0.6**2, 0.4 * 0.6, 0.4]
    expected = [
        sum(w * v for w, v in zip(weights, each, strict=True))
        for each in zip(*map(flat, rounds), strict=True)
    ]
    assert flat(average) == pytest.approx(expected, rel=1e-12)
    assert flat(smooth(rounds[0], rounds[1], 0.0)) == flat(rounds[1])
    first = smooth(None, rounds[0], 0.6)
    first["scale"].fill_(9.0)
    assert float(rounds[0]["scale"]) != 9.0


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_densities_are_by_layer():
    mask = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    mask["a.weight"][0] = True
    mask["a.bias"][2] = True
    mask["scale"].fill_(True)
    assert density(mask) == {"a": 3 / 9, "b.c": 0.0, "scale": 1.0}
    assert share(mask) == 4 / 19


@settings(deadline=None, max_examples=30)
@given(every=maps(count=3, numbers=st.booleans()))
def test_overlaps_are_those_of_sets(every):
    masks = [{name: value > 0 for name, value in each.items()} for each in every]
    got = overlap(masks)
    sets = [{index for index, value in enumerate(flat(mask)) if value} for mask in masks]
    for row in range(3):
        for column in range(3):
            union = sets[row] | sets[column]
            expected = len(sets[row] & sets[column]) / len(union) if union else 1.0
            assert float(got[row, column]) == pytest.approx(expected)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    good, masks = some(), {name: value > 0.5 for name, value in some().items()}
    less = {name: value for name, value in good.items() if name != "scale"}
    shaped = {**good, "scale": torch.zeros(1)}
    nan, negative = {**good, "scale": torch.tensor(math.nan)}, {**good, "scale": torch.tensor(-1.0)}
    zero = {name: torch.zeros_like(value) for name, value in good.items()}
    wrong = [
        lambda: residual(good, []),
        lambda: residual(good, [less]),
        lambda: residual(good, [shaped]),
        lambda: residual(good, [nan]),
        lambda: residual(negative, [good]),
        lambda: residual(good, [good, negative]),
        lambda: residual({}, [{}]),
        lambda: residual(zero, [good], form="relative"),
        lambda: residual(good, [good], form="square"),
        lambda: residual(good, [good], reduce="median"),
        lambda: residual(good, [good], eps=0.0),
        lambda: residual(good, [good], noise=1.0),
        lambda: normalise(good, "layer"),
        lambda: normalise(nan),
        lambda: sensitive_fraction(good, 1.01),
        lambda: sensitive_fraction(good, math.nan),
        lambda: sensitive_fraction(nan, 0.5),
        lambda: sensitive_fraction({"a": torch.zeros(0)}, 0.5),
        lambda: sensitive_above(good, math.nan),
        lambda: invariant_weights({"a": torch.tensor([1.5])}),
        lambda: invariant_weights({"a": torch.tensor([-0.5])}),
        lambda: smooth(good, less, 0.5),
        lambda: smooth(good, good, 1.0),
        lambda: share({}),
        lambda: share(good),
        lambda: density(good),
        lambda: overlap([]),
        lambda: overlap([masks, {"a.weight": masks["a.weight"]}]),
    ]
    for attempt in wrong:
        with pytest.raises(ValueError, match=r"\.$"):
            attempt()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    def run(device):
        real, other = ({n: v.to(device) for n, v in some(seed).items()} for seed in (0, 1))
        found = residual(real, [other], form="relative")
        every = {**normalise(found), **{f"{n} rank": v for n, v in normalise(found, "rank").items()}}
        return every, sensitive_fraction(found, 0.3)

    (cpu, cpu_mask), (cuda, cuda_mask) = run("cpu"), run("cuda")
    assert flat(cuda) == pytest.approx(flat(cpu), rel=1e-12)
    assert all(torch.equal(cuda_mask[name].cpu(), part) for name, part in cpu_mask.items())
