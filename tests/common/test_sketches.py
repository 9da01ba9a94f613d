"""Sketches in a file: every dtype comes back exactly, in blocks, and what does not fit or cannot be stored is told."""

import errno
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common.sketches
from common.errors import PayloadError, StorageError
from common.numerics.gram import combine, gram, solve
from common.numerics.quantise import pack
from common.sketches import SketchFile
from tests.common.strategies import bits

CODECS = ["float32", "bf16", "int8"]


def packed(rows, size, how, seed):
    return pack(torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)), how)


def values(tensors):
    """What a packed sketch means, row by row in Python's float64."""
    scale = tensors["scale"].tolist() if "scale" in tensors else [None] * len(tensors["U"])
    rows = [
        [code if s is None else code * s for code in row]
        for row, s in zip(tensors["U"].tolist(), scale, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(tensors["U"].shape)


def joined(blocks):
    """Return all of V, copied block by block, after checking that the slices adjoin."""
    end, parts = 0, []
    for where, block in blocks():
        assert where == slice(end, end + block.shape[1])
        assert block.dtype == torch.float64
        end, parts = where.stop, [*parts, block.clone()]
    return torch.cat(parts, 1)


def fill(file, seeds, size, ranks=(3, 0, 1, 4)):
    """Put sites of all dtypes and some ranks; return what V must be."""
    want = []
    for seed, rank in zip(seeds, ranks, strict=True):
        tensors = packed(rank, size, CODECS[seed % 3], seed)
        file.put(f"site-{seed}", **tensors)
        want.append(values(tensors))
    return torch.cat(want)


@pytest.mark.parametrize("in_memory", [0, 1, 700, 32 << 20])
def test_every_dtype_comes_back_exactly_in_blocks_of_any_size(monkeypatch, in_memory):
    monkeypatch.setattr(common.sketches, "IN_MEMORY", in_memory)
    with SketchFile() as file:
        want = fill(file, (0, 1, 2, 4), 53)
        assert file.ranks == [("site-0", 3), ("site-1", 0), ("site-2", 1), ("site-4", 4)]
        assert file._file._rolled is (in_memory < 1000)
        for size in (1, 7, 52, 53, 54, 10**9, None):
            assert bits(joined(file.blocks(size))) == bits(want)
        blocks = file.blocks(5)
        assert bits(joined(blocks)) == bits(joined(blocks))


def test_the_default_block_holds_a_bounded_number_of_values(monkeypatch):
    monkeypatch.setattr(common.sketches, "BLOCK_VALUES", 40)
    file = SketchFile()
    want = fill(file, (3, 1, 2, 5), 33)
    assert {block.shape[1] for _, block in file.blocks()()} == {5, 33 % 5}
    assert bits(joined(file.blocks())) == bits(want)


def test_turned_and_differentiable_rows_are_stored_as_they_read():
    U = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).T.requires_grad_()
    file = SketchFile()
    file.put("alpha", U)
    V = joined(file.blocks(4))
    assert bits(V) == bits(U.detach().double().contiguous())
    assert not V.requires_grad


def test_a_scale_changed_later_changes_nothing():
    tensors, file = packed(2, 5, "int8", 1), SketchFile()
    file.put("alpha", **tensors)
    want = values(tensors)
    tensors["scale"].zero_()
    assert bits(joined(file.blocks())) == bits(want)


def test_sites_put_later_are_not_in_blocks_made_before():
    file = SketchFile()
    first = fill(file, (0, 1, 2, 4), 9)
    before = file.blocks(2)
    reading = before()
    next(reading)
    fill(file, (6, 7, 8, 9), 9)
    assert [where for where, _ in reading] == [slice(2, 4), slice(4, 6), slice(6, 8), slice(8, 9)]
    assert bits(joined(before)) == bits(first)
    assert len(joined(file.blocks())) == 16


@settings(deadline=None, max_examples=20)
@given(
    size=st.integers(1, 20),
    sites=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(CODECS)), min_size=1, max_size=5),
    width=st.integers(1, 21),
)
def test_any_sites_come_back_in_the_order_of_putting(size, sites, width):
    file, want = SketchFile(), []
    for number, (rank, how) in enumerate(sites):
        tensors = packed(rank, size, how, number)
        file.put(str(number), **tensors)
        want.append(values(tensors))
    assert file.ranks == [(str(number), rank) for number, (rank, _) in enumerate(sites)]
    assert bits(joined(file.blocks(width))) == bits(torch.cat(want))


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_servers_step_from_a_file_is_the_dense_one(monkeypatch, beta):
    monkeypatch.setattr(common.sketches, "IN_MEMORY", 1)
    rng = np.random.default_rng(1)
    with SketchFile() as file:
        V = fill(file, (0, 1, 2, 4), 31).numpy()
        sigma, a = rng.uniform(0.2, 1, 8), rng.standard_normal(8)
        blocks = file.blocks(6)
        c = solve(gram(blocks)[0], torch.from_numpy(sigma), torch.from_numpy(a), beta=beta)
        got = torch.cat([part for _, part in combine(blocks, c)]).numpy()
    H, b = V.T @ np.diag(sigma) @ V, V.T @ (sigma * a)
    inverse = np.linalg.inv(H + beta * np.eye(31)) if beta else np.linalg.pinv(H, rcond=1e-10, hermitian=True)
    assert np.abs(got - inverse @ b).max() < 1e-10 * np.abs(inverse @ b).max()


