"""The trainer's edges: every network, saved optimisers, frozen statistics, lone samples, and state put back."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from client.compute import choose_precision
from client.optimizers import SCALE, LocalOptimizers
from client.trainer import Trainer, without_single
from common.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from common.errors import CancelledError, ConfigError, DataError, PayloadError, TrainingError, WardroundError
from common.method import RoundContext, SiteWork
from common.methods.fedprox import squared_distance
from common.models import MODELS, build_model, parameter_groups
from common.numerics.rng import generator
from common.payload import State
from common.store import read_state, write_state
from common.tasks import divide, get_task


class Fake:
    """A site of random cases that fulfils the trainer's contract with its data."""

    def __init__(self, data: DataConfig, cases: int, site: str = "alpha") -> None:
        self.site, self.cases, self.data = site, cases, data
        self.counts = {"training": cases, "validation": 3, "test": 0}
        draw = generator("fake", data.task)
        shape = data.patch or (len(data.channels),)
        lead = (cases,) if data.task == "tabular" else (cases, len(data.channels))
        self.image = torch.randn(*lead, *shape, generator=draw)
        size = (cases, 1, *data.patch) if data.task == "segmentation" else (cases,)
        self.label = torch.randint(0, len(data.labels), size, generator=draw)
        self.closed = 0

    def steps_per_epoch(self, batch_size):
        return -(-self.cases // batch_size)

    def training_batches(self, *, seed, epoch, batch_size):
        order = torch.randperm(self.cases, generator=generator(seed, epoch))
        try:
            for chosen in order.split(batch_size):
                yield {"image": self.image[chosen], "label": self.label[chosen]}
        finally:
            self.closed += 1

    def evaluation_cases(self, split):
        for index in range(self.counts[split]):
            part = slice(index, index + 1)
            yield SimpleNamespace(
                alias=f"case-{index}", image=self.image[part], label=self.label[part], spacing=(), cases=1
            )


def data_of(name, patch=None):
    task = MODELS[name].tasks[0]
    size = patch or {"segmentation": (16, 16), "classification": (32, 32), "tabular": ()}[task]
    return DataConfig(
        task=task, spatial_dims=len(size), channels=("a", "b"), labels=("x", "y", "z"), patch=size
    )


def make(
    name="unet", *, cases=5, patch=None, on_progress=lambda *_: None, cancel=lambda: None, model=None, **train
):
    config = RunConfig(
        data=data_of(name, patch),
        model=ModelConfig(**{"name": name, "width": 4, **(model or {})}),
        train=TrainConfig(**{"batch_size": 2, "lr": 0.01, **train}),
    )
    network = build_model(config.model, config.data, seed=3)
    made = Trainer(
        config,
        Fake(config.data, cases),
        network,
        parameter_groups(network),
        get_task(config.data, config.train),
        device=torch.device("cpu"),
        amp=True,  # a CPU computes in float32 all the same
        check_cancelled=cancel,
        on_progress=on_progress,
    )
    made.begin(RoundContext("run", 1, 3, 3, "alpha"))
    return made


def plain_sgd(**keys):
    return {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, **keys}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "densenet121" else []) for name in MODELS]
)
def test_every_network_trains_with_deterministic_kernels_to_the_same_bits(name):
    dropout = 0.0 if name == "logistic" else 0.1
    runs = [make(name, model={"dropout": dropout}) for _ in range(2)]
    before = runs[0].weights()
    stats = [made.fit(steps=2) for made in runs]
    assert same(runs[0].weights(), runs[1].weights())
    assert {key for key in moved(before, runs[0].weights()) if key in runs[0].groups["head"]}
    assert stats[0].loss == stats[1].loss
    assert math.isfinite(stats[0].loss)


