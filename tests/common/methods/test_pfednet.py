"""pFedNet through the whole loop: against the dense fusion step, FedAvg and local training; its network and its borders."""

import json

import pytest
import torch

from client.site_config import Policy
from common.config import GuardConfig
from common.errors import ConfigError, PayloadError, WardroundError
from common.method import Reply, RoundContext
from common.methods.pfednet import PFEDNET, WANTED, PFedNetServer, personal_names
from common.models import build_model, parameter_groups
from common.numerics.fusion import Fusion
from common.numerics.graphs import complete_graph
from common.payload import Kind, Payload
from common.store import tensor_bytes
from tests.harness import Federation, table_config

pytestmark = pytest.mark.slow

CTX = RoundContext("run", 1, 3, 7)


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


def config(**params):
    return table_config("pfednet", **params)


def server_of(**params) -> PFedNetServer:
    return PFedNetServer(PFEDNET.parse(params))


def network(method="pfednet"):
    cfg = table_config(method)
    model = build_model(cfg.model, cfg.data, seed=cfg.seed)
    return dict(model.state_dict()), parameter_groups(model)


def reply(site: str, model, cases: int = 10, sketch=None) -> Reply:
    payloads = {"model": Payload("model", Kind.MODEL, model)}
    if sketch is not None:
        payloads["sketch"] = Payload("sketch", Kind.DATA_SKETCH, {"labels": torch.tensor(sketch)})
    return Reply(site, cases, payloads)


def shifted(model, seed: int):
    draw = torch.Generator().manual_seed(seed)
    return {name: value + torch.randn(value.shape, generator=draw) for name, value in model.items()}


def test_without_fusion_and_all_personal_it_is_local_training_to_the_bit(federation):
    federation.run(config(personal=["all"], lam=0), home="ours")
    federation.run(table_config("local-only"), home="local")
    ours, local = federation.personal("ours"), federation.personal("local")
    assert ours.keys() == local.keys() == set(federation.aliases)
    assert all(tensor_bytes(ours[site]) == tensor_bytes(local[site]) for site in ours)


