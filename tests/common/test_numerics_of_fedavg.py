"""The arithmetic of FedAvg, FedProx and Ditto, against exact fractions and derivatives worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import PayloadError
from common.method import GLOBAL, PERSONAL, Method, MethodParams, Reply, ServerHalf, SiteHalf
from common.methods.ditto import DITTO
from common.methods.fedavg import FEDAVG
from common.methods.fedprox import FEDPROX, squared_distance
from common.methods.local_only import LOCAL_ONLY
from common.payload import Kind, Payload, PayloadSpec, Reduce, State
from common.work import FitStats, Groups, RoundContext

CTX = RoundContext("run", 1, 3, 0)
FLOATS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # significant bits


def server(method=FEDAVG, **params):
    return method.server(method.parse(params))


def reply(site, cases, tensors, name="model", kind=Kind.MODEL):
    return Reply(site, cases, {name: Payload(name, kind, tensors)})


def average(replies, template):
    half = server()
    state = half.init(template, Groups({}), CTX)
    acc = half.begin(state, CTX)
    for item in replies:
        acc = half.fold(acc, item)
    return half.finish(state, acc, CTX).part("model")


def rounded(value: Fraction, dtype) -> float:
    """Round an exact number to a dtype, once, to nearest, ties to even: independent of torch and of float64."""
    if dtype in FLOATS:
        if value == 0:
            return 0.0
        lowest = {torch.float16: -24, torch.float32: -149, torch.bfloat16: -133}[dtype]
        exponent = max(
            (abs(value).numerator.bit_length() - abs(value).denominator.bit_length()) - FLOATS[dtype] - 1,
            lowest,
        )
        while abs(value) / Fraction(2) ** exponent >= 2 ** FLOATS[dtype]:
            exponent += 1
        return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)
    return round(value)


@st.composite
def replies_of(draw, dtype):
    size, sites = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    cases = draw(st.lists(st.integers(1, 400), min_size=sites, max_size=sites))
    if dtype in FLOATS:
        number = st.floats(-(2.0**10), 2.0**10, width=16)
    else:
        number = st.integers(-100, 100) if dtype is not torch.uint8 else st.integers(0, 255)
    values = draw(st.lists(st.lists(number, min_size=size, max_size=size), min_size=sites, max_size=sites))
    return cases, [torch.tensor(row, dtype=torch.float64).to(dtype) for row in values]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.uint8])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_the_average_is_the_exact_one_rounded_once(dtype, data):
    cases, values = data.draw(replies_of(dtype))
    got = average(
        [
            reply(f"s{n}", count, {"w": value})
            for n, (count, value) in enumerate(zip(cases, values, strict=True))
        ],
        {"w": values[0]},
    )
    for index in range(len(values[0])):
        exact = sum(
            (
                Fraction(count) * Fraction(value[index].item())
                for count, value in zip(cases, values, strict=True)
            ),
            Fraction(0),
        ) / sum(cases)
        want = rounded(exact, dtype)
        have = got["w"][index].item()
        if have != want:  # float64 may fall on the other side of a tie by its last bit, and by no more
            near = Fraction(want) + Fraction(have)
            assert abs(near / 2 - exact) <= abs(exact) * Fraction(2) ** -48
    assert got["w"].dtype == dtype


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_one_site_alone_gets_its_weights_back_to_the_bit(dtype, data):
    size = 4 * dtype.itemsize
    value = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    value = (value[:4] % 2).bool() if dtype is torch.bool else value.view(dtype)
    if value.is_floating_point():
        value = torch.nan_to_num(value)
    elif dtype is torch.int64:
        value = value % 2**40
    cases = data.draw(st.integers(1, 10_000))
    got = average([reply("a", cases, {"w": value})], {"w": value})["w"]
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), value.view(torch.uint8))


def test_integers_are_rounded_to_nearest_and_never_cut():
    template = {"n": torch.tensor(0), "b": torch.tensor(0, dtype=torch.uint8)}
    two = [
        reply("a", 1, {"n": torch.tensor(-4), "b": torch.tensor(254, dtype=torch.uint8)}),
        reply("b", 3, {"n": torch.tensor(-5), "b": torch.tensor(255, dtype=torch.uint8)}),
    ]
    got = average(two, template)
    assert (got["n"].item(), got["b"].item()) == (-5, 255)


def test_sites_weigh_by_their_cases():
    got = average(
        [reply("a", 1, {"w": torch.tensor([0.0])}), reply("b", 3, {"w": torch.tensor([4.0])})],
        {"w": torch.tensor([0.0])},
    )
    assert got["w"].item() == 3.0


def test_values_near_the_end_of_a_dtype_do_not_overflow_on_the_way():
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        most = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(
            average([reply(f"s{n}", 1000, {"w": most}) for n in range(3)], {"w": most})["w"], most
        )


def test_folding_leaves_replies_and_state_untouched():
    half = server()
    start = {"w": torch.ones(2, dtype=torch.float64)}
    state = half.init(start, Groups({}), CTX)
    sent = torch.tensor([1.0, 2.0], dtype=torch.float64)
    acc = half.begin(state, CTX)
    for site in "ab":
        acc = half.fold(acc, reply(site, 1, {"w": sent}))
    half.finish(state, acc, CTX)
    assert sent.tolist() == [1.0, 2.0]
    assert state.part("model")["w"].tolist() == [1.0, 1.0]
    assert (acc.sites, acc.cases) == (["a", "b"], 2)


def test_a_round_without_a_case_is_refused():
    half = server()
    state = half.init({"w": torch.ones(1)}, Groups({}), CTX)
    with pytest.raises(PayloadError, match="Round 1: no site contributed a training case"):
        half.finish(state, half.begin(state, CTX), CTX)


class Sums(ServerHalf):
    """A half with every declared reduction, and an optional payload."""

    uplink = (
        PayloadSpec("model", Kind.MODEL, Reduce.WEIGHTED_MEAN),
        PayloadSpec("total", Kind.UPDATE, Reduce.SUM, like_model=False),
        PayloadSpec("own", Kind.CLUSTER, Reduce.NONE, like_model=False),
        PayloadSpec("some", Kind.UPDATE, Reduce.WEIGHTED_MEAN, like_model=False, optional=True),
    )

    def update(self, state, reduced, ctx):
        return State(
            {f"{name}/{key}": tensor for name, tensors in reduced.items() for key, tensor in tensors.items()}
        )


def test_each_payload_is_reduced_as_it_was_declared_over_the_sites_that_sent_it():
    half = Sums(None)
    acc = half.begin(State(), CTX)
    for site, cases, value, extra in (("a", 1, 1.0, None), ("b", 3, 5.0, 10.0), ("c", 4, 2.0, 40.0)):
        payloads = {
            "model": Payload("model", Kind.MODEL, {"w": torch.tensor(value)}),
            "total": Payload("total", Kind.UPDATE, {"t": torch.tensor(value)}),
            "own": Payload("own", Kind.CLUSTER, {"c": torch.tensor(value)}),
        }
        if extra is not None:
            payloads["some"] = Payload("some", Kind.UPDATE, {"x": torch.tensor(extra)})
        acc = half.fold(acc, Reply(site, cases, payloads))
    reduced = half.finish(State(), acc, CTX).tensors
    assert {name: tensor.item() for name, tensor in reduced.items()} == {
        "model/w": 3.0,
        "total/t": 8.0,
        "some/x": pytest.approx((3 * 10 + 4 * 40) / 7, abs=1e-14),
    }


# ---- site halves: the local objective --------------------------------------------------------------------------------


class Net(nn.Module):
    """Two parameters, one of them frozen, and a buffer."""

    def __init__(self, seed):
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(3, 2, generator=numbers, dtype=torch.float64))
        self.frozen = nn.Parameter(
            torch.randn(2, generator=numbers, dtype=torch.float64), requires_grad=False
        )
        self.register_buffer("mean", torch.randn(2, generator=numbers, dtype=torch.float64))


class Work:
    """A site's work whose every fit is recorded, and is one step of gradient descent on ½‖w − target‖² plus the term."""

    def __init__(self, net, lr=0.1):
        self.ctx, self.model, self.groups, self.cases, self.lr = CTX, net, Groups({}), 5, lr
        self.fits = []
        self.target = torch.zeros_like(net.w)

    def load(self, weights):
        self.model.load_state_dict(dict(weights))

    def weights(self):
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def on_device(self, tensors):
        return {name: value.clone() for name, value in tensors.items()}

    def progress(self, phase):
        pass

    def fit(self, *, stream="main", epochs=None, loss_term=None, **others):
        assert not others
        loss = 0.5 * (self.model.w - self.target).square().sum()
        if loss_term is not None:
            loss = loss + loss_term(self.model)
        (gradient,) = torch.autograd.grad(loss, self.model.w)
        self.fits.append((stream, epochs, gradient))
        with torch.no_grad():
            self.model.w -= self.lr * gradient
        return FitStats(1, 5, loss.item(), 0.0)


