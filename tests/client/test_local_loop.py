"""The one local loop: repeatable to the bit, resumable, with hooks in their place and frozen layers that stay frozen."""

from dataclasses import dataclass

import pytest
import torch

from client.trainer import Trainer
from common.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from common.errors import CancelledError, ConfigError, TrainingError
from common.method import RoundContext
from common.models import build_model, parameter_groups
from common.numerics.rng import generator
from common.tasks import get_task


@dataclass
class Item:
    alias: str
    image: torch.Tensor
    label: torch.Tensor
    spacing: tuple[float, ...] = (1.0, 1.0)
    cases: int = 1


class Pictures:
    """Twelve noisy squares, six batches of two an epoch."""

    def __init__(self, site="alpha"):
        self.site = site
        self.counts = {"training": 12, "validation": 2, "test": 0}
        draw = generator("pictures")
        self.label = (torch.rand(12, 1, 16, 16, generator=draw) > 0.7).long()
        self.image = self.label.float() + 0.3 * torch.randn(12, 1, 16, 16, generator=draw)

    def steps_per_epoch(self, batch_size):
        return -(-12 // batch_size)

    def training_batches(self, *, seed, epoch, batch_size):
        order = torch.randperm(12, generator=generator(seed, epoch))
        for start in range(0, 12, batch_size):
            chosen = order[start : start + batch_size]
            yield {"image": self.image[chosen], "label": self.label[chosen]}

    def evaluation_cases(self, split):
        for index in range(self.counts[split]):
            yield Item(f"case-{index:04d}", self.image[index : index + 1], self.label[index : index + 1])


def trainer(site="alpha", *, norm="batch", dropout=0.2, cancel=lambda: None, **train):
    config = RunConfig(
        data=DataConfig(spatial_dims=2, patch=(16, 16), channels=("grey",), labels=("no", "yes")),
        model=ModelConfig(name="unet", width=4, levels=2, norm=norm, dropout=dropout),
        train=TrainConfig(**{"batch_size": 4, "lr": 0.05, **train}),
    )
    network = build_model(config.model, config.data, seed=config.seed)
    made = Trainer(
        config, Pictures(site), network, parameter_groups(network), get_task(config.data, config.train),
        device=torch.device("cpu"), amp=False, check_cancelled=cancel, on_progress=lambda *_: None,
    )  # fmt: skip
    made.begin(RoundContext("run", 1, 3, config.seed, site))
    return made


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_fit_is_repeatable_to_the_bit_and_differs_between_sites_and_rounds():
    first, again, other, later = trainer(), trainer(), trainer("beta"), trainer()
    later.begin(RoundContext("run", 2, 3, 0, "alpha"))
    stats = [made.fit() for made in (first, again, other, later)]
    assert same(first.weights(), again.weights())
    assert not same(first.weights(), other.weights())
    assert not same(first.weights(), later.weights())
    assert stats[0].steps == 3
    assert stats[0].samples == 12


def test_streams_see_the_same_batches():
    main, other = trainer(), trainer()
    main.fit(stream="main")
    other.fit(stream="personal")
    assert same(main.weights(), other.weights())


def test_steps_are_exact_and_cycle_the_data():
    seen = []
    assert trainer().fit(steps=7, after_step=lambda model: seen.append(1)).steps == 7
    assert len(seen) == 7


def test_kept_optimisers_resume_to_the_bit():
    whole = trainer(optimizer_state="kept")
    whole.fit()
    weights, state = whole.weights(), whole.optimizer_state()
    assert state.tensors
    whole.begin(RoundContext("run", 2, 3, 0, "alpha"))
    whole.fit()
    resumed = trainer(optimizer_state="kept")
    resumed.load(weights)
    resumed.restore_optimizer(state)
    resumed.begin(RoundContext("run", 2, 3, 0, "alpha"))
    resumed.fit()
    assert same(whole.weights(), resumed.weights())
    forgetful = trainer()
    forgetful.load(weights)
    forgetful.begin(RoundContext("run", 2, 3, 0, "alpha"))
    forgetful.fit()
    assert not same(whole.weights(), forgetful.weights())


def test_frozen_layers_stay_and_trainable_ones_move():
    made = trainer()
    before = made.weights()
    head = made.groups["head"]
    made.fit(trainable=head)
    after = made.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    layers = {name.rsplit(".", 1)[0] for name in head}
    frozen = {name for name in before if name.rsplit(".", 1)[0] not in layers}  # running statistics included
    assert frozen & set(made.groups["norm"])
    assert not moved & frozen
    assert all(value.requires_grad for value in made.model.parameters())
    with pytest.raises(ConfigError, match="nobody"):
        made.fit(trainable=["nobody"])


def test_hooks_are_called_in_order_and_the_loss_term_adds_its_gradient():
    made = trainer(dropout=0.0, optimizer="sgd", momentum=0.0)
    calls = []
    anchor = {name: tensor + 1 for name, tensor in made.weights().items()}
    gradients = []

    def pull(model):
        return 0.5 * sum((value - anchor[name]).square().sum() for name, value in model.named_parameters())

    def look(model):
        calls.append("backward")
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})

    made.fit(steps=1, after_backward=look, after_step=lambda model: calls.append("step"))
    made = trainer(dropout=0.0, optimizer="sgd", momentum=0.0)
    start = made.weights()
    made.fit(steps=1, loss_term=pull, after_backward=look)
    assert calls == ["backward", "step", "backward"]
    for name, plain in gradients[0].items():
        assert torch.allclose(gradients[1][name], plain + start[name] - anchor[name], atol=1e-5)


def test_a_cancelled_fit_stops_at_the_next_step():
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) > 2:
            raise CancelledError("gone")

    made = trainer(cancel=cancel)
    with pytest.raises(CancelledError):
        made.fit(epochs=50)
    assert len(calls) == 3


def test_a_loss_that_is_no_number_is_named():
    made = trainer()
    with pytest.raises(TrainingError, match="alpha"):
        made.fit(loss_term=lambda model: torch.tensor(float("nan"), requires_grad=True) * 1)


def test_evaluating_leaves_network_and_generator_as_they_were():
    made = trainer()
    other = {name: torch.zeros_like(tensor) for name, tensor in made.weights().items()}
    before, state = made.weights(), torch.random.get_rng_state()
    sums, cases = made.evaluate(other, "validation", hd95=False)
    assert cases == 2
    assert "dice" in sums
    assert same(before, made.weights())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_on_cuda_is_repeatable_and_close_to_the_cpu():
    def on(device):
        config_of = trainer(dropout=0.0)
        made = Trainer(
            config_of.config, Pictures(), build_model(config_of.config.model, config_of.config.data, seed=0), config_of.groups,
            config_of.task, device=torch.device(device), amp=False, check_cancelled=lambda: None, on_progress=lambda *_: None,
        )  # fmt: skip
        made.begin(RoundContext("run", 1, 3, 0, "alpha"))
        made.fit()
        return made.weights()

    first, again, cpu = on("cuda"), on("cuda"), on("cpu")
    assert same(first, again)
    for name, tensor in cpu.items():
        if tensor.is_floating_point():
            assert torch.allclose(first[name], tensor, atol=0.05), name