@pytest.mark.parametrize("name", ["unet", "mlp"])
def test_the_trainer_is_what_a_site_half_works_with(name):
    work: SiteWork = make(name)
    assert work.cases == 5
    copies = work.on_device(work.weights())
    assert same(copies, work.weights())
    next(iter(copies.values())).zero_()
    assert not same(copies, work.weights())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_kept_optimisers_go_through_the_disk_to_the_bit(tmp_path, optimizer):
    keys = {"optimizer": optimizer, "optimizer_state": "kept", "momentum": 0.9, "weight_decay": 0.01}
    whole = make(**keys)
    for stream in ("main", "personal"):
        whole.fit(stream=stream, steps=2)
    write_state(tmp_path / "state", whole.optimizer_state())
    resumed = make(**keys)
    resumed.load(whole.weights())
    resumed.restore_optimizer(read_state(tmp_path / "state"))
    for made in (whole, resumed):
        made.begin(RoundContext("run", 2, 3, 3, "alpha"))
        made.fit(stream="personal", steps=2)
        made.fit(stream="main", steps=2)
    assert same(whole.weights(), resumed.weights())
    assert same(whole.optimizer_state().tensors, resumed.optimizer_state().tensors)


def test_streams_have_optimisers_of_their_own():
    shared, apart = (make(optimizer_state="kept") for _ in range(2))
    shared.fit(stream="a", steps=2)
    apart.fit(stream="a", steps=2)
    shared.fit(stream="a", steps=1)
    apart.fit(stream="b", steps=1)
    assert not same(shared.weights(), apart.weights())
    assert {name.split("/")[0] for name in apart.optimizer_state().tensors} == {"a", "b"}
    with pytest.raises(WardroundError, match="a/b"):
        apart.fit(stream="a/b", steps=1)


def test_optimisers_are_forgotten_by_an_empty_state_and_kept_only_where_asked_for():
    made, fresh = make(optimizer_state="kept"), make()
    for trainer in (made, fresh):
        trainer.fit(steps=1)
    assert made.optimizer_state().tensors
    assert not fresh.optimizer_state().tensors
    fresh.restore_optimizer(made.optimizer_state())
    assert not fresh.optimizer_state().tensors
    made.restore_optimizer(State())
    assert not made.optimizer_state().tensors


def test_an_optimiser_of_another_network_is_refused():
    state = make(model={"width": 6}, optimizer_state="kept")
    state.fit(steps=1)
    with pytest.raises(PayloadError, match=r"shape .* the network has shape"):
        make(optimizer_state="kept").restore_optimizer(state.optimizer_state())
    with pytest.raises(PayloadError, match="no such parameter"):
        make(optimizer_state="kept").restore_optimizer(State({"main/nobody/exp_avg": torch.zeros(1)}))


def test_the_loss_scale_of_float16_is_kept_with_the_optimiser():
    network = nn.Linear(2, 1)
    first, second = (
        LocalOptimizers(TrainConfig(optimizer_state="kept"), network, scaled=True) for _ in range(2)
    )
    optimizer, scaler = first.open("main", lr=0.1)
    assert scaler.get_scale() == 1.0 or scaler.is_enabled()
    for loss in (network(torch.ones(1, 2)).sum(), network(torch.full((1, 2), math.inf)).sum()):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 2  # an overflow halves it
    second.restore(first.state())
    assert second.open("main", lr=0.1)[1].state_dict() == scaler.state_dict()
    assert second.state().values == first.state().values


def test_the_proximal_term_adds_its_analytic_gradient():
    made, pulled = make(**plain_sgd()), make(**plain_sgd())
    anchor = {name: tensor + 0.5 for name, tensor in made.weights().items()}
    start, mu = made.weights(), 0.3
    made.fit(steps=1)
    stats = pulled.fit(steps=1, loss_term=lambda model: 0.5 * mu * squared_distance(model, anchor))
    for name, value in made.weights().items():
        expected = value - 0.1 * mu * (start[name] - anchor[name])
        assert torch.allclose(pulled.weights()[name], expected, atol=1e-6), name
    assert stats.loss == make(**plain_sgd()).fit(steps=1).loss  # the task's own loss is what is told


