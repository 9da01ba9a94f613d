"""FIPA on real sites and the real round loop, against eq. 6 formed densely from what crossed the wire."""

import pytest
import torch

from common.config import ModelConfig
from common.errors import ConfigError, QuorumError
from common.fisher import fisher_weighted
from common.method import Reply
from common.methods.fipa import FIPA, FIPAParams, FIPAServer, base_method, sketched
from common.models import build_model, parameter_groups, template
from common.numerics.quantise import unpack
from common.payload import Kind, Payload, State
from common.store import tensor_bytes
from common.wire import decode, encode
from common.work import Groups, RoundContext
from server.strategy import MethodStrategy
from tests.harness import Federation, MemoryLink, table_config

pytestmark = pytest.mark.slow

PAPER = {"fallback": 0.0, "damping": 0.0}


def config(rounds=3, *, hidden=(), **params):
    """The paper's form, unless a test says otherwise."""
    base = table_config("fipa", rounds=rounds, **{**PAPER, **params})
    if hidden:
        base = base.model_copy(update={"model": ModelConfig(name="mlp", hidden=hidden)})
    return base


def replies(link, number):
    """Return the decoded answers to a round, by site."""
    return {alias: decode(answer) for alias, round_, _, answer in link.seen if round_ == number}


def flat(tensors, names):
    return torch.cat([tensors[name].reshape(-1).double() for name in names])


def dense_step(answers, before, names, *, beta=0.0, damping=0.0, gamma=1.0, fallback=0.0, absent=()):
    """Eq. 6 (13) with p x p matrices: γ (Ĥ + βI)^† Σ (N_m/N) Ĥ_m Δ_m, and φ β (Ĥ + βI)^-1 of the mean."""
    theta = flat(before, names)
    entries = []
    for answer in answers:
        sketch = answer.payloads["sketch"].tensors
        U = unpack({key: value for key, value in sketch.items() if key in ("U", "scale")}).double()
        update = flat(answer.payloads["model"].tensors, names) - theta
        entries.append((answer.cases, U.T @ torch.diag(sketch["lam"]) @ U, update, U))
    for cases, sketch, discount in absent:
        H = sketch["U"].double().T @ torch.diag(sketch["lam"]) @ sketch["U"].double() * discount
        entries.append((cases, H, torch.zeros_like(theta), sketch["U"].double()))
    total = sum(entry[0] for entry in entries[: len(answers)]) + sum(
        cases * discount for cases, _, discount in absent
    )
    H = sum(cases / total * matrix for cases, matrix, _, _ in entries)
    b = sum(cases / total * matrix @ update for cases, matrix, update, _ in entries)
    eye = torch.eye(len(theta), dtype=torch.float64)
    beta += damping * float(torch.linalg.eigvalsh(H)[-1])
    step = gamma * (
        torch.linalg.pinv(H, rtol=1e-6, hermitian=True) @ b
        if beta == 0
        else torch.linalg.solve(H + beta * eye, b)
    )
    if fallback:
        present = sum(answer.cases for answer in answers)
        mean = sum(cases / present * update for cases, _, update, _ in entries[: len(answers)])
        if beta:
            return step + fallback * beta * torch.linalg.solve(H + beta * eye, mean)
        basis = torch.linalg.svd(torch.cat([U for *_, U in entries]), full_matrices=False)
        rows = basis.Vh[basis.S / basis.S[0] > 1e-5]
        step = step + fallback * (mean - rows.T @ (rows @ mean))
    return step


def names_of(settings):
    network = build_model(settings.model, settings.data, seed=settings.seed)
    return sketched(FIPA.parse(settings.params), network.state_dict(), parameter_groups(network))


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


