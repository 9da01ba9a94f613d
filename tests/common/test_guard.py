"""Guards: norms against exact ones, every limit on both sides of its border, sentences that say what to do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import guard as guards
from common.config import GuardConfig
from common.errors import PayloadError
from common.guard import check_size, check_state, check_updates, l2_norm, outliers, update_norm
from common.payload import Kind, Payload, PayloadSpec, Reduce

MODEL = PayloadSpec("model", Kind.MODEL)
UPDATE = PayloadSpec("delta", Kind.UPDATE)
OFF = GuardConfig(update_ratio=0, rms=0)


def payloads(kind=Kind.MODEL, name="model", **tensors):
    return {name: Payload(name, kind, {key: torch.as_tensor(value) for key, value in tensors.items()})}


ARRAYS = st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=40)


# ---- norms -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(first=ARRAYS, second=ARRAYS, block=st.sampled_from([1, 3, 1 << 20]))
def test_the_norm_is_the_exact_one_over_all_floating_tensors(first, second, block):
    tensors = {"a": torch.tensor(first), "b": torch.tensor(second), "n": torch.tensor([10**9])}
    want = math.sqrt(math.fsum(value * value for value in first + second))
    old, guards.BLOCK = guards.BLOCK, block
    try:
        assert l2_norm(tensors) == pytest.approx(want, rel=1e-13)
    finally:
        guards.BLOCK = old


@settings(deadline=None, max_examples=40)
@given(pair=ARRAYS.flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))))
def test_the_update_is_the_difference_where_names_match(pair):
    new, old = (torch.tensor(values) for values in pair)
    more = torch.tensor([3.0, 4.0])
    sent = {"w": old, "other": torch.tensor(1e9)}
    want = np.linalg.norm(new.numpy().astype(np.float64) - old.numpy().astype(np.float64))
    assert update_norm({"w": new}, sent) == pytest.approx(want, rel=1e-12)
    assert update_norm({"w": new, "more": more}, sent) == pytest.approx(math.hypot(want, 5), rel=1e-12)
    assert update_norm({"w": new}, None) == update_norm({"w": new}, {}) == l2_norm({"w": new})


def test_a_difference_is_taken_in_float64_and_not_in_the_models_dtype():
    big, small = torch.tensor([2.0**24]), torch.tensor([-1.0])
    assert update_norm({"w": big}, {"w": small}) == 2**24 + 1  # float32 would say 2**24


def test_a_tensor_of_another_shape_counts_in_full():
    assert update_norm({"w": torch.full((4,), 2.0)}, {"w": torch.full((2, 2), 2.0)}) == 4.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_at_the_ends_of_a_dtype_neither_overflow_nor_vanish(dtype):
    info = torch.finfo(dtype)
    for value in (info.max / 4, info.tiny):
        tensor = torch.full((9,), value, dtype=dtype)
        assert l2_norm({"w": tensor}) == pytest.approx(3 * tensor[0].item(), rel=1e-12)
    most = torch.full((4,), info.max / 8, dtype=dtype)
    assert update_norm({"w": most}, {"w": -most}) == pytest.approx(4 * most[0].item(), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_an_infinite_norm_and_passes_no_limit(value):
    bad = payloads(w=[1.0, value])
    assert l2_norm(bad["model"].tensors) == math.inf
    with pytest.raises(PayloadError, match="root mean square inf"):
        check_size(bad, GuardConfig(), who="alpha")
    with pytest.raises(PayloadError, match="norm inf"):
        check_updates(bad, [MODEL], payloads(w=[1.0, 1.0]), GuardConfig(), who="alpha")
    assert outliers({"a": 1.0, "b": 1.0, "c": math.nan}, GuardConfig(outlier=5)).keys() == {"c"}


def test_nothing_has_no_norm():
    assert l2_norm({}) == l2_norm({"w": torch.empty(0)}) == l2_norm({"n": torch.tensor(7)}) == 0.0
    assert l2_norm({"w": torch.zeros(3)}) == 0.0


# ---- size ------------------------------------------------------------------------------------------------------------


def test_size_is_refused_above_the_root_mean_square_and_not_at_it():
    guard = GuardConfig(rms=10)
    check_size(payloads(w=[10.0, -10.0], n=10**9, empty=torch.empty(0)), guard, who="alpha")
    check_size(payloads(w=[14.0, 0.0]), guard, who="alpha")  # one large value, a small mean square
    with pytest.raises(PayloadError) as caught:
        check_size(payloads(fine=[1.0], w=[10.5, -10.5]), guard, who="alpha")
    for word in ("alpha", "'model'", "'w'", "10.5", " 10;", "guard.rms", "raise"):
        assert word in str(caught.value)
    assert "'fine'" not in str(caught.value)
    assert caught.value.site == "alpha"


def test_size_off_allows_everything():
    check_size(payloads(w=[3e38]), OFF, who="alpha")


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_a_models_update_is_its_difference_and_an_update_is_itself():
    sent = payloads(w=[1.0, 1.0])
    replies = payloads(w=[4.0, 5.0]) | payloads(Kind.UPDATE, "delta", w=[6.0, 8.0])
    assert check_updates(replies, [MODEL], sent, OFF, who="a") == 5.0
    assert check_updates(replies, [MODEL, UPDATE], sent, OFF, who="a") == 10.0
    assert check_updates(replies, [MODEL], {}, OFF, who="a") == pytest.approx(math.sqrt(41))


def test_only_what_is_like_the_model_and_present_is_measured():
    big = payloads(Kind.UPDATE, "delta", w=[1e6]) | payloads(Kind.STYLE_SPECTRUM, "style", w=[1e6])
    specs = [
        PayloadSpec("delta", Kind.UPDATE, like_model=False),
        PayloadSpec("style", Kind.STYLE_SPECTRUM, Reduce.SUM),
        PayloadSpec("model", Kind.MODEL, optional=True),
    ]
    guard = GuardConfig(update_norm=1, update_ratio=1)
    assert check_updates(big, specs, {}, guard, who="a") == 0.0
    assert check_updates({}, [], {}, guard, who="a") == 0.0


def test_the_norm_limit_holds_above_it_and_not_at_it():
    guard = GuardConfig(update_norm=5, update_ratio=0)
    assert check_updates(payloads(w=[4.0, 5.0]), [MODEL], payloads(w=[1.0, 1.0]), guard, who="beta") == 5.0
    with pytest.raises(PayloadError) as caught:
        check_updates(payloads(w=[4.0, 5.5]), [MODEL], payloads(w=[1.0, 1.0]), guard, who="beta")
    for word in ("beta", "'model'", "5.408", " 5 (guard.update_norm)", "Look for"):
        assert word in str(caught.value)
    assert caught.value.site == "beta"


def test_the_ratio_compares_with_the_model_that_was_sent():
    guard = GuardConfig(update_ratio=2)
    sent = payloads(w=[3.0, 4.0])
    assert check_updates(payloads(w=[9.0, 12.0]), [MODEL], sent, guard, who="a") == 10.0
    with pytest.raises(
        PayloadError, match=r"norm 15, allowed is 10 \(guard.update_ratio 2 times .* norm 5\)"
    ):
        check_updates(payloads(w=[12.0, 16.0]), [MODEL], sent, guard, who="a")
    with pytest.raises(PayloadError, match="norm 11, allowed is 10"):
        check_updates(payloads(Kind.UPDATE, "delta", w=[11.0, 0.0]), [UPDATE], sent, guard, who="a")


def test_a_small_model_counts_as_one_of_norm_one():
    guard = GuardConfig(update_ratio=100)
    zero = payloads(w=[0.0, 0.0])
    assert check_updates(payloads(w=[99.0, 0.0]), [MODEL], zero, guard, who="a") == 99.0
    with pytest.raises(PayloadError, match="norm 101, allowed is 100"):
        check_updates(payloads(w=[101.0, 0.0]), [MODEL], zero, guard, who="a")
    with pytest.raises(PayloadError, match="norm 101, allowed is 100"):
        check_updates(payloads(Kind.UPDATE, "delta", w=[101.0]), [UPDATE], {}, guard, who="a")


def test_a_whole_model_from_a_site_that_was_sent_none_has_only_the_norm_limit():
    own = payloads(w=[1000.0])
    assert check_updates(own, [MODEL], {}, GuardConfig(update_ratio=1), who="a") == 1000.0
    with pytest.raises(PayloadError, match=r"guard\.update_norm"):
        check_updates(own, [MODEL], {}, GuardConfig(update_norm=10), who="a")


def test_a_model_of_another_name_is_the_measure_where_there_is_none_of_the_same():
    sent = (
        payloads(name="one", w=[3.0]) | payloads(name="two", w=[50.0]) | payloads(Kind.CONTROL, "c", w=[1e9])
    )
    guard = GuardConfig(update_ratio=2)
    assert check_updates(payloads(w=[100.0]), [MODEL], sent, guard, who="a") == 100.0
    with pytest.raises(PayloadError, match="norm 101, allowed is 100"):
        check_updates(payloads(w=[101.0]), [MODEL], sent, guard, who="a")


def test_of_several_models_sent_the_one_of_the_same_name_is_the_measure():
    sent = payloads(w=[5.0]) | payloads(name="large", w=[500.0])
    with pytest.raises(PayloadError, match="norm 15, allowed is 10 "):
        check_updates(payloads(w=[20.0]), [MODEL], sent, GuardConfig(update_ratio=2), who="a")


def test_measuring_changes_neither_what_came_nor_what_was_sent():
    came, sent = payloads(w=torch.ones(3).double()), payloads(w=torch.zeros(3).double())
    check_updates(came, [MODEL], sent, GuardConfig(), who="a")
    assert came["model"].tensors["w"].tolist() == [1, 1, 1]
    assert sent["model"].tensors["w"].tolist() == [0, 0, 0]


# ---- outliers --------------------------------------------------------------------------------------------------------


def test_an_outlier_is_named_with_all_numbers():
    found = outliers({"alpha": 2.0, "beta": 1.0, "gamma": 20.5}, GuardConfig(outlier=10))
    assert found.keys() == {"gamma"}
    for word in ("gamma", "20.5", "median is 2 ", "10 times", "guard.outlier", "left out"):
        assert word in found["gamma"]


@pytest.mark.parametrize(
    ("norms", "factor"),
    [
        ({"a": 1.0, "b": 1.0, "c": 10.0}, 10),  # at the border
        ({"a": 1.0, "b": 1.0, "c": 99.0}, 0),  # off
        ({"a": 1.0, "b": 99.0}, 1.5),  # two cannot tell
        ({"a": 0.0, "b": 0.0, "c": 99.0}, 5),  # no multiple of nothing
        ({}, 5),
    ],
)
def test_nobody_is_an_outlier(norms, factor):
    assert outliers(norms, GuardConfig(outlier=factor)) == {}


def test_the_median_of_an_even_number_is_the_mean_of_the_middle():
    norms = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 31.0}
    assert outliers(norms, GuardConfig(outlier=10)).keys() == {"d"}
    assert outliers(norms | {"d": 30.0}, GuardConfig(outlier=10)) == {}


# ---- the result ------------------------------------------------------------------------------------------------------


def test_a_state_that_overflowed_is_refused_by_name_and_a_finite_one_passes():
    fine = {"model/w": torch.ones(3), "model/n": torch.tensor(2**62)}
    check_state(fine, what="Round 3")
    half = torch.tensor([70000.0, 1.0, -70000.0], dtype=torch.float64).to(torch.float16)
    with pytest.raises(PayloadError) as caught:
        check_state(fine | {"model/half": half}, what="Round 3")
    for word in ("Round 3: the round's result is not finite", "'model/half'", "2 of 3", "stays as it was"):
        assert word in str(caught.value)
    with pytest.raises(PayloadError, match="1 of 1"):
        check_state({"w": torch.tensor(math.nan)}, what="Round 1")
