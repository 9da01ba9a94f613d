"""The CIFAR-10 experiment: split, augmentation, network and Gauss-Newton factors against slow independent forms."""

import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from common.numerics.rng import generator
from experiments.fipa import cifar, cifar_summary
from experiments.fipa import cifar_data as data
from experiments.fipa import cifar_model as model


@pytest.fixture(scope="module")
def images():
    source = np.random.default_rng(0)
    rgb = source.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    return rgb, data.pack(rgb, source.integers(0, 10, 12).astype(np.uint8))


def test_packed_pixels_come_back_normalised(images):
    rgb, packed = images
    got = data.to_float(packed.pixels)
    want = (rgb / 255.0 - np.array(data.MEAN)) / np.array(data.STD)
    np.testing.assert_allclose(got.permute(0, 2, 3, 1).numpy(), want, rtol=1e-5, atol=1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_is_a_crop_of_the_edge_padded_image_and_a_flip(images):
    rgb, packed = images
    got = data.augment(packed.pixels, generator("t")).numpy().view(np.uint8).reshape(12, 32, 32, 4)[..., :3]
    padded = np.pad(rgb, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    seen = set()
    for i in range(12):
        hits = [
            (dy, dx, flip)
            for dy in range(9)
            for dx in range(9)
            for flip in (False, True)
            if np.array_equal(got[i], padded[i, dy : dy + 32, dx : dx + 32][:, :: -1 if flip else 1])
        ]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 6
    assert {flip for _, _, flip in seen} == {False, True}


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1e4])
def test_split_is_balanced_and_disjoint(alpha):
    labels = np.repeat(np.arange(10), 100)
    parts = data.dirichlet_split(labels, 20, alpha, seed=3)
    assert [len(part) for part in parts] == [50] * 20
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    again = data.dirichlet_split(labels, 20, alpha, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    # The first ten clients still choose freely: few classes at a small alpha, all of them at a large one.
    largest = np.mean([np.bincount(labels[part], minlength=10).max() / 50 for part in parts[:10]])
    assert {0.05: largest > 0.7, 0.3: 0.35 < largest < 0.9, 1e4: largest < 0.3}[alpha]


def test_split_refuses_an_uneven_share():
    with pytest.raises(ValueError, match="shared out evenly to 3"):
        data.dirichlet_split(np.zeros(10, dtype=np.int64), 3, 1.0, 0)


def test_one_client_of_each_residue_class():
    source = generator("clients")
    drawn = [data.select_clients(100, 5, source) for _ in range(200)]
    assert all([i % 5 for i in ids] == [0, 1, 2, 3, 4] for ids in drawn)
    assert len({ids[2] for ids in drawn}) == 20


@pytest.mark.parametrize(("name", "size"), [("cnn-8k", 8748), ("cnn-23k", 25706)])
def test_sizes_and_logits_against_a_torch_module(name, size, images):
    network = model.NETWORKS[name]
    assert network.size == size
    theta = network.initial(generator("init"))
    conv1, conv2, fc1, fc2 = network.split(theta)
    assert conv2.std() == pytest.approx(1 / math.sqrt(9 * network.first), rel=0.15)
    reference = torch.nn.Sequential(
        torch.nn.Conv2d(3, network.first, 3, padding="same", bias=False),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(network.first, network.second, 3, padding="same", bias=False),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * network.second, network.hidden, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(network.hidden, 10, bias=False),
    )
    # torch flattens channel first, we flatten it last.
    columns = fc1.view(-1, 8, 8, network.second).permute(0, 3, 1, 2).flatten(1)
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), (conv1, conv2, columns, fc2), strict=True):
            parameter.copy_(value)
        x = data.to_float(images[1].pixels)
        torch.testing.assert_close(network.logits([conv1, conv2, fc1, fc2], x), reference(x))