@pytest.mark.parametrize(
    "params",
    [
        {"rank": 8},
        {"rank": 2, "beta": 0.05, "gamma": 0.5},
        {"rank": 2, "fallback": 1.0},
        {"rank": 3, "codec": "int8", "fallback": 0.5},
        {"rank": 3, "codec": "bf16"},
        {"rank": 3, "damping": 0.2, "fallback": 0.7, "beta": 0.01},
    ],
)
@pytest.mark.parametrize("hidden", [(), (64,)])
def test_a_round_is_equation_6_of_what_was_sent(federation, params, hidden):
    settings = config(2, hidden=hidden, warmup_rounds=1, **params)
    names = names_of(settings)
    loop = federation.start(settings)
    loop.state = loop.round(1)
    before = loop.state.part("model")
    loop.state = loop.round(2)
    answers = [replies(federation.link, 2)[alias] for alias in federation.aliases]
    oracle = {key: params[key] for key in ("beta", "damping", "gamma", "fallback") if key in params}
    expected = dense_step(answers, before, names, **oracle)
    got = flat(loop.state.part("model"), names) - flat(before, names)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_the_codes_convention_is_the_papers_times_beta(federation):
    paper = federation.run(config(2, rank=3, beta=0.5, gamma=0.25, warmup_rounds=1), home="a")
    code = federation.run(
        config(2, rank=3, beta=0.5, gamma=0.5, convention="code", warmup_rounds=1), home="b"
    )
    assert tensor_bytes(paper.state.part("model")) == tensor_bytes(code.state.part("model"))


def test_one_site_at_full_rank_keeps_its_update(tmp_path):
    alone = Federation(tmp_path, ("alpha",))
    ours = alone.run(config(2, rank=8, warmup_rounds=0), home="a").state.part("model")
    average = alone.run(table_config("fedavg", rounds=2), home="b").state.part("model")
    for name, tensor in average.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_site_at_low_rank_with_fallback_is_fedavg_and_without_is_a_projection(tmp_path):
    alone = Federation(tmp_path, ("alpha",))
    settings = config(1, hidden=(64,), rank=3, warmup_rounds=0)
    names = names_of(settings)
    loop = alone.start(settings, home="a")
    before = flat(loop.state.part("model"), names)
    step = flat(loop.round(1).part("model"), names) - before
    answer = replies(alone.link, 1)["alpha"]
    update = flat(answer.payloads["model"].tensors, names) - before
    U = answer.payloads["sketch"].tensors["U"].double()
    torch.testing.assert_close(step, U.T @ (U @ update), rtol=1e-4, atol=1e-6)
    assert step.norm() < 0.999 * update.norm()
    whole = alone.start(config(1, hidden=(64,), rank=3, warmup_rounds=0, fallback=1.0), home="b")
    torch.testing.assert_close(
        flat(whole.round(1).part("model"), names), before + update, rtol=1e-5, atol=1e-6
    )


def test_the_warmup_is_the_base_method_to_the_bit(federation):
    ours = federation.start(config(4, base="fedprox", base_params={"mu": 0.3}, warmup_rounds=3), home="a")
    base = federation.start(table_config("fedprox", rounds=4, mu=0.3), home="b")
    for number in (1, 2, 3):
        ours.state, base.state = ours.round(number), base.round(number)
    assert tensor_bytes(ours.state.part("model")) == tensor_bytes(base.state.part("model"))
    assert tensor_bytes(ours.round(4).part("model")) != tensor_bytes(base.round(4).part("model"))


def test_the_fair_control_is_fedavg_at_a_lower_learning_rate(federation):
    control = federation.run(config(2, rank=0, fallback=1.0, lr_scale=0.5, warmup_rounds=0), home="a")
    settings = table_config("fedavg", rounds=2)
    slower = settings.model_copy(update={"train": settings.train.model_copy(update={"lr": 0.05})})
    assert tensor_bytes(control.state.part("model")) == tensor_bytes(
        federation.run(slower, home="b").state.part("model")
    )