def received(net):
    return {
        "model": Payload(
            "model", Kind.MODEL, {name: value.detach().clone() for name, value in net.state_dict().items()}
        )
    }


def site(method, **params):
    return method.site(method.parse(params))


def test_squared_distance_runs_over_what_is_trained_and_nothing_else():
    net, other = Net(0), Net(1)
    anchor = {name: value.detach() for name, value in other.state_dict().items()}
    got = squared_distance(net, anchor)
    assert got.item() == pytest.approx(((net.w - other.w) ** 2).sum().item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(got, net.w)
    assert torch.allclose(gradient, 2 * (net.w - other.w).detach(), rtol=1e-14)


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_fedprox_pulls_with_mu_times_the_distance_to_the_rounds_model(mu):
    start = Net(3)
    work = Work(Net(1))
    half = site(FEDPROX, mu=mu)
    term = half.loss_term(work, received(start), State())
    (gradient,) = torch.autograd.grad(term(work.model), work.model.w)
    assert torch.allclose(gradient, mu * (work.model.w - start.w).detach(), rtol=1e-12)
    assert term(start).item() == 0.0


def test_fedprox_anchor_does_not_move_with_the_network():
    work = Work(Net(1), lr=0.5)
    start = Net(3)
    message = received(start)
    half = site(FEDPROX, mu=2.0)
    result = half.train(work, message, State())
    assert torch.equal(message["model"].tensors["w"], start.w)
    assert torch.allclose(
        result.payloads[0].tensors["w"], start.w - 0.5 * start.w
    )  # the first step starts at the anchor: no pull
    term = half.loss_term(work, message, State())
    assert term(work.model).item() == pytest.approx(((work.model.w - start.w) ** 2).sum().item())


def test_fedprox_without_mu_has_no_term_at_all():
    assert site(FEDPROX, mu=0.0).loss_term(Work(Net(1)), received(Net(0)), State()) is None


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_ditto_does_algorithm_1_and_only_the_global_branch_leaves(lam):
    start, own = Net(3), Net(7)
    work = Work(Net(1))
    state = State({f"personal/{name}": value.detach().clone() for name, value in own.state_dict().items()})
    result = site(DITTO, lam=lam, personal_epochs=4).train(work, received(start), state)
    (first, epochs, gradient), (second, no_epochs, _) = work.fits
    assert (first, epochs, second, no_epochs) == ("personal", 4, "main", None)
    assert torch.allclose(gradient, (own.w + lam * (own.w - start.w)).detach(), rtol=1e-12)
    new_own = own.w - 0.1 * (own.w + lam * (own.w - start.w))
    assert torch.allclose(result.state.part("personal")["w"], new_own.detach(), rtol=1e-12)
    assert [payload.name for payload in result.payloads] == ["model"]
    assert torch.allclose(result.payloads[0].tensors["w"], (0.9 * start.w).detach(), rtol=1e-12)
    assert torch.equal(state.part("personal")["w"], own.w)  # the state that came in is untouched


def test_dittos_personal_model_begins_as_the_received_one():
    half = site(DITTO)
    models = half.models(received(Net(3)), State())
    assert models.keys() == {GLOBAL, PERSONAL}
    assert torch.equal(models[PERSONAL]["w"], Net(3).w)
    kept = State({f"personal/{name}": value for name, value in Net(5).state_dict().items()})
    assert torch.equal(half.models(received(Net(3)), kept)[PERSONAL]["w"], Net(5).w)


def test_local_only_sends_the_model_once_and_nothing_comes_back():
    half = server(LOCAL_ONLY)
    state = half.init({"w": torch.ones(1)}, Groups({}), CTX)
    assert [payload.name for payload in half.send(state, "a", CTX)] == ["model"]
    assert half.send(state, "a", RoundContext("run", 2, 3, 0)) == []
    assert half.model(state) is None
    work = Work(Net(1))
    result = site(LOCAL_ONLY).train(work, received(Net(3)), State())
    assert result.payloads == []
    assert torch.allclose(result.state.part("personal")["w"], (0.9 * Net(3).w).detach(), rtol=1e-12)
    again = site(LOCAL_ONLY).train(Work(Net(1)), {}, result.state)
    assert torch.allclose(again.state.part("personal")["w"], (0.81 * Net(3).w).detach(), rtol=1e-12)


def test_a_method_of_ones_own_needs_two_halves_and_parameters():
    class None_(MethodParams):
        """No parameters."""

    own = Method("own", "own", None_, ServerHalf, SiteHalf)
    work = Work(Net(1))
    result = own.site(own.parse({})).train(work, received(Net(3)), State())
    assert (result.cases, result.stats.steps) == (5, 1)
    assert np.isfinite(result.stats.loss)