def test_one_full_batch_epoch_is_one_gradient_step(images):
    network, packed = model.NETWORKS["cnn-8k"], images[1]
    theta = network.initial(generator("init"))
    got = model.train(network, theta, packed, 0.1, generator("o"), epochs=1, batch=12, decay=0.01)
    source = generator("o")
    order = torch.randperm(12, generator=source)
    x, y = data.to_float(data.augment(packed.pixels[order], source)), packed.labels[order]
    start = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network.logits(network.split(start), x), y), start)
    torch.testing.assert_close(got, theta - 0.1 * (gradient + 0.01 * theta), rtol=1e-4, atol=1e-6)
    assert not torch.equal(got, theta)


def test_accuracy_counts_right_answers(images):
    network, packed = model.NETWORKS["cnn-8k"], images[1]
    theta = network.initial(generator("init"))
    guess = network.logits(network.split(theta), data.to_float(packed.pixels)).argmax(1)
    for wrong in (0, 5):
        labels = torch.where(torch.arange(12) < wrong, (guess + 1) % 10, guess)
        assert model.accuracy(network, theta, data.Images(packed.pixels, labels), 5) == (12 - wrong) / 12


@pytest.mark.parametrize("name", ["cnn-8k", "cnn-23k"])
def test_factored_ggn_against_the_jacobian(name, images):
    network = model.NETWORKS[name]
    theta = network.initial(generator("init")).double()
    x = data.to_float(images[1].pixels[:5]).double().contiguous()
    J = torch.func.jacrev(lambda t: network.logits(network.split(t), x))(theta)
    p = F.softmax(network.logits(network.split(theta), x), 1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    V = torch.randn(3, network.size, generator=generator("V"), dtype=torch.float64)
    SJ = S @ J
    want = (J.flatten(0, 1).mT @ (SJ.flatten(0, 1) @ V.mT)).mT / 5
    operator = model.FactoredGGN(network, theta, x, chunk=2)
    torch.testing.assert_close(operator.matmat(V), want, rtol=1e-9, atol=1e-12)
    assert operator.trace() == pytest.approx(float((J * SJ).sum()) / 5, rel=1e-10)


@pytest.fixture
def federation(images):
    """Ten clients' worth of ids on four images each, a real network, two selected clients' sketches are full."""
    packed = images[1]
    clients = [packed.pick(np.arange(i % 3, i % 3 + 4)) for i in range(cifar.CLIENTS)]
    settings = cifar.Settings(warmup=10, rounds=2, rank=36, oversampling=10, iterations=3)
    return cifar.Federation(cifar.Case("cnn-8k", 0.3, 1), settings, clients, packed)


def test_rate_follows_the_published_schedule_from_the_comparison_on():
    settings = cifar.Settings(warmup=200)
    rates = [cifar.learning_rate(k, settings) for k in (0, 100, 200, 201)]
    assert rates == pytest.approx([0.1, 0.1 * 0.998**500, 0.1 * 0.998**1000, 0.1 * 0.998**1001])


@pytest.mark.slow  # dense Jacobians of a real network
def test_fipa_step_against_the_dense_solution(federation):
    network = federation.network
    theta = network.initial(generator("dense"))
    updates = 0.01 * torch.randn(cifar.PER_ROUND, network.size, generator=generator("d"))
    # 4 images x 9 free logits: every H_m has rank 36 at most, so sketches of rank 36 lose nothing.
    step, figures = cifar.fipa_step(federation, theta, updates, 10)
    assert figures["energy"] == pytest.approx(1.0, abs=1e-3)
    F_rows, b = [], torch.zeros(network.size, dtype=torch.float64)
    for client, update in zip(federation.selected(10), updates.double(), strict=True):
        x = data.to_float(federation.clients[client].pixels).double().contiguous()
        operator = model.FactoredGGN(network, theta.double(), x)
        b += operator.matmat(update[None])[0] / cifar.PER_ROUND
        J = torch.func.jacrev(lambda t, x=x: network.logits(network.split(t), x))(theta.double())
        p = F.softmax(network.logits(network.split(theta.double()), x), 1)
        R = p.sqrt()[:, :, None] * (torch.eye(10) - p[:, None, :])
        F_rows.append((R @ J).flatten(0, 1) / math.sqrt(4 * cifar.PER_ROUND))
    A = torch.cat(F_rows)  # H = A^T A; Woodbury: (H + beta)^{-1} b = (b - A^T (A A^T + beta)^{-1} A b) / beta
    inner = torch.linalg.solve(A @ A.T + cifar.BETA * torch.eye(len(A), dtype=A.dtype), A @ b)
    want = (b - A.T @ inner) / cifar.BETA
    assert (step.double() - want).norm() < 2e-3 * want.norm()


def test_arms_differ_as_their_names_say(federation):
    theta = federation.network.initial(generator("arms"))
    one = {
        arm: cifar.refine(federation, theta, cifar.ARMS[arm])
        for arm in ("fedavg", "fedavg_damped", "fedavg_low")
    }
    step = {arm: record["step_and_mean_update_norm"][0] for arm, record in one.items()}
    assert step["fedavg"][0] == pytest.approx(step["fedavg"][1], rel=1e-6)
    assert step["fedavg_damped"][0] == pytest.approx(0.25 * step["fedavg"][0], rel=1e-5)
    client = federation.selected(10)[2]
    source = generator("cifar local", 1, 10, client)
    rate = 0.1 * 0.1 * 0.998**1000
    alone = model.train(federation.network, theta, federation.clients[client], rate, source) - theta
    torch.testing.assert_close(federation.updates(theta, 10, cifar.ARMS["fedavg_low"].rate)[2], alone)
    assert step["fedavg_low"][0] == pytest.approx(float(federation.updates(theta, 10, 0.1).mean(0).norm()))
    assert len(one["fedavg"]["accuracy"]) == 2


def test_jobs_put_small_models_first_and_name_every_job_once():
    jobs = list(cifar.job_list())
    names = [case.name(arm) for case, arm in jobs]
    assert len(set(names)) == len(names) == 2 * 2 * 3 * len(cifar.ARMS)
    models = [case.model for case, _ in jobs]
    assert models[:32] == ["cnn-8k"] * 32
    assert models.count("cnn-23k") == 36
    assert jobs[0] == (cifar.Case("cnn-8k", 0.05, 0), "fedavg")


def test_a_folder_of_other_settings_is_refused(tmp_path):
    cifar.keep_settings(cifar.Settings(), tmp_path)
    cifar.keep_settings(cifar.Settings(), tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        cifar.keep_settings(cifar.Settings(rank=3), tmp_path)


def test_summary_pairs_by_seed(tmp_path):
    def job(arm, seed, accuracy):
        record = {"model": "cnn-8k", "alpha": 0.05, "seed": seed, "arm": arm, "start": 0.2, "seconds": 1.0}
        record |= {"accuracy": accuracy, "sketch": [{"energy": 0.9}] if arm == "fipa" else []}
        (tmp_path / f"cnn-8k_{arm}_{seed}.json").write_text(json.dumps(record))

    job("fedavg", 0, [0.30, 0.20])
    job("fedavg", 1, [0.10, 0.40])
    job("fipa", 1, [0.45, 0.35])
    (tmp_path / "cnn-8k_warmup.json").write_text(json.dumps({"arm": "warmup"}))
    rows = cifar_summary.collect(tmp_path)
    assert [(row.arm, row.seeds) for row in rows] == [("fedavg", (0, 1)), ("fipa", (1,))]
    most, mean = cifar_summary.paired_gain(rows, rows[1], "fedavg")
    assert most == pytest.approx([5.0])
    assert mean == pytest.approx([15.0])
    assert cifar_summary.paired_gain(rows, rows[1], "fedavg_low") is None
    console = Console(file=io.StringIO(), width=200)
    cifar_summary.summarise(tmp_path, console)
    assert "35.00 ± 7.07" in console.file.getvalue()
    assert "| cnn-8k | 0.05 | code | FedAvg | 1 | +5.00 | +15.00 |" in (tmp_path / "cifar.md").read_text()
    assert (tmp_path / "cifar.png").stat().st_size > 10_000