def test_equal_fishers_at_full_rank_are_fedavg_and_so_is_endless_damping(federation):
    average = federation.start(table_config("fedavg", rounds=1), home="a")
    damped = federation.start(config(1, rank=3, warmup_rounds=0, damping=1e9, fallback=1.0), home="b")
    mean, ours = average.round(1).part("model"), damped.round(1).part("model")
    for name, tensor in mean.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)
    size, sites = 5, 3
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lam, vectors = torch.linalg.eigh(root @ root.T)
    rows, updates = vectors.T, torch.eye(sites, size, dtype=torch.float64)
    V = rows.repeat(sites, 1)
    a = torch.cat([rows @ update for update in updates])
    step = fisher_weighted(lambda: [(slice(0, size), V)], lam.repeat(sites) / sites, a, updates.mean(dim=0))
    torch.testing.assert_close(step, updates.mean(dim=0), rtol=1e-8, atol=1e-10)


def test_the_damped_control_takes_a_share_of_the_mean(federation):
    damped = federation.start(config(1, rank=0, fallback=0.25, warmup_rounds=0), home="a")
    mean = federation.start(table_config("fedavg", rounds=1), home="b")
    before = damped.state.part("model")
    after, full = damped.round(1).part("model"), mean.round(1).part("model")
    for name in before:
        torch.testing.assert_close(after[name], before[name] + 0.25 * (full[name] - before[name]))


@pytest.mark.parametrize("base", ["ditto", "fedbn"])
def test_a_personal_base_keeps_its_personal_models(federation, base):
    params = {"keep": ["head"]} if base == "fedbn" else {}
    settings = config(3, hidden=(64,), rank=3, base=base, base_params=params)
    head = parameter_groups(build_model(settings.model, settings.data, seed=0))["head"]
    loop = federation.run(settings)
    assert set(federation.personal()) == set(federation.aliases)
    travelled = replies(federation.link, 3)["alpha"].payloads["model"].tensors
    assert head
    assert all((name in travelled) == (base == "ditto") for name in head)
    assert loop.done == 3


def test_outside_the_subset_the_base_method_rules_or_nothing_moves(federation):
    settings = config(2, hidden=(64,), rank=3, subset=["head"], warmup_rounds=1)
    names = names_of(settings)
    mixed = federation.start(settings, home="a")
    mixed.state = mixed.round(1)
    before = mixed.state.part("model")
    after = mixed.round(2).part("model")
    answers = list(replies(federation.link, 2).values())
    total = sum(answer.cases for answer in answers)
    frozen = federation.start(
        config(2, hidden=(64,), rank=3, subset=[*names], rest="frozen", warmup_rounds=1), home="b"
    )
    frozen.state = frozen.round(1)
    still = frozen.round(2).part("model")
    assert 0 < len(names) < len(before)
    for name in before:
        if name not in names:
            mean = sum(
                answer.cases / total * answer.payloads["model"].tensors[name].double() for answer in answers
            )
            torch.testing.assert_close(after[name], mean.float())
            assert torch.equal(still[name], before[name])
        else:
            assert not torch.equal(still[name], before[name])


def test_a_missing_sites_last_sketch_keeps_its_say(federation):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 3 else parts

    settings = config(3, rank=4, delay=0.5, warmup_rounds=1)
    names = names_of(settings)
    loop = federation.start(settings, link=MemoryLink(federation.open_sites(), tamper=lose))
    for number in (1, 2):
        loop.state = loop.round(number)
    before = loop.state.part("model")
    after = loop.round(3).part("model")
    kept = replies(federation.link, 2)["beta"]
    answers = [replies(federation.link, 3)[alias] for alias in ("alpha", "gamma")]
    absent = [(kept.cases, kept.payloads["sketch"].tensors, 0.5)]
    step = flat(after, names) - flat(before, names)
    torch.testing.assert_close(step, dense_step(answers, before, names, absent=absent), rtol=1e-4, atol=2e-6)
    assert not torch.allclose(step, dense_step(answers, before, names), rtol=1e-2)