def test_full_fusion_makes_all_sites_one_and_no_fusion_keeps_them_apart(federation):
    federation.run(config(personal=["all"], lam=1, network="complete"), home="one")
    one = list(federation.personal("one").values())
    for name, value in one[0].items():
        for other in one[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    federation.run(config(personal=["all"], lam=0), home="own")
    own = list(federation.personal("own").values())
    assert any(not torch.allclose(own[0][name], own[1][name], atol=1e-2) for name in own[0])


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_a_round_is_the_mean_of_x_and_the_dense_step_of_z(p):
    model, groups = network()
    name = min(model)  # one tensor shared, the others personal
    personal = sorted(model.keys() - {name})
    server = server_of(personal=personal, lam=0.3, scale="absolute", eta=0.8, p=p, network="complete")
    state = server.init(model, groups, CTX)
    sent = {site: shifted(model, number) for number, site in enumerate(("a", "b", "c"))}
    acc = server.begin(state, CTX)
    for cases, (site, values) in zip((10, 20, 30), sent.items(), strict=True):
        acc = server.fold(acc, reply(site, values, cases))
    state = server.finish(state, acc, CTX)
    mean = sum(n * v[name].double() for n, v in zip((10, 20, 30), sent.values(), strict=True)) / 60
    received = {site: server.send(state, site, CTX)[0].tensors for site in sent}
    rows = torch.stack([torch.cat([v[key].flatten() for key in personal]).double() for v in sent.values()])
    Z = Fusion(complete_graph(3), eta=0.8, p=p, tolerance=1e-10).step(rows, torch.zeros_like(rows), 0.3).Z
    for number, site in enumerate(sent):
        torch.testing.assert_close(received[site][name].double(), mean, rtol=0, atol=1e-6)
        got = torch.cat([received[site][key].flatten() for key in personal]).double()
        torch.testing.assert_close(got, Z[number], rtol=0, atol=1e-5)


def test_sites_are_joined_by_their_sketches_and_a_given_network_by_name(federation):
    model, groups = network()
    shares = {"a": [0.9, 0.1], "b": [0.85, 0.15], "c": [0.2, 0.8], "d": [0.1, 0.9]}
    server = server_of(k=1)
    state = server.init(model, groups, CTX)
    state = state.having("sketch", {site: torch.tensor(share) for site, share in shares.items()})
    assert server.graph(state, list(shares)).edges == ((0, 1), (2, 3))
    assert server.graph(state, ["a", "c", "new"]).edges == ((0, 1),)  # a site without a sketch has no edge
    angles = {"a": [1.0, 0.0], "b": [10.0, 1.0], "c": [1.0, 1.0]}
    spread = state.having("sketch", {site: torch.tensor(value) for site, value in angles.items()})
    nearest = {
        metric: server_of(k=1, metric=metric).graph(spread, list("abc")).edges for metric in ("l1", "cosine")
    }
    assert nearest == {"l1": ((0, 2), (1, 2)), "cosine": ((0, 1), (1, 2))}
    odd = state.having("sketch", {**state.part("sketch"), "b": torch.ones(5)})
    assert server.graph(odd, ["a", "b", "c", "d"]).edges == ((0, 2), (2, 3))
    given = server_of(network="given", edges=["d:a", "a:c"])
    assert given.graph(given.init(model, groups, CTX), list(shares)).edges == ((0, 2), (0, 3))


def test_a_sketch_travels_once_and_only_where_the_network_needs_it(federation):
    federation.run(config())
    kinds = {
        (event["site"], event["round"])
        for event in federation.events()
        if event["event"] == "bytes" and "data-sketch" in event["kinds"]
    }
    assert kinds == {(alias, 1) for alias in federation.aliases}
    told = [event for event in federation.events() if event["event"] == "method.figures"]
    assert [event["round"] for event in told] == [1, 2, 3]
    assert told[0]["figures"]["edges"] == [["alpha", "beta"], ["alpha", "gamma"], ["beta", "gamma"]]
    assert all(event["figures"]["distance_after"] < event["figures"]["distance_before"] for event in told)
    federation.run(config(network="complete"), home="complete")
    assert not any("data-sketch" in e.get("kinds", {}) for e in federation.events("complete"))


@pytest.mark.parametrize("lam", [0, 0.4])
def test_a_site_that_misses_a_round_keeps_its_part_and_a_late_one_begins_at_the_mean(lam):
    model, groups = network()
    server = server_of(personal=["all"], lam=lam, network="complete")
    state = server.init(model, groups, CTX)
    acc = server.begin(state, CTX)
    for number, site in enumerate(("a", "b", "c")):
        acc = server.fold(acc, reply(site, shifted(model, number)))
    state = server.finish(state, acc, CTX)
    before = tensor_bytes(server.send(state, "a", CTX)[0].tensors)
    acc = server.begin(state, CTX)
    for number, site in enumerate(("b", "c")):
        acc = server.fold(acc, reply(site, shifted(model, 9 + number)))
    assert server.figures(state, acc, CTX) == {}
    state = server.finish(state, acc, CTX)
    assert server.figures(state, acc, CTX).get("edges") == ([["b", "c"]] if lam else None)
    assert tensor_bytes(server.send(state, "a", CTX)[0].tensors) == before
    late = server.send(state, "d", CTX)[0].tensors
    for name in model:
        rows = torch.stack([server.send(state, site, CTX)[0].tensors[name].double() for site in "abc"])
        torch.testing.assert_close(late[name].double(), rows.mean(dim=0), rtol=0, atol=1e-6)


def test_one_site_far_off_neither_sets_the_scale_for_others_nor_a_guarded_mean():
    model, groups = network()
    honest = {site: shifted(model, number) for number, site in enumerate(("a", "b", "e"))}
    params = {"personal": ["all"], "lam": 0.2, "network": "given", "edges": ["a:b", "b:e"]}

    def run(factor: float) -> tuple[dict, dict]:
        server = server_of(**params)
        server.robust = GuardConfig(reduce="median")
        state = server.init(model, groups, CTX)
        acc = server.begin(state, CTX)
        for site in ("a", "b", "c", "e"):
            values = honest.get(site) or {k: factor * v for k, v in shifted(model, 7).items()}
            acc = server.fold(acc, reply(site, values))
        state = server.finish(state, acc, CTX)
        return {site: server.send(state, site, CTX)[0].tensors for site in "abe"}, server.model(state)

    (quiet, _), (loud, saved) = run(1.0), run(1e6)
    assert all(tensor_bytes(quiet[site]) == tensor_bytes(loud[site]) for site in "abe")
    assert max(float(value.abs().max()) for value in saved.values()) < 10


def test_norms_by_tensor_are_another_problem_than_one_norm_over_all():
    model, groups = network()
    parts = {}
    for how in ("all", "tensor"):
        server = server_of(personal=["all"], lam=0.3, network="complete", groups=how)
        state = server.init(model, groups, CTX)
        acc = server.begin(state, CTX)
        for number, site in enumerate(("a", "b", "c")):
            acc = server.fold(acc, reply(site, shifted(model, number)))
        parts[how] = server.finish(state, acc, CTX).part("z")
    assert any(
        not torch.allclose(parts["all"][name], parts["tensor"][name], atol=1e-3) for name in parts["all"]
    )


def test_sketches_out_of_place_or_form_are_refused_before_the_fold():
    model, groups = network()
    server = server_of()
    state = server.init(model, groups, CTX)
    assert server.send(state, "a", CTX)[0].meta == {WANTED: True}
    server.check(reply("a", model, sketch=[0.5, 0.5]), state, CTX)
    with pytest.raises(PayloadError, match="needs the sketch"):
        server.check(reply("a", model), state, CTX)
    wrong = reply("a", model, sketch=[0.5, 0.5])
    wrong.payloads["sketch"].tensors = {"image": torch.ones(4)}
    with pytest.raises(PayloadError, match="one tensor 'labels'"):
        server.check(wrong, state, CTX)
    zero = reply("a", model)
    zero.payloads["sketch"] = Payload("sketch", Kind.DATA_SKETCH, {"gradient": torch.zeros(16)})
    with pytest.raises(PayloadError, match="all zeros"):
        server_of(sketch="gradient", sketch_size=16, metric="cosine").check(zero, state, CTX)
    held = state.having("sketch", {"a": torch.tensor([0.5, 0.5])})
    assert server.send(held, "a", CTX)[0].meta == {}
    with pytest.raises(PayloadError, match="takes no sketch"):
        server.check(reply("a", model, sketch=[0.5, 0.5]), held, CTX)


def test_the_hospital_chooses_which_sketches_leave(tmp_path):
    federation = Federation(tmp_path, policy=Policy(sketches=("labels",)))
    federation.run(config(sketch="labels"), home="fine")
    with pytest.raises(
        WardroundError, match="asks for the data sketch 'gradient', the site's policy lets out: labels"
    ):
        federation.run(config(sketch="gradient"), home="refused")


@pytest.mark.parametrize("form", ["labels", "features", "gradient"])
def test_every_form_runs_on_tables(federation, form):
    loop = federation.run(config(sketch=form, sketch_size=16, metric="l2"))
    sketches = loop.state.part("sketch")
    assert sketches.keys() == set(federation.aliases)
    assert {len(value) for value in sketches.values()} == {{"labels": 2, "features": 6, "gradient": 16}[form]}


def test_a_table_has_no_picture():
    model, groups = network()
    with pytest.raises(ConfigError, match="a table has none"):
        server_of(sketch="image").init(model, groups, CTX)


def test_a_coordinator_that_asks_again_gets_the_same_sketch(federation, monkeypatch):
    monkeypatch.setattr(PFedNetServer, "_wanted", lambda self, state, site, ctx: ctx.round <= ctx.rounds)
    seen = {}
    monkeypatch.setattr(
        PFedNetServer, "check",
        lambda self, reply, state, ctx: seen.setdefault(reply.site, set()).add(
            (ctx.round > 1, tensor_bytes(reply.payloads["sketch"].tensors))
        ),
    )  # fmt: skip
    federation.run(config(sketch="gradient", sketch_size=16))
    assert all(len({content for _, content in asked}) == 1 and len(asked) == 2 for asked in seen.values())


def test_parameters_that_contradict_each_other_are_refused():
    for params, what in (
        ({"network": "given"}, "needs edges"),
        ({"edges": ["a:b"]}, "needs edges"),
        ({"network": "given", "edges": ["a:a"]}, "two different aliases"),
        ({"lam": 1.5}, "a share, 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=what):
            PFEDNET.parse(params)
    model, groups = network()
    server = server_of(network="given", edges=["alpha:betta"])
    server.sites = ("alpha", "beta")
    with pytest.raises(ConfigError, match=r"no site 'betta' takes part.*beta"):
        server.init(model, groups, CTX)
    with pytest.raises(ConfigError, match="personal"):
        server_of(personal=["decodr"]).init(model, groups, CTX)


def test_what_is_personal_by_default_follows_the_network():
    model, groups = network()
    assert set(personal_names(("auto",), model, groups)) == set(model)  # a linear model is all head
    names = json.loads(str(server_of().init(model, groups, CTX).values["pfednet.names"]))
    assert names == list(model)
    assert personal_names((), model, groups) == []
    assert personal_names(("auto", "*bias"), model, groups) == list(model)


def test_alternating_trains_one_part_after_the_other(federation):
    runs = {}
    for name, on in (("turns", True), ("again", True), ("together", False)):
        loop = federation.run(config(alternate=on, personal=["*bias"]), home=name)
        runs[name] = loop.state.part("model")
    assert tensor_bytes(runs["turns"]) == tensor_bytes(runs["again"])
    assert any(
        not torch.allclose(runs["turns"][key], runs["together"][key], atol=1e-4) for key in runs["turns"]
    )


def test_stream_tells_models_apart():
    assert server_of().stream("a") == "a"
    assert server_of(personal=[]).stream("a") == ""
