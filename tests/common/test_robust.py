"""Median and trimmed mean: the arithmetic against slow oracles, the override in a whole round."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common.shelf
from common.config import GuardConfig, RunConfig
from common.errors import PayloadError
from common.method import Groups, MethodParams, Reply, RoundContext, ServerHalf, make_halves
from common.methods import METHODS
from common.methods.fedavg import FEDAVG
from common.numerics import robust
from common.numerics.robust import coordinate_median, cut_count, trimmed_mean
from common.payload import Kind, Payload, PayloadSpec, Reduce, State
from tests.common.strategies import bits

CTX = RoundContext("run", 1, 3, 0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def slow_median(column):
    ordered = sorted(float(value) for value in column)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def slow_trimmed(column, share):
    """Definition 2 with exact fractions: the share as it is written, the mean rounded once."""
    ordered = sorted(Fraction(float(value)) for value in column)
    cut = math.floor(Fraction(str(share)) * len(ordered))
    left = ordered[cut : len(ordered) - cut]
    return float(sum(left) / len(left))


@st.composite
def stacks(draw):
    shape = (draw(st.integers(1, 9)), *draw(st.lists(st.integers(1, 4), max_size=2)))
    number = st.floats(-1e6, 1e6, width=32)
    size = math.prod(shape)
    values = draw(st.lists(number, min_size=size, max_size=size))
    return np.array(values, dtype=np.float32).reshape(shape)


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(stack=stacks())
def test_the_median_is_numpys_and_the_slow_one(stack):
    got = coordinate_median(torch.from_numpy(stack))
    assert got.dtype == torch.float64
    assert got.shape == stack.shape[1:]
    assert np.array_equal(got.numpy(), np.median(stack.astype(np.float64), axis=0))
    flat = stack.reshape(len(stack), -1)
    assert got.reshape(-1).tolist() == [slow_median(flat[:, k]) for k in range(flat.shape[1])]


@settings(deadline=None, max_examples=40)
@given(stack=stacks(), share=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.29, 0.34, 0.4, 0.49]))
def test_the_trimmed_mean_is_the_slow_one(stack, share):
    got = trimmed_mean(torch.from_numpy(stack), share)
    flat = stack.reshape(len(stack), -1)
    want = [slow_trimmed(flat[:, k], share) for k in range(flat.shape[1])]
    assert got.shape == stack.shape[1:]
    # nine values of at most 1e6, summed in float64
    assert np.allclose(got.reshape(-1).numpy(), want, rtol=1e-15, atol=9 * 9e6 * 2**-53)


@settings(deadline=None, max_examples=30)
@given(stack=stacks(), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.2, 0.4]))
def test_the_order_of_the_sites_changes_no_bit(stack, seed, share):
    stack[random.Random(seed).randrange(len(stack))] *= 0  # zeros of both signs
    order = random.Random(seed).sample(range(len(stack)), len(stack))
    for reduce in (coordinate_median, lambda values: trimmed_mean(values, share)):
        assert bits(reduce(torch.from_numpy(stack))) == bits(reduce(torch.from_numpy(stack[order])))


@settings(deadline=None, max_examples=30)
@given(stack=stacks())
def test_without_a_cut_it_is_the_unweighted_mean(stack):
    got = trimmed_mean(torch.from_numpy(stack), 0.0).numpy()
    want = stack.astype(np.float64).mean(axis=0)
    assert np.allclose(got, want, rtol=1e-15, atol=9 * 9e6 * 2**-53)


@settings(deadline=None, max_examples=30)
@given(sites=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_largest_cut_leaves_the_median(sites, seed):
    stack = torch.randn(sites, 7, generator=torch.Generator().manual_seed(seed))
    share = (sites - 1) // 2 / sites
    assert torch.equal(trimmed_mean(stack, share), coordinate_median(stack))


def test_the_cut_is_the_floor_of_the_share_as_written_and_never_all():
    for sites in range(1, 201):
        cuts = [cut_count(sites, percent / 100) for percent in range(50)]
        assert cuts == [percent * sites // 100 for percent in range(50)]
        assert sites - 2 * cut_count(sites, math.nextafter(0.5, 0)) >= 1


@pytest.mark.parametrize("sites", [1, 2, 3, 5, 8])
def test_blocks_and_their_borders_change_nothing(monkeypatch, sites):
    stack = torch.randn(sites, 11, 13, generator=torch.Generator().manual_seed(sites))
    whole = coordinate_median(stack), trimmed_mean(stack, 0.4)
    for size in (1, 17, 64, 143 * sites):
        monkeypatch.setattr(robust, "BLOCK_VALUES", size)
        assert torch.equal(coordinate_median(stack), whole[0])
        assert torch.equal(trimmed_mean(stack, 0.4), whole[1])
    assert np.array_equal(whole[0].numpy(), np.median(stack.numpy().astype(np.float64), axis=0))


def test_fewer_than_half_cannot_move_the_median_beyond_the_others():
    honest = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]])
    for bad in (1e30, -1e30):
        got = coordinate_median(torch.cat([honest, torch.full((2, 2), bad)]))
        assert 1 <= got[0] <= 3
        assert -3 <= got[1] <= -1
        got = trimmed_mean(torch.cat([honest, torch.full((2, 2), bad)]), 0.4)
        assert 1 <= got[0] <= 3
        assert -3 <= got[1] <= -1


def test_the_middle_near_the_end_of_float64_does_not_overflow():
    most = torch.full((4, 2), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert torch.equal(coordinate_median(most), most[0])
    assert torch.equal(trimmed_mean(most, 0.25), most[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sites", [1, 3])
def test_what_is_not_finite_is_refused_and_not_sorted_away(value, sites):
    stack = torch.zeros(sites, 4)
    stack[-1, 2] = value
    for reduce in (coordinate_median, lambda values: trimmed_mean(values, 0.4)):
        with pytest.raises(ValueError, match="finite"):
            reduce(stack)


@pytest.mark.parametrize("stack", [torch.empty(0, 3), torch.tensor(1.0)])
def test_no_site_is_refused(stack):
    for reduce in (coordinate_median, lambda values: trimmed_mean(values, 0.2)):
        with pytest.raises(ValueError, match="at least one site"):
            reduce(stack)


@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_a_share_out_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"below 0\.5"):
        trimmed_mean(torch.zeros(3, 2), share)


def test_tensors_without_values_have_a_median_without_values():
    assert coordinate_median(torch.empty(3, 0, 2)).shape == (0, 2)
    assert trimmed_mean(torch.empty(1, 0), 0.2).shape == (0,)


# ---- the override in a round -----------------------------------------------------------------------------------------


def half_with(reduce, trim=0.2, method=FEDAVG):
    server, _ = make_halves(
        method, RunConfig(method=method.name, guard=GuardConfig(reduce=reduce, trim=trim))
    )
    return server


def combine(half, replies):
    """Fold (alias, cases, tensors) and finish; returns the new model."""
    state = half.init(replies[0][2], Groups({}), CTX)
    acc = half.begin(state, CTX)
    for site, cases, tensors in replies:
        acc = half.fold(acc, Reply(site, cases, {"model": Payload("model", Kind.MODEL, tensors)}))
    return half.finish(state, acc, CTX).part("model")


def three_sites(bad=1e6):
    numbers = np.random.default_rng(3)
    values = [numbers.normal(size=(2, 5)).astype(np.float32) for _ in range(2)]
    values.append(np.full((2, 5), bad, np.float32))
    counts = [torch.tensor(4), torch.tensor(7), torch.tensor(9000)]
    return values, [
        (site, cases, {"w": torch.from_numpy(value), "n": count})
        for site, cases, value, count in zip("abc", (1, 2, 1000), values, counts, strict=True)
    ]


def test_the_median_of_three_shrugs_off_a_site_that_sends_a_million():
    values, replies = three_sites()
    got = combine(half_with("median"), replies)
    assert np.array_equal(got["w"].numpy(), np.median(values, axis=0).astype(np.float32))
    assert (got["n"].item(), got["n"].dtype) == (7, torch.int64)
    assert combine(half_with("declared"), replies)["w"].min() > 9e5  # the mean does not


def test_the_trimmed_mean_cuts_the_share_and_counts_every_site_once():
    values, replies = three_sites()
    got = combine(half_with("trimmed-mean", trim=0.34), replies)["w"]
    assert np.array_equal(got.numpy(), np.sort(values, axis=0)[1])
    plain = combine(half_with("trimmed-mean", trim=0.0), replies)
    want = np.mean(np.array(values, dtype=np.float64), axis=0).astype(np.float32)
    assert np.array_equal(plain["w"].numpy(), want)
    assert plain["n"].item() == round((4 + 7 + 9000) / 3)


def test_integer_buffers_are_rounded_to_nearest():
    replies = [
        (site, 1, {"n": torch.tensor(count)}) for site, count in (("a", -5), ("b", -4), ("c", 8), ("d", 3))
    ]
    assert combine(half_with("median"), replies[:2])["n"].item() == -4  # -4.5, ties to even
    assert combine(half_with("median"), replies)["n"].item() == 0  # -0.5
    assert combine(half_with("trimmed-mean", trim=0.0), replies[:3])["n"].item() == 0  # -1/3


@pytest.mark.parametrize("reduce", ["median", "trimmed-mean"])
def test_the_order_of_the_replies_does_not_matter(reduce):
    _, replies = three_sites()
    forth, back = combine(half_with(reduce, 0.34), replies), combine(half_with(reduce, 0.34), replies[::-1])
    assert all(bits(forth[name]) == bits(back[name]) for name in forth)


@pytest.mark.parametrize("reduce", ["median", "trimmed-mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_site_alone_gets_its_weights_back_to_the_bit(reduce, dtype):
    value = torch.randn(64, generator=torch.Generator().manual_seed(1)).mul(100)
    value[0] = -0.0
    value = value.clamp(0, 250).to(dtype) if dtype is torch.uint8 else value.to(dtype)
    got = combine(half_with(reduce), [("a", 5, {"w": value})])["w"]
    assert bits(got) == bits(value)


def test_files_and_memory_give_the_same_and_nothing_stays_open(monkeypatch):
    _, replies = three_sites()
    inside = combine(half_with("median"), replies)
    monkeypatch.setattr(common.shelf, "IN_MEMORY", 1)
    half = half_with("median")
    state = half.init(replies[0][2], Groups({}), CTX)
    acc = half.begin(state, CTX)
    for site, cases, tensors in replies:
        acc = half.fold(acc, Reply(site, cases, {"model": Payload("model", Kind.MODEL, tensors)}))
    file = acc.kept["model"]._file
    assert not acc.sums  # nothing of a reply is summed, and nothing of it stays in memory
    update, closed = half.update, []

    def watched(*given):
        closed.append(file.closed)
        return update(*given)

    half.update = watched
    outside = half.finish(state, acc, CTX).part("model")
    assert all(bits(inside[name]) == bits(outside[name]) for name in inside)
    assert closed == [True]  # the file is gone before the next state is built
    assert not acc.kept


class Declared(ServerHalf):
    """A half that declares robust reductions itself, beside one of every other kind."""

    uplink = (
        PayloadSpec("model", Kind.MODEL, Reduce.WEIGHTED_MEAN),
        PayloadSpec("middle", Kind.UPDATE, Reduce.MEDIAN, like_model=False),
        PayloadSpec("cut", Kind.UPDATE, Reduce.TRIMMED_MEAN, like_model=False, optional=True),
        PayloadSpec("total", Kind.UPDATE, Reduce.SUM, like_model=False),
        PayloadSpec("own", Kind.CLUSTER, Reduce.NONE, like_model=False),
    )

    def update(self, state, reduced, ctx):
        return State({name: tensors["w"] for name, tensors in reduced.items()})


@pytest.mark.parametrize(("reduce", "model"), [("declared", 50.25), ("median", 2.0), ("trimmed-mean", 34.0)])
def test_only_the_weighted_mean_is_replaced(reduce, model):
    half = Declared(None)
    half.robust = GuardConfig(reduce=reduce, trim=0.2)
    acc = half.begin(State(), CTX)
    for site, cases, value in (("a", 1, 1.0), ("b", 1, 2.0), ("c", 2, 99.0)):
        names = ["model", "middle", "total", "own"] + (["cut"] if site != "a" else [])
        tensors = {"w": torch.tensor(value)}
        acc = half.fold(
            acc, Reply(site, cases, {name: Payload(name, Kind.UPDATE, tensors) for name in names})
        )
    got = {name: tensor.item() for name, tensor in half.finish(State(), acc, CTX).tensors.items()}
    assert got == {"model": model, "middle": 2.0, "cut": 50.5, "total": 102.0}


def test_a_round_without_a_case_is_refused_with_a_median_too():
    half = half_with("median")
    state = half.init({"w": torch.ones(1)}, Groups({}), CTX)
    with pytest.raises(PayloadError, match="no site contributed a training case"):
        half.finish(state, half.begin(state, CTX), CTX)


def test_the_guard_is_set_on_the_half_and_not_on_its_class():
    half = half_with("median")
    assert half.robust.reduce == "median"
    assert ServerHalf.robust == FEDAVG.server(MethodParams()).robust == GuardConfig()
    spec = half.uplink[0]
    assert half.reduction(spec) is Reduce.MEDIAN
    assert FEDAVG.server(MethodParams()).reduction(spec) is Reduce.WEIGHTED_MEAN


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_version_and_lets_a_reply_pass(name):
    server, _ = make_halves(METHODS[name], RunConfig(method=name))
    assert METHODS[name].version >= 1
    if type(server).check is ServerHalf.check:  # the others look at what they were sent: tests/common/methods
        assert server.check(Reply("a", 1, {}), State(), CTX) is None
