"""What a hospital keeps to itself at its border: figures, and how strongly one round may speak."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.border import clipped
from common.errors import PayloadError, PolicyError
from common.payload import Kind, Payload
from common.wire import decode
from tests.client.borders import (
    TEMPLATE,
    Borders,
    answer,
    entries,
    figures,
    model,
    norm64,
    release,
    sha,
    tensors,
)  # fmt: skip


@pytest.fixture
def make(tmp_path):
    borders = Borders(tmp_path)
    yield borders
    borders.close()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_that_the_hospital_keeps_in_are_in_no_part_of_the_answer(make):
    secret = figures(4, name="withheld")
    border = make(privacy={"metrics": False})
    reply = answer(metrics=[secret])
    parts = release(border, reply)
    got = decode(parts)
    assert got.metrics == []
    assert "metrics" not in parts
    assert not any(b"withheld" in data for data in parts.values())
    assert got.payloads.keys() == {"model"}
    assert got.cases == 10
    assert {entry.part for entry in entries(border)} == {"model", "figures"}
    assert reply.metrics == [secret]  # the site's own copy is whole


@pytest.mark.parametrize(("least", "left"), [(1, [3, 4, 5]), (4, [4, 5]), (5, [5]), (6, [])])
def test_figures_over_too_few_cases_stay_in(make, least, left):
    border = make(privacy={"metrics_min_cases": least})
    parts = release(border, answer(metrics=[figures(cases) for cases in (3, 4, 5)]))
    assert [item.cases for item in decode(parts).metrics] == left
    assert ("metrics" in parts) == bool(left)


# ---- clipping --------------------------------------------------------------------------------------------------------


def between(new, old=None):
    return torch.cat([(new[n].double() - (old[n].double() if old else 0.0)).reshape(-1) for n in ("w", "b")])


def random_model(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(t.shape, generator=generator) * scale for name, t in TEMPLATE.items() if name != "n"
    }
    return made | {"n": torch.tensor([seed, -seed])}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    step=st.sampled_from([1e-4, 0.1, 1.0, 1e4]),
    most=st.sampled_from([1e-2, 0.5, 1.0, 30.0]),
    kind=st.sampled_from([Kind.MODEL, Kind.UPDATE]),
)
def test_what_training_adds_is_scaled_down_to_the_bound_and_keeps_its_direction(seed, size, step, most, kind):
    base = random_model(seed, size)
    change = random_model(seed + 1, step)
    old = base if kind is Kind.MODEL else None
    new = {n: base[n] + change[n] if old else change[n] for n in change}
    kept = {name: tensor.clone() for name, tensor in new.items()}
    got = clipped(Payload("model", kind, new, {"note": 1}), Payload("model", Kind.MODEL, base), most)
    assert (got.name, got.kind, got.meta) == ("model", kind, {"note": 1})
    assert [tensor.dtype for tensor in got.tensors.values()] == [tensor.dtype for tensor in new.values()]
    assert all(torch.equal(new[name], kept[name]) for name in new)  # the site's own model is left alone
    assert torch.equal(got.tensors["n"], new["n"])
    # float32 holds a value near `size` only so exactly: half a unit in the last place for each of the 16 values
    coarse = (
        4
        * 2.0**-24
        * max(float(t.abs().max()) for t in (*base.values(), *got.tensors.values()) if t.is_floating_point())
    )
    before = norm64(new, old)
    if before <= most:
        assert all(torch.equal(got.tensors[name], new[name]) for name in new)
        return
    assert norm64(got.tensors, old) == pytest.approx(most, rel=1e-6, abs=coarse)
    wanted = between(new, old) * (most / before)
    assert float((between(got.tensors, old) - wanted).norm()) <= coarse + 1e-6 * most


def test_the_bound_itself_is_untouched_to_the_bit_and_a_hair_above_is_not():
    tensors_ = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor([9])}
    payload = Payload("delta", Kind.UPDATE, tensors_)
    assert clipped(payload, None, 5.0) is payload
    got = clipped(payload, None, 4.999)
    assert norm64(got.tensors) < 5.0
    assert torch.equal(got.tensors["n"], tensors_["n"])


@pytest.mark.parametrize(
    ("base", "new", "most"),
    [
        (torch.tensor([2.0**24]), torch.tensor([2.0**24 + 2]), 1.5),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16), 0.005),
        (torch.ones(1000), torch.ones(1000) + 0.01 * torch.arange(1, 1001) / 1000, 1e-5),
    ],
)
def test_the_bound_holds_after_rounding_to_the_models_dtype(base, new, most):
    got = clipped(Payload("model", Kind.MODEL, {"w": new}), Payload("model", Kind.MODEL, {"w": base}), most)
    assert norm64(got.tensors, {"w": base}) <= most


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.MODEL, Kind.UPDATE)])
def test_other_kinds_are_not_scaled(kind):
    payload = Payload("p", kind, {"w": torch.full((9,), 100.0)})
    assert clipped(payload, None, 1.0) is payload


def test_a_model_that_was_not_sent_down_counts_as_a_whole_and_an_update_never_as_a_difference():
    big = {"w": torch.full((4,), 10.0)}
    same = Payload("model", Kind.MODEL, {"w": big["w"].clone()})
    assert clipped(Payload("model", Kind.MODEL, big), same, 1.0).tensors is big
    assert norm64(clipped(Payload("model", Kind.MODEL, big), None, 1.0).tensors) == pytest.approx(1.0)
    assert norm64(clipped(Payload("model", Kind.UPDATE, big), same, 1.0).tensors) == pytest.approx(1.0)


def test_what_leaves_is_the_scaled_update_and_the_ledger_says_so(make):
    received = model(1.0)
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(2.0))
    parts = release(border, reply, received)
    left = decode(parts).payloads["model"].tensors
    assert norm64(left, received["model"].tensors) == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(left["n"], tensors()["n"])
    [entry] = [entry for entry in entries(border) if entry.part == "model"]
    assert entry.sha256 == sha(parts["p.model"])
    assert entry.norm == pytest.approx(norm64(left), rel=1e-9)
    assert torch.equal(reply.payloads["model"].tensors["w"], tensors(2.0)["w"])


def test_without_a_bound_nothing_is_scaled(make):
    parts = release(make(), answer(payloads=model(1000.0)), model(1.0))
    assert torch.equal(decode(parts).payloads["model"].tensors["w"], tensors(1000.0)["w"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_and_not_scaled_away(make, bad):
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(1.0))
    reply.payloads["model"].tensors["w"][0, 0] = bad
    with pytest.raises(PayloadError, match="not finite"):
        release(border, reply, model(1.0))
    assert {entry.decision for entry in entries(border)} == {"refused"}


def test_a_wrong_shape_is_refused_by_name_also_where_updates_are_scaled(make):
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(2.0))
    reply.payloads["model"].tensors["w"] = torch.ones(5)
    with pytest.raises(PayloadError, match="has shape"):
        release(border, reply, model(1.0))


def test_parts_of_tensors_are_not_clipped_but_kept_in():
    sent = Payload("model", Kind.MODEL, {"weight": torch.zeros(2, 3)})
    part = Payload("model", Kind.MODEL, {"weight": torch.full((3,), 5.0)})
    with pytest.raises(PolicyError):
        clipped(part, sent, 100.0, who="alpha")  # its update cannot be told, however small the values
    with pytest.raises(PolicyError, match="alpha: payload 'model' holds parts") as caught:
        clipped(part, sent, 1.0, who="alpha")
    assert caught.value.site == "alpha"
