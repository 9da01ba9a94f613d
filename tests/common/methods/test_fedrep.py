"""FedRep against a loop written by hand, and which layers each of its two turns changes."""

import numpy as np
import pytest
import torch

from client.data.datalist import read_datalist
from client.data.dataset import SiteDataset
from common.config import ModelConfig
from common.methods.fedrep import FedRepParams, FedRepSite, together
from common.models import build_model
from common.payload import Kind, Payload
from common.store import tensor_bytes
from common.work import FitStats, Groups
from tests.client.test_trainer import make
from tests.harness import Federation, table_config

LR, ROUNDS, TAU, E = 0.1, 3, 3, 2
BASE, HEAD = ("body.0.weight", "body.0.bias"), ("out.weight", "out.bias")


def config(**params):
    base = table_config("fedrep", rounds=ROUNDS, **{"personal": FedRepParams().personal, **params})
    train = base.train.model_copy(update={"batch_size": 1000, "lr": LR})
    return base.model_copy(update={"train": train, "model": ModelConfig(name="mlp", hidden=(4,))})


def gradients(w, x, y):
    """Mean cross-entropy's gradients of a perceptron with one hidden layer, float64."""
    before = x @ w["body.0.weight"].T + w["body.0.bias"]
    hidden = np.maximum(before, 0)
    logits = hidden @ w["out.weight"].T + w["out.bias"]
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (share / share.sum(axis=1, keepdims=True) - np.eye(2)[y]) / len(y)
    back = (error @ w["out.weight"]) * (before > 0)
    return {"out.weight": error.T @ hidden, "out.bias": error.sum(0), "body.0.weight": back.T @ x, "body.0.bias": back.sum(0)}  # fmt: skip


def by_hand(settings, sites):
    """Algorithm 1 with full batches: τ steps of the head, E steps of the base, weighted mean of the bases."""
    first = build_model(settings.model, settings.data, seed=settings.seed).state_dict()
    shared = {name: first[name].double().numpy() for name in BASE}
    heads = {alias: {name: first[name].double().numpy() for name in HEAD} for alias in sites}
    for _ in range(ROUNDS):
        sums, total = dict.fromkeys(BASE, 0.0), 0
        for alias, (x, y) in sites.items():
            w = {**shared, **heads[alias]}
            for names, steps in ((HEAD, TAU), (BASE, E)):
                for _ in range(steps):
                    found = gradients(w, x, y)
                    w = {name: w[name] - LR * found[name] if name in names else w[name] for name in w}
            heads[alias] = {name: w[name] for name in HEAD}
            sums = {name: sums[name] + len(y) * w[name] for name in BASE}
            total += len(y)
        shared = {name: value / total for name, value in sums.items()}
    return shared, heads


def test_it_is_algorithm_1(tmp_path):
    federation = Federation(tmp_path)
    settings = config(head_epochs=TAU, base_epochs=E)
    loop = federation.run(settings)
    sites = {}
    for alias in federation.aliases:
        data = SiteDataset(read_datalist(tmp_path / "data" / alias, alias), settings.data)
        (batch,) = data.training_batches(seed=0, epoch=0, batch_size=1000)
        sites[alias] = batch["image"].double().numpy(), batch["label"].numpy()
    assert len({len(y) for _, y in sites.values()}) == 3  # so that the weights matter
    shared, heads = by_hand(settings, sites)
    found = loop.server.model(loop.state)
    assert found.keys() == set(BASE)
    first = build_model(settings.model, settings.data, seed=settings.seed).state_dict()
    for name, value in shared.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=0, atol=2e-6)
        assert np.abs(value - first[name].numpy()).max() > 1e-2
    for alias, model in federation.personal().items():
        for name, value in heads[alias].items():
            np.testing.assert_allclose(model[name].numpy(), value, rtol=0, atol=2e-6)
        assert tensor_bytes({name: model[name] for name in BASE}) == tensor_bytes(found)