def test_delay_changes_nothing_while_nobody_is_missing(federation):
    plain = federation.run(config(3, rank=4), home="a")
    delayed = federation.run(config(3, rank=4, delay=0.9), home="b")
    assert tensor_bytes(plain.state.part("model")) == tensor_bytes(delayed.state.part("model"))
    assert "fipa.round/beta" in delayed.state.values
    assert not [name for name in plain.state.tensors if name.startswith("fipa")]


def test_the_adaptive_rules_set_rank_and_steps(federation):
    settings = config(4, hidden=(64,), rank=12, warmup_rounds=1, adaptive=True, c_e=0.2, c_t=0.5, tau_cap=7)
    loop = federation.run(settings)
    ranks = [
        len(replies(federation.link, 3)[alias].payloads["sketch"].tensors["lam"])
        for alias in federation.aliases
    ]
    assert all(1 <= rank < 12 for rank in ranks)
    assert loop.state.values["fipa.gradient"] > 0
    down = [
        decode(parts) for alias, round_, parts, _ in federation.link.seen if round_ == 3 and alias == "alpha"
    ]
    assert "fipa.gradient" in down[0].payloads["model"].meta
    plain = federation.run(config(4, hidden=(64,), rank=12, warmup_rounds=1), home="b")
    assert tensor_bytes(plain.state.part("model")) != tensor_bytes(loop.state.part("model"))


def test_clipping_is_repeatable_and_noise_is_the_sites_secret(federation):
    def sketch(home, **params):
        federation.run(config(2, rank=3, warmup_rounds=1, **params), home=home)
        return tensor_bytes(replies(federation.link, 2)["alpha"].payloads["sketch"].tensors)

    plain, clipped = sketch("a"), sketch("b", clip=0.5)
    assert clipped == sketch("c", clip=0.5) != plain
    noisy = sketch("d", noise=0.1, clip=0.5)
    assert noisy not in (plain, clipped)
    assert noisy != sketch("e", noise=0.1, clip=0.5)  # from the site's own secret, not from the run's seed


@pytest.mark.parametrize("stop", [2, 3])
def test_the_warm_started_sketch_resumes_to_the_bit(federation, stop):
    settings = config(4, hidden=(64,), rank=4, warmup_rounds=1, delay=0.5)
    whole = federation.run(settings, home="whole")
    cut = federation.start(settings, home="cut")
    for number in range(1, stop + 1):
        cut.state = cut.round(number)
        cut.checkpoints.write(number, cut.state)
    resumed = federation.start(settings, home="cut")
    assert resumed.resume()
    resumed.execute()
    assert tensor_bytes(resumed.state.tensors) == tensor_bytes(whole.state.tensors)
    assert resumed.state.values == whole.state.values


def test_a_warm_sketch_costs_one_product_a_column(federation):
    federation.run(config(3, hidden=(64,), rank=4, oversampling=2, iterations=3, warmup_rounds=1))
    first, second = (replies(federation.link, number)["alpha"].payloads["sketch"].meta for number in (2, 3))
    assert first["products"] == 6 * 4
    assert second["products"] == 6


def spoil(federation, change, *, number=2):
    def tamper(alias, round_, parts):
        if alias != "beta" or round_ != number:
            return parts
        envelope = decode(parts)
        change(envelope.payloads)
        return encode(envelope)

    settings = config(3, rank=3, warmup_rounds=1, codec="int8")
    settings = settings.model_copy(update={"rounds": settings.rounds.model_copy(update={"quorum": 1.0})})
    loop = federation.start(settings, link=MemoryLink(federation.open_sites(), tamper=tamper))
    for round_ in range(1, number):
        loop.state = loop.round(round_)
    with pytest.raises(QuorumError, match="beta") as caught:
        loop.round(number)
    return str(caught.value)