def test_sites_without_any_row_give_a_step_of_zero():
    file = SketchFile()
    file.put("alpha", torch.empty(0, 4))
    file.put("beta", torch.empty(0, 4, dtype=torch.int8), torch.empty(0))
    G, _ = gram(file.blocks())
    assert G.shape == (0, 0)
    nothing = solve(G, torch.empty(0), torch.empty(0))
    assert torch.cat([part for _, part in combine(file.blocks(), nothing)]).tolist() == [0, 0, 0, 0]


ROWS, CODES = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("U", "scale", "said"),
    [
        (torch.ones(2, 4), None, "3 columns as the other sites', got 4"),
        (torch.empty(0, 2), None, "3 columns"),
        (torch.ones(3), None, r"rows.*got the shape \(3,\)"),
        (torch.empty(2, 0), None, r"got the shape \(2, 0\)"),
        (ROWS.double(), None, "float32, bfloat16 or int8, got torch.float64"),
        (ROWS.half(), None, "got torch.float16"),
        (ROWS, torch.ones(2), "scale exactly if it is int8, got one for torch.float32"),
        (CODES, None, "got none for torch.int8"),
        (CODES, torch.ones(3), r"2 scales, torch.float32, got \(3,\)"),
        (CODES, torch.ones(2).double(), "torch.float64"),
        (CODES, torch.tensor([1.0, -1.0]), "at least 0"),
        (CODES, torch.tensor([1.0, torch.inf]), "finite"),
    ],
)
def test_a_sketch_that_does_not_fit_is_refused_by_its_sites_name_and_the_file_goes_on(U, scale, said):
    file = SketchFile()
    file.put("alpha", ROWS)
    with pytest.raises(PayloadError, match=f"^beta: .*{said}") as caught:
        file.put("beta", U, scale)
    assert caught.value.site == "beta"
    file.put("gamma", CODES, torch.tensor([2.0, 3.0]))
    assert file.ranks == [("alpha", 2), ("gamma", 2)]
    assert joined(file.blocks()).tolist() == [[1] * 3, [1] * 3, [2] * 3, [3] * 3]


def test_nothing_to_read_and_blocks_without_columns_are_refused():
    file = SketchFile()
    with pytest.raises(ValueError, match="at least one site"):
        file.blocks()
    file.put("alpha", ROWS)
    with pytest.raises(ValueError, match="at least one column, got 0"):
        file.blocks(0)


def test_a_full_volume_is_a_clear_error_and_its_half_written_site_is_written_over():
    file = SketchFile()
    file.put("alpha", ROWS)
    real = file._file.write

    def full(data):
        real(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")

    file._file.write = full
    with pytest.raises(StorageError, match=f"error {errno.ENOSPC}.*TMPDIR") as caught:
        file.put("beta", 5 * ROWS)
    assert "secret" not in str(caught.value)
    assert "secret" in caught.value.detail
    assert file.ranks == [("alpha", 2)]
    file._file.write = real
    file.put("gamma", 7 * ROWS)
    assert joined(file.blocks()).tolist() == [[1] * 3, [1] * 3, [7] * 3, [7] * 3]


def test_the_system_itself_saying_that_the_volume_is_full_is_heard_before_the_put_returns(monkeypatch):
    """/dev/full takes what is buffered and fails when it is flushed."""
    file = SketchFile()
    with open("/dev/full", "r+b") as full:
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(StorageError, match=f"error {errno.ENOSPC}"):
            file.put("alpha", ROWS)
        common.sketches._close(full)  # what is left in the buffer fails again, and nobody needs it
    assert file.ranks == []


def test_no_place_for_temporary_files_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(common.sketches, "IN_MEMORY", 1)
    monkeypatch.setattr(common.sketches.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="TMPDIR") as caught:
        SketchFile().put("alpha", ROWS)
    assert "gone" not in str(caught.value)
    assert "gone" in caught.value.detail


def test_a_file_that_lost_its_end_is_refused():
    file = SketchFile()
    file.put("alpha", ROWS)
    file._file.truncate(13)
    with pytest.raises(StorageError, match="read back"):
        joined(file.blocks(2))


def test_sketches_that_are_dropped_or_closed_leave_no_open_file(monkeypatch):
    monkeypatch.setattr(common.sketches, "IN_MEMORY", 1)
    dropped, closed = SketchFile(), SketchFile()
    dropped.put("alpha", ROWS)
    closed.put("alpha", ROWS)
    files = [dropped._file, closed._file]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del dropped
        assert [file.closed for file in files] == [True, False]
        closed.close()
        closed.close()
    assert files[1].closed