class Recorder:
    """A site's work that trains nothing and remembers what it was asked for."""

    def __init__(self):
        self.asked = []
        self.groups = Groups(
            {
                "extractor": ("a.weight", "n.weight"),
                "head": ("h.weight",),
                "norm": ("n.weight", "n.mean"),
                "buffers": ("n.mean",),
            }
        )
        self.cases = 5

    def load(self, weights):
        self.held = dict(weights)

    def weights(self):
        return dict(self.held)

    def progress(self, phase):
        self.asked.append(phase)

    def fit(self, **options):
        self.asked.append(options)
        return FitStats(2, 10, 1.0, 0.5)


def turns(**params):
    work = Recorder()
    work.held = {name: torch.zeros(1) for name in ("a.weight", "n.weight", "n.mean", "h.weight")}
    half = FedRepSite(FedRepParams(**params))
    state = half.init(work)
    base = {name: tensor for name, tensor in work.held.items() if name not in state.part("local")}
    received = {"model": Payload("model", Kind.MODEL, base)}
    return work.asked, half.train(work, received, state)


def test_the_head_is_trained_first_and_each_turn_freezes_the_other():
    asked, result = turns(head_epochs=4)
    assert asked == [
        "personal",
        {"stream": "head", "epochs": 4, "trainable": ["h.weight"]},
        "train",
        {"epochs": None, "trainable": ["a.weight", "n.weight", "n.mean"]},
    ]
    assert (result.stats.steps, result.stats.samples, result.cases) == (4, 20, 5)
    assert [payload.tensors.keys() for payload in result.payloads] == [{"a.weight", "n.weight", "n.mean"}]
    assert result.state.part("local").keys() == {"h.weight"}


def test_kept_statistics_are_not_counted_on_in_the_heads_turn():
    asked, result = turns(personal=("head", "buffers"), base_epochs=3)
    assert asked[1]["trainable"] == ["h.weight"]
    assert asked[3] == {"epochs": 3, "trainable": ["a.weight", "n.weight"]}
    assert result.state.part("local").keys() == {"h.weight", "n.mean"}


def test_without_a_personal_parameter_there_is_one_turn():
    asked, result = turns(personal=("buffers",))
    assert asked == [{"epochs": None, "trainable": ["a.weight", "n.weight", "h.weight"]}]
    assert result.state.part("local").keys() == {"n.mean"}


def test_each_turn_changes_its_own_tensors_alone_and_equal_epochs_are_equal_budgets():
    work = make("densenet", cases=4, model={"levels": 2}, local_epochs=2)
    fit, after = work.fit, []

    def watched(**options):
        before, stats = work.weights(), fit(**options)
        after.append(
            {name for name, tensor in work.weights().items() if not torch.equal(tensor, before[name])}
        )
        return stats

    work.fit = watched
    half = FedRepSite(FedRepParams(head_epochs=1, base_epochs=1))
    state = half.init(work)
    base = {name: tensor for name, tensor in work.weights().items() if name not in state.part("local")}
    result = half.train(work, {"model": Payload("model", Kind.MODEL, base)}, state)
    head, rest = after
    assert head == set(work.groups["head"])  # no running statistic among them
    assert rest & set(work.groups["buffers"])
    assert rest <= base.keys()
    alone = make("densenet", cases=4, model={"levels": 2}, local_epochs=2).fit()
    assert (result.stats.steps, result.stats.samples) == (alone.steps, alone.samples)


@pytest.mark.parametrize(("samples", "loss"), [((10, 30), 3.5), ((0, 5), 4.0), ((5, 0), 2.0)])
def test_the_loss_of_both_turns_is_the_mean_over_their_samples(samples, loss):
    parts = [
        FitStats(count, count, value if count else float("nan"), 1.5)
        for count, value in zip(samples, (2.0, 4.0), strict=True)
    ]
    both = together(*parts)
    assert (both.steps, both.samples, both.loss, both.seconds) == (sum(samples), sum(samples), loss, 3.0)
    nothing = together(*(FitStats(0, 0, float("nan"), 0.0) for _ in parts))
    assert np.isnan(nothing.loss)
