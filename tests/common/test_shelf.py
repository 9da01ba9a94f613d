"""The shelf gives back every bit, in memory and in its file, and says clearly what it cannot do."""

import errno
import warnings

import pytest
import torch

import common.shelf
from common.errors import PayloadError, StorageError
from common.shelf import Shelf
from tests.common.strategies import bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def site_tensors(seed):
    numbers = torch.Generator().manual_seed(seed)
    tensors = {
        str(dtype): torch.randint(0, 2, (2, 3), generator=numbers).to(dtype)
        if dtype is torch.bool
        else (50 * torch.rand(2, 3, generator=numbers)).to(dtype)
        for dtype in DTYPES
    }
    tensors["scalar"] = torch.tensor(seed)
    tensors["empty"] = torch.empty(0, 4)
    tensors["turned"] = torch.rand(3, 5, generator=numbers).T
    tensors["grad"] = torch.rand(2, generator=numbers).requires_grad_()
    return tensors


@pytest.mark.parametrize("in_memory", [1, 32 << 20])
def test_a_shelf_gives_back_every_bit_in_the_order_of_putting(monkeypatch, in_memory):
    monkeypatch.setattr(common.shelf, "IN_MEMORY", in_memory)
    shelf = Shelf("model")
    sites = [site_tensors(seed) for seed in (4, 1, 7)]
    for tensors in sites:
        shelf.put(dict(reversed(tensors.items())) if tensors is sites[1] else tensors)
    assert (len(shelf), shelf.names()) == (3, list(sites[0]))
    for name in reversed(shelf.names()):
        want = torch.stack([tensors[name] for tensors in sites])
        assert bits(shelf.stack(name)) == bits(want)
    shelf.close()
    shelf.close()


def test_a_shelf_that_is_dropped_leaves_no_open_file(monkeypatch):
    monkeypatch.setattr(common.shelf, "IN_MEMORY", 1)
    shelf = Shelf("model")
    shelf.put({"w": torch.ones(100)})
    file = shelf._file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del shelf
    assert file.closed


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"w": torch.ones(2)}, r"missing \['v'\]"),
        ({"w": torch.ones(2), "v": torch.ones(1), "x": torch.ones(1)}, r"unexpected \['x'\]"),
        ({"w": torch.ones(3), "v": torch.ones(1)}, r"\(3,\).*\(2,\)"),
        ({"w": torch.ones(2), "v": torch.ones(1).double()}, "float64.*float32"),
    ],
)
def test_a_site_with_other_tensors_is_refused_and_the_shelf_goes_on(other, said):
    shelf = Shelf("sketch")
    shelf.put({"w": torch.ones(2), "v": torch.ones(1)}, who="alpha")
    with pytest.raises(PayloadError, match=f"beta: 'sketch'.*{said}") as caught:
        shelf.put(other, who="beta")
    assert caught.value.site == "beta"
    shelf.put({"w": 3 * torch.ones(2), "v": torch.ones(1)}, who="gamma")
    assert shelf.stack("w").tolist() == [[1, 1], [3, 3]]


def test_a_full_volume_is_a_clear_error_and_its_half_written_site_is_written_over():
    shelf = Shelf("model")
    shelf.put({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    real, calls = shelf._file.write, []

    def full(data):
        calls.append(data)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")
        return real(data)

    shelf._file.write = full
    with pytest.raises(StorageError, match="TMPDIR") as caught:
        shelf.put({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    assert "secret" not in str(caught.value)
    assert "secret" in caught.value.detail
    assert len(shelf) == 1
    shelf.put({"a": torch.tensor([5.0]), "b": torch.tensor([6.0])})
    assert (shelf.stack("a").tolist(), shelf.stack("b").tolist()) == ([[1], [5]], [[2], [6]])


def test_a_file_that_lost_its_end_is_refused():
    shelf = Shelf("model")
    shelf.put({"w": torch.ones(4)})
    shelf._file.truncate(8)
    with pytest.raises(StorageError, match="read back"):
        shelf.stack("w")
