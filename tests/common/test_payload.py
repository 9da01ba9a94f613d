"""Payloads against their promise: what is wrong is named, with what was expected and what came."""

import pytest
import torch

from common.errors import PayloadError
from common.payload import Kind, Payload, PayloadSpec, Reduce, State, check_finite, check_like, check_payloads

TEMPLATE = {"w": torch.zeros(2, 3), "n": torch.tensor(0)}
SPECS = (
    PayloadSpec("model", Kind.MODEL),
    PayloadSpec("sketch", Kind.FISHER_SKETCH, Reduce.SUM, like_model=False, optional=True),
)


def good(**changes):
    tensors = {"w": torch.ones(2, 3), "n": torch.tensor(4)} | changes
    return {
        "model": Payload(
            "model", Kind.MODEL, {name: item for name, item in tensors.items() if item is not None}
        )
    }


def check(payloads):
    check_payloads(payloads, SPECS, TEMPLATE, who="alpha")


def test_what_was_promised_passes():
    check(good())
    check(
        good()
        | {"sketch": Payload("sketch", Kind.FISHER_SKETCH, {"any": torch.zeros(7)}, {"beta": 0.5, "rank": 3})}
    )
    meta = {name: torch.empty_like(item, device="meta") for name, item in TEMPLATE.items()}
    check_payloads(good(), SPECS, meta, who="alpha")


def sketch(tensor, **meta):
    return {"sketch": Payload("sketch", Kind.FISHER_SKETCH, {"u": tensor}, meta)}


@pytest.mark.parametrize(
    ("payloads", "sentence"),
    [
        (
            good() | {"extra": Payload("extra", Kind.UPDATE)},
            r"unexpected payload 'extra'; expected \['model', 'sketch'\]",
        ),
        ({}, "payload 'model' is missing; got none"),
        (sketch(torch.zeros(1)), r"payload 'model' is missing; got \['sketch'\]"),
        (
            {"model": Payload("model", Kind.UPDATE, good()["model"].tensors)},
            "is of kind 'update', expected 'model'",
        ),
        (good(n=None), r"missing \['n'\], unexpected \[\]"),
        (good(extra=torch.zeros(1)), r"missing \[\], unexpected \['extra'\]"),
        (good(w=torch.ones(3, 2)), r"'w' has shape \(3, 2\), expected \(2, 3\)"),
        (good(w=torch.ones(6)), r"'w' has shape \(6,\), expected \(2, 3\)"),
        (good(w=torch.ones(2, 3).double()), "'w' is torch.float64, expected torch.float32"),
        (good(w=torch.ones(2, 3).bfloat16()), "'w' is torch.bfloat16, expected torch.float32"),
        (good(n=torch.tensor(4, dtype=torch.int32)), "'n' is torch.int32, expected torch.int64"),
        (
            good(w=torch.tensor([[1, 2, float("nan")], [0, float("inf"), 0]])),
            "'w' has 2 values that are not finite",
        ),
        (
            good() | sketch(torch.tensor([float("-inf")], dtype=torch.float16)),
            "'u' has 1 values that are not finite",
        ),
        (good() | sketch(torch.zeros(1), scale=float("nan")), "'sketch' note 'scale' is not finite"),
        (good() | sketch(torch.zeros(1), scale=float("inf")), "'sketch' note 'scale' is not finite"),
    ],
)
def test_what_was_not_promised_is_refused_by_name(payloads, sentence):
    with pytest.raises(PayloadError, match=sentence) as caught:
        check(payloads)
    assert str(caught.value).startswith("alpha: ")
    assert caught.value.site == "alpha"


def test_a_method_that_promises_nothing_gets_nothing():
    check_payloads({}, (), TEMPLATE, who="alpha")
    with pytest.raises(PayloadError, match="unexpected payload 'model'; expected none"):
        check_payloads(good(), (), TEMPLATE, who="alpha")


def test_long_lists_of_names_are_cut():
    with pytest.raises(PayloadError, match=r"unexpected \['x0', 'x1', 'x10'\]\."):
        check_like({f"x{n}": torch.zeros(1) for n in range(20)}, {}, who="a", what="model")


def test_integers_are_always_finite():
    check_finite(
        {"n": torch.tensor([2**62]), "b": torch.tensor([True]), "e": torch.empty(0)}, who="a", what="x"
    )


def test_a_states_namespaces_do_not_mix():
    state = State({"personal/w": torch.ones(1)}, {"step": 3})
    state = state.having("model", {"a": torch.zeros(1), "b": torch.zeros(1)}).having(
        "model2", {"a": torch.ones(2)}
    )
    assert state.part("model").keys() == {"a", "b"}
    changed = state.having("model", {"b": torch.ones(1)})
    assert changed.part("model").keys() == {"b"}
    assert changed.part("model2").keys() == {"a"}
    assert changed.part("personal").keys() == {"w"}
    assert changed.values == {"step": 3}
    assert state.part("model").keys() == {"a", "b"}  # the state that went in is untouched
    changed.values["step"] = 4
    assert state.values == {"step": 3}
    assert state.part("none") == {}
