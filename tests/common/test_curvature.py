"""Curvature: the matrix-free operator against dense Jacobians in float64, and on every network."""

import weakref

import pytest
import torch
from torch import nn

from common.config import DataConfig, ModelConfig
from common.models import build_model
from common.numerics import curvature
from common.numerics.curvature import GGN, OutputLoss, flat_function
from tests.common.curvature_cases import (
    F64,
    LOSSES,
    WEIGHTS,
    batches_for,
    close,
    dense_oracle,
    name_of,
    perceptron,
    random,
    target_for,
    tiny_unet,
)

NETWORKS = [
    ("unet", 2, "instance"),
    ("unet", 3, "group"),
    ("dynunet", 2, "instance"),
    ("segresnet", 2, "group"),
    ("densenet", 2, "batch"),
    pytest.param("densenet121", 2, "batch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
@pytest.mark.parametrize("forward", [True, False], ids=["forward-mode", "twice-backwards"])
def test_the_operator_is_the_dense_matrix_over_unequal_batches(loss, forward):
    network = perceptron()
    names = [name for name, _ in network.named_parameters()]
    theta, function = flat_function(network, names)
    batches = batches_for(network, loss, (4,))
    H, gradient = dense_oracle(function, theta, loss, batches)
    operator = GGN(function, theta, loss, lambda: batches)
    operator._forward = forward
    V = random(11, len(theta), seed=7)
    assert operator.size == len(theta) == 43
    close(operator.matmat(V), V @ H)
    close(operator.quadratic(V), V @ H @ V.T)
    close(operator.gradient(), gradient)
    close(operator.dense(), H)
    assert operator._forward is forward
    assert torch.equal(operator.quadratic(V), operator.quadratic(V).T)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[3], LOSSES[5]], ids=name_of)
def test_a_segmentation_network_is_the_dense_matrix(loss):
    network = tiny_unet()
    names = [name for name, _ in network.named_parameters()]
    theta, function = flat_function(network, names)
    batches = [
        (random(size, 1, 4, 4, seed=size), target_for(loss.kind, (size, 3, 4, 4), size, loss.ignore_index))
        for size in (2, 1)
    ]
    H, gradient = dense_oracle(function, theta, loss, batches)
    if loss.kind == "softmax":
        batches = [(inputs, target.unsqueeze(1)) for inputs, target in batches]
    operator = GGN(function, theta, loss, lambda: batches)
    V = random(9, len(theta), seed=7)
    close(operator.matmat(V), V @ H)
    close(operator.quadratic(V), V @ H @ V.T)
    close(operator.gradient(), gradient)
    assert operator._forward


@pytest.mark.parametrize(("name", "dims", "norm"), NETWORKS)
def test_every_network_goes_forward_and_agrees_with_twice_backwards(name, dims, norm):
    task = "classification" if "densenet" in name else "segmentation"
    data = DataConfig(
        task=task, spatial_dims=dims, channels=("a", "b"), labels=("x", "y", "z"), patch=(32,) * dims
    )
    levels = 3 if name == "dynunet" else 2
    network = (
        build_model(ModelConfig(name=name, width=4, levels=levels, norm=norm), data, seed=0).double().eval()
    )
    size = 32 if "densenet" in name else 8
    inputs = random(1, 2, *(size,) * dims)
    with torch.no_grad():
        outputs = network(inputs)
    batches = [(inputs, target_for("softmax", outputs.shape, 1))]
    # all of DenseNet's seven million would take seconds; the first layer's go through every other one too
    names = [
        key
        for key, _ in network.named_parameters()
        if name != "densenet121" or "conv0" in key or "norm" in key
    ]
    theta, function = flat_function(network, names)
    one, other = (GGN(function, theta, OutputLoss("softmax"), lambda: batches) for _ in range(2))
    other._forward = False
    V = random(1 if name == "densenet121" else 2, len(theta), seed=3)
    product = one.matmat(V)
    assert one._forward, "an operation of this network has no forward-mode derivative: it would be slow"
    close(product, other.matmat(V))
    assert float(product.abs().max()) > 0
    close(one.quadratic(V), V @ product.T)


def test_batches_count_by_their_weight_and_not_each_alike():
    network, loss = perceptron(), OutputLoss("softmax", WEIGHTS, ignore_index=1)
    theta, function = flat_function(network, ["0.weight", "2.bias"])
    batches = batches_for(network, loss, (4,))
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    apart, together = (GGN(function, theta, loss, lambda b=b: b) for b in (batches, whole))
    V = random(3, len(theta))
    close(apart.matmat(V), together.matmat(V))
    close(apart.quadratic(V), together.quadratic(V))
    close(apart.gradient(), together.gradient())