def test_the_learning_rate_is_scaled_and_the_gradient_bounded():
    start = make(**plain_sgd()).weights()

    def step(lr_scale=1.0, **keys):
        made = make(**plain_sgd(**keys))
        made.fit(steps=1, lr_scale=lr_scale)
        return torch.cat([(made.weights()[name] - start[name]).flatten() for name in start])

    assert torch.allclose(step(0.25), 0.25 * step(), atol=1e-7)
    assert float(step(clip_norm=1e-2).norm()) == pytest.approx(0.1 * 1e-2, rel=1e-3)
    assert torch.equal(step(clip_norm=1e6), step())


def test_a_hook_may_replace_the_gradient():
    made = make(**plain_sgd())
    before = made.weights()

    def erase(model):
        for parameter in model.parameters():
            parameter.grad.zero_()

    made.fit(after_backward=erase)
    assert same(before, made.weights())


def test_frozen_statistics_are_used_and_left_alone():
    made = make(model={"norm": "batch"})
    layer = next(module for module in made.model.modules() if isinstance(module, nn.BatchNorm2d))
    flags = []

    def look(model):
        flags.append((model.training, layer.training, layer.weight.requires_grad))

    before = made.weights()
    made.fit(steps=1, trainable=made.groups["head"], after_step=look)
    assert not moved(before, made.weights()) & set(made.groups["norm"])
    made.fit(steps=1, after_step=look)
    assert moved(before, made.weights()) >= set(made.groups["buffers"])
    # statistics alone can be named, too
    frozen = make(model={"norm": "batch"})
    before = frozen.weights()
    frozen.fit(steps=1, trainable=[*frozen.groups["head"], *frozen.groups["buffers"]])
    assert moved(before, frozen.weights()) == {*frozen.groups["head"], *frozen.groups["buffers"]}
    assert flags == [(True, False, False), (True, True, True)]


def test_nothing_to_do_is_nothing_done():
    made = make("logistic")
    before = made.weights()
    for keys in ({"epochs": 0}, {"steps": 0}, {"trainable": made.groups["extractor"]}):
        stats = made.fit(**keys)
        assert (stats.steps, stats.samples) == (0, 0)
        assert math.isnan(stats.loss)
    assert same(before, made.weights())
    with pytest.raises(ConfigError, match="got both"):
        made.fit(epochs=1, steps=1)


def test_epochs_are_counted_and_told():
    told = []
    made = make(local_epochs=2, on_progress=lambda *what: told.append(what))
    made.progress("personal")
    assert made.fit(epochs=1).steps == 3
    made.begin(made.ctx)
    assert made.fit().samples == 10
    assert told[0] == ("personal", 0, 0)
    assert told[1:4] == [("personal", step, 3) for step in (1, 2, 3)]
    assert told[-1] == ("train", 6, 6)


def test_a_site_without_training_cases_is_named():
    with pytest.raises(DataError, match="alpha: 0 training cases"):
        make(cases=0).fit()