def test_a_sketch_of_another_form_is_refused_by_name(federation):
    def change(name, value):
        def spoiled(payloads):
            payloads["sketch"].tensors[name] = value(payloads["sketch"].tensors[name])

        return spoiled

    assert "eigenvalues of at least 0" in spoil(federation, change("lam", lambda lam: lam - 1e3))
    assert "at most 3 rows of 8" in spoil(federation, change("U", lambda U: U[:, :-1]))
    assert "torch.int8" in spoil(federation, change("U", lambda U: U.float()))
    assert "scales of at least 0" in spoil(federation, change("scale", lambda scale: -scale))
    assert "'scale' of shape (3,)" in spoil(federation, change("scale", lambda scale: scale[:2]))
    assert "the tensors U, lam, scale" in spoil(
        federation, lambda payloads: payloads["sketch"].tensors.pop("lam")
    )


def test_a_sketch_belongs_into_its_rounds(federation):
    assert "needs a Fisher sketch" in spoil(federation, lambda payloads: payloads.pop("sketch"))

    def early(payloads):
        payloads["sketch"] = Payload("sketch", Kind.FISHER_SKETCH)

    assert "takes no Fisher sketch" in spoil(federation, early, number=1)


def test_settings_that_cannot_work_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="needs beta above 0"):
        FIPA.parse({"convention": "code", "damping": 0})
    with pytest.raises(ConfigError, match="no model that is averaged"):
        base_method(FIPAParams(base="local-only"))
    with pytest.raises(ConfigError, match="Did you mean"):
        base_method(FIPAParams(base="fedprxo"))
    with pytest.raises(ConfigError, match="would hide nothing"):
        FIPA.parse({"adaptive": True, "noise": 0.1})
    with pytest.raises(ConfigError, match="another method"):
        FIPA.parse({"base": "fipa"})
    settings = config(hidden=(4,))
    network = build_model(settings.model, settings.data, seed=0)
    groups = parameter_groups(network)
    with pytest.raises(ConfigError, match="no parameter group and matches no parameter"):
        sketched(FIPAParams(subset=("heads",)), network.state_dict(), groups)
    with pytest.raises(ConfigError, match="leaves no parameter that travels"):
        sketched(FIPAParams(subset=("head",)), ["other"], groups)
    guarded = config().model_copy(update={"guard": config().guard.model_copy(update={"reduce": "median"})})
    server = FIPAServer(FIPA.parse({}))
    server.robust = guarded.guard
    with pytest.raises(ConfigError, match="takes no mean"):
        server.init(dict(network.state_dict()), groups, None)
    control = FIPAServer(FIPA.parse({"rank": 0}))
    control.robust = guarded.guard
    assert control.init(dict(network.state_dict()), groups, None)


def test_frozen_leaves_the_statistics_of_trained_layers_alone():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model = dict(network.state_dict())
    groups = Groups(
        {"extractor": ("0.weight", "0.bias", "1.weight", "1.bias"), "head": ("2.weight", "2.bias")}
    )
    moved = {name: tensor + 5 for name, tensor in model.items()}

    def after(**params):
        server = FIPAServer(FIPA.parse({"rank": 0, "rest": "frozen", "warmup_rounds": 0, **params}))
        ctx = RoundContext("run", 1, 3, 0)
        state = server.init(model, groups, ctx)
        acc = server.fold(
            server.begin(state, ctx), Reply("a", 1, {"model": Payload("model", Kind.MODEL, moved)})
        )
        return server.finish(state, acc, ctx).part("model")

    assert all(torch.equal(after()[name], moved[name]) for name in model)
    still = after(subset=["head"])
    assert all(
        torch.equal(still[name], moved[name] if name.startswith("2") else model[name]) for name in model
    )


def test_any_registered_base_with_a_mean_is_taken():
    assert MethodStrategy("fipa", config=config(base="ditto"), base="ditto").method is FIPA
    network = build_model(config(hidden=(4,)).model, config().data, seed=0)
    state = FIPAServer(FIPA.parse({})).init(dict(template(network)), parameter_groups(network), None)
    assert isinstance(state, State)