def test_some_parameters_in_any_order_are_a_block_of_the_whole():
    network, loss = perceptron(), OutputLoss("softmax")
    names = [name for name, _ in network.named_parameters()]
    batches = batches_for(network, loss, (4,))
    theta, function = flat_function(network, names)
    H = GGN(function, theta, loss, lambda: batches).dense()
    where = dict(zip(names, torch.arange(len(theta)).split([20, 5, 15, 3]), strict=True))
    chosen = ["2.bias", "0.weight"]
    index = torch.cat([where[name] for name in chosen])
    part, part_function = flat_function(network, chosen)
    assert torch.equal(part, theta[index])
    close(GGN(part_function, part, loss, lambda: batches).dense(), H[index][:, index])


def test_the_function_keeps_what_the_network_was():
    data = DataConfig(task="classification", spatial_dims=2, channels=("a",), patch=(32, 32))
    network = build_model(ModelConfig(name="densenet121"), data, seed=0).eval()
    name = "class_layers.out.weight"
    theta, function = flat_function(network, [name])
    inputs = random(1, 1, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        before = network(inputs)
        assert torch.equal(function(theta, inputs), before)
        for tensor in network.state_dict().values():
            tensor.add_(1)
        assert torch.equal(function(theta, inputs), before)
    outputs = function(theta.requires_grad_(), inputs)
    assert not torch.autograd.grad(outputs.sum(), theta)[0].isnan().any()


def test_each_batch_is_loaded_once_per_call_and_told_of(monkeypatch):
    monkeypatch.setattr(curvature, "COLUMNS", 2)
    network, loss = perceptron(), OutputLoss("softmax")
    theta, function = flat_function(network, ["0.weight"])
    batches, seen = batches_for(network, loss, (4,)), []

    def load():
        for batch in batches:
            seen.append("load")
            yield batch

    operator = GGN(function, theta, loss, load, lambda: seen.append("done"))
    V = random(7, len(theta))
    for call in (
        lambda: operator.matmat(V),
        lambda: operator.quadratic(V),
        operator.gradient,
        operator.dense,
    ):
        seen.clear()
        call()
        assert seen == ["load", "done"] * 3

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        GGN(function, theta, loss, load, stop).matmat(V)


def test_columns_cut_in_pieces_are_the_same_matrix(monkeypatch):
    network, loss = perceptron(), OutputLoss("softmax")
    theta, function = flat_function(network, ["0.weight", "0.bias"])
    batches, V = batches_for(network, loss, (4,)), random(7, 25)
    want = GGN(function, theta, loss, lambda: batches).matmat(V)
    monkeypatch.setattr(curvature, "TANGENT_BYTES", 3 * 1000)
    operator = GGN(function, theta, loss, lambda: batches)
    close(operator.matmat(V), want)
    assert set(operator._columns) == {(3, 4), (1, 4), (4, 4)}
    assert min(operator._columns.values()) < max(operator._columns.values()) <= 8


def test_the_same_inputs_give_the_same_bytes():
    network = tiny_unet().float()
    theta, function = flat_function(network, [name for name, _ in network.named_parameters()])
    loss = OutputLoss("softmax")
    batches = [(random(2, 1, 8, 8, dtype=torch.float32), target_for("softmax", (2, 3, 8, 8), 1))]
    V = random(10, len(theta), dtype=torch.float32)
    first, again = (GGN(function, theta, loss, lambda: batches) for _ in range(2))
    assert torch.equal(first.matmat(V), again.matmat(V))
    assert torch.equal(first.matmat(V), first.matmat(V))
    assert torch.equal(first.quadratic(V), again.quadratic(V))
    assert torch.equal(first.gradient(), again.gradient())


def test_float32_is_close_to_float64_and_the_result_has_the_dtype_of_the_rows():
    network, loss = tiny_unet(), OutputLoss("softmax", WEIGHTS)
    names = [name for name, _ in network.named_parameters()]
    batches = [(random(2, 1, 8, 8), target_for("softmax", (2, 3, 8, 8), 1))]
    theta, function = flat_function(network, names)
    V = random(4, len(theta))
    want = GGN(function, theta, loss, lambda: batches)
    product, square, slope = want.matmat(V), want.quadratic(V), want.gradient()
    theta, function = flat_function(network.float(), names)
    operator = GGN(function, theta, loss, lambda: batches)
    for dtype in (torch.float32, F64):
        assert operator.matmat(V.to(dtype)).dtype == operator.quadratic(V.to(dtype)).dtype == dtype
        assert float((operator.matmat(V.to(dtype)) - product).norm() / product.norm()) < 2e-6
        assert float((operator.quadratic(V.to(dtype)) - square).norm() / square.norm()) < 2e-6
    assert operator.gradient().dtype == torch.float32
    assert float((operator.gradient() - slope).norm() / slope.norm()) < 2e-6


def test_one_graph_lives_at_a_time():
    network, loss = perceptron(), OutputLoss("softmax")
    theta, plain = flat_function(network, ["0.weight"])
    alive, most = [], 0

    def function(values, inputs):
        outputs = plain(values, inputs)
        if outputs.grad_fn is not None:
            alive.append(weakref.ref(outputs))
        return outputs

    def load():
        nonlocal most
        for batch in batches_for(network, loss, (4,)):
            most = max(most, sum(reference() is not None for reference in alive))
            yield batch

    operator = GGN(function, theta, loss, load)
    for call in (lambda: operator.matmat(random(3, 20)), operator.dense):
        call()
    assert alive
    assert most == 0, "the last batch's graph is still there when the next is loaded"


class Cube(torch.autograd.Function):
    """x³ that torch can only differentiate backwards."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubed(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


class Plain(nn.Module):
    def forward(self, x):
        return x * x * x


def test_an_operation_without_a_forward_derivative_falls_back():
    loss, operators = OutputLoss("softmax"), []
    for middle in (Cubed(), Plain()):
        network = perceptron()
        network[1] = middle
        batches = batches_for(network, loss, (4,))
        theta, function = flat_function(network, ["0.weight", "2.weight"])
        operators.append(GGN(function, theta, loss, lambda b=batches: b))
    V = random(9, len(theta))
    close(operators[0].matmat(V), operators[1].matmat(V))
    close(operators[0].quadratic(V), operators[1].quadratic(V))
    assert not operators[0]._forward
    assert operators[1]._forward


def test_memory_running_out_is_not_taken_for_a_missing_derivative(monkeypatch):
    network, loss = perceptron(), OutputLoss("softmax")
    theta, function = flat_function(network, ["0.weight"])
    batches = batches_for(network, loss, (4,))
    operator = GGN(function, theta, loss, lambda: batches)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(operator, "_forward_mode", full)
    with pytest.raises(torch.OutOfMemoryError):
        operator.matmat(random(2, len(theta)))
    assert operator._forward


def test_what_cannot_be_meant_is_refused():
    network, loss = perceptron(), OutputLoss("softmax", ignore_index=0)
    for names, says in ((["0.weight", "nose"], "nose"), ([], "none"), (["0.bias"] * 2, "twice")):
        with pytest.raises(ValueError, match=says):
            flat_function(network, names)
    mixed = perceptron()
    mixed[2].float()
    with pytest.raises(ValueError, match="one dtype"):
        flat_function(mixed, ["0.weight", "2.weight"])
    for layer in (nn.Dropout(), nn.BatchNorm1d(3)):
        with pytest.raises(ValueError, match="evaluation mode"):
            flat_function(nn.Sequential(nn.Linear(2, 3), layer), ["0.weight"])
    theta, function = flat_function(network, ["0.weight"])
    for batches, call in (
        ([], lambda o: o.matmat(random(1, 20))),
        ([], lambda o: o.gradient()),
        ([(random(2, 4), torch.tensor([0, 0]))], lambda o: o.quadratic(random(1, 20))),
    ):
        with pytest.raises(ValueError, match="positive weight"):
            call(GGN(function, theta, loss, lambda b=batches: b))
    operator = GGN(function, theta, loss, list)
    for rows in (random(20), random(2, 19), torch.ones(2, 20, dtype=torch.int64)):
        with pytest.raises(ValueError, match="rows"):
            operator.matmat(rows)
        with pytest.raises(ValueError, match="rows"):
            operator.quadratic(rows)
    with pytest.raises(ValueError, match="vector"):
        GGN(function, theta[None], loss, list)


def test_no_rows_give_no_rows():
    network, loss = perceptron(), OutputLoss("softmax")
    theta, function = flat_function(network, ["0.weight"])
    batches = batches_for(network, loss, (4,))
    operator = GGN(function, theta, loss, lambda: batches)
    assert operator.matmat(theta.new_zeros(0, 20)).shape == (0, 20)
    assert operator.quadratic(theta.new_zeros(0, 20)).shape == (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_processor_gives():
    network, loss = tiny_unet(), OutputLoss("softmax", WEIGHTS)
    names = [name for name, _ in network.named_parameters()]
    batches = [(random(2, 1, 8, 8), target_for("softmax", (2, 3, 8, 8), 1))]
    theta, function = flat_function(network, names)
    V = random(9, len(theta))
    want = GGN(function, theta, loss, lambda: batches)
    product, square = want.matmat(V), want.quadratic(V)
    theta, function = flat_function(network.cuda(), names)
    operator = GGN(function, theta, loss, lambda: batches)
    close(operator.matmat(V.cuda()).cpu(), product)
    close(operator.quadratic(V.cuda()).cpu(), square)