@pytest.mark.parametrize("name", ["densenet", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_a_lone_last_image_joins_the_batch_before_it(name):
    made = make(name, cases=5)
    stats = made.fit(epochs=1)  # 2 + 3 instead of 2 + 2 + 1, over which nothing can be normalised
    assert (stats.steps, stats.samples) == (2, 5)
    with pytest.raises(DataError, match="at least 2 needed"):
        make(name, cases=1).fit()
    assert make(name, cases=1, model={"norm": "group"}).fit(steps=1).samples == 1


@pytest.mark.parametrize(("cases", "sizes"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [2, 3])])
def test_batches_keep_their_samples_when_one_is_joined(cases, sizes):
    fake = Fake(data_of("mlp"), cases)
    plain = list(fake.training_batches(seed=1, epoch=0, batch_size=2))
    joined = list(without_single(iter(plain)))
    assert [len(batch["label"]) for batch in joined] == sizes
    for key in ("image", "label"):
        assert torch.equal(torch.cat([b[key] for b in joined]), torch.cat([b[key] for b in plain]))


def test_a_fit_that_ends_early_puts_everything_back_and_closes_the_data():
    made = make(cases=20)
    modes = [module.training for module in made.model.modules()]

    def fail(model):
        raise CancelledError("gone")

    for keys in ({"steps": 1}, {"after_step": fail}):
        try:
            made.fit(trainable=made.groups["head"], **keys)
        except CancelledError:
            assert keys.get("after_step")
        assert [module.training for module in made.model.modules()] == modes
        assert all(value.requires_grad and value.grad is None for value in made.model.parameters())
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert made.dataset.closed == 2


def test_weights_of_another_network_are_refused():
    made, other = make(), make(model={"width": 6})
    before = made.weights()
    for use in (made.load, lambda weights: made.evaluate(weights, "validation", hd95=False)):
        with pytest.raises(PayloadError, match=r"alpha.*shape"):
            use(other.weights())
    assert same(before, made.weights())


def test_a_model_that_has_diverged_is_told_with_its_case():
    made = make()
    before = made.weights()
    broken = {name: torch.full_like(tensor, math.inf) for name, tensor in before.items()}
    with pytest.raises(TrainingError, match="case-0") as caught:
        made.evaluate(broken, "validation", hd95=False)
    assert caught.value.site == "alpha"
    assert same(before, made.weights())


def test_a_diverging_step_stops_the_fit_at_once():
    made, steps = make(**plain_sgd(lr=1e30)), []
    with pytest.raises(TrainingError, match=r"train\.lr"):
        made.fit(epochs=100, after_step=lambda model: steps.append(1))
    assert len(steps) < 10


def test_evaluation_sums_cases_and_predicts_in_evaluation_mode():
    made = make("mlp", cases=9, model={"dropout": 0.5})
    twice = [made.evaluate(made.weights(), "validation", hd95=False) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0][1] == 3
    with torch.no_grad():
        output = made.model.eval()(made.dataset.image[:3])
    expected = nn.functional.cross_entropy(output, made.dataset.label[:3])
    assert divide(twice[0][0])["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert made.evaluate(made.weights(), "test", hd95=False) == ({}, 0)


def test_an_evaluation_can_be_cancelled_between_windows():
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 3:
            raise CancelledError("gone")

    made = make(cancel=cancel)
    made.dataset.image = torch.randn(3, 2, 64, 64)
    made.dataset.label = torch.zeros(3, 1, 64, 64, dtype=torch.int64)
    before = made.weights()
    with pytest.raises(CancelledError):
        made.evaluate(before, "validation", hd95=False)
    assert same(before, made.weights())


def test_half_precision_is_for_cuda_alone():
    assert choose_precision(torch.device("cpu"), amp=True) is None
    assert choose_precision(torch.device("cuda"), amp=False) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_repeatably_and_resumes_on_cuda(monkeypatch, precision):
    monkeypatch.setattr("client.trainer.choose_precision", lambda device, *, amp: precision if amp else None)

    def on_cuda(weights=None, state=None, round_=1):
        settings = make(patch=(32, 32), optimizer_state="kept")
        network = build_model(settings.config.model, settings.config.data, seed=3)
        made = Trainer(
            settings.config, settings.dataset, network, settings.groups, settings.task,
            device=torch.device("cuda"), amp=True, check_cancelled=lambda: None, on_progress=lambda *_: None,
        )  # fmt: skip
        if weights:
            made.load(weights)
            made.restore_optimizer(state)
        made.begin(dataclasses.replace(settings.ctx, round=round_))
        return made, made.fit(epochs=10)

    first, stats = on_cuda()
    again, _ = on_cuda()
    assert same(first.weights(), again.weights())
    assert stats.loss < make(patch=(32, 32)).fit(steps=1).loss
    assert all(tensor.dtype == torch.float32 for tensor in first.weights().values())
    resumed, _ = on_cuda(first.weights(), first.optimizer_state(), 2)
    first.begin(dataclasses.replace(first.ctx, round=2))
    first.fit(epochs=10)
    assert same(first.weights(), resumed.weights())
