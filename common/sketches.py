"""Sketches of many sites in one file: the rows of each stay in their wire dtype and come back in blocks of columns.

The server's step needs all rows of all sites at once, but only a few columns at a time (common/numerics/gram.py). So
each site's U (r, p) is appended as it came, float32, bfloat16 or int8 with one scale a row, and read back as float64
blocks (R, n) over the rows of all sites. Memory holds one block, however many sites, rows and parameters there are.
The file has no name in any folder: the operating system frees it however the process ends.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from common.errors import PayloadError, StorageError
from common.numerics.gram import BLOCK_VALUES, Blocks

IN_MEMORY = 32 << 20  # bytes of all sites together; beyond them the sketches go to a temporary file
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class _Site:
    """One site's rows: where they begin in the file, how many they are and how they are written."""

    who: str
    offset: int
    rows: int
    dtype: torch.dtype
    scale: Tensor | None


class SketchFile:
    """A stack of sketches, one site after the other; all have the same p, each its own rank and dtype.

    Also a context manager: it is closed at the end.
    """

    def __init__(self) -> None:
        self._sites: list[_Site] = []
        self._columns = 0
        self._end = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 closed by `close`
        self._finalizer = weakref.finalize(self, _close, self._file)

    def __enter__(self) -> SketchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ranks(self) -> list[tuple[str, int]]:
        """Sites and their numbers of rows, in the order in which they were put, which is that of the rows."""
        return [(site.who, site.rows) for site in self._sites]

    def put(self, who: str, U: Tensor, scale: Tensor | None = None) -> None:
        """Append one site's rows.

        Args:
            who: Alias of the site.
            U: Rows (r, p), r ≥ 0, p ≥ 1, float32, bfloat16 or int8; finite, which is checked where payloads come in.
            scale: float32 (r,), finite and ≥ 0, exactly for int8: row i is scale[i] · U[i].

        Raises:
            PayloadError: A dtype, scale or p that does not fit; nothing was appended.
            StorageError: The volume of the temporary files is full or cannot be written; nothing was appended.
        """
        self._check(who, U, scale)
        U = U.detach().cpu().contiguous()
        size = U.numel() * U.element_size()
        try:
            if self._end + size > IN_MEMORY:
                self._file.rollover()  # before the write: it would hold all of it in memory first
            if size:
                self._file.seek(self._end)  # what a failed call left behind is written over
                self._file.write(_bytes_of(U))
                self._file.flush()
        except OSError as error:
            raise _no_storage("written", error) from error
        kept = None if scale is None else scale.detach().cpu().clone()
        self._sites.append(_Site(who, self._end, len(U), U.dtype, kept))
        self._columns, self._end = U.shape[1], self._end + size

    def blocks(self, size: int | None = None) -> Blocks:
        """Return the stacked rows V (R, p) of the sites put so far, to be read in blocks any number of times.

        Args:
            size: Columns in a block; by default as many as fit 64 MiB in float64.

        Returns:
            A function; each call yields adjoining slices of 0..p with V[:, slice] (R, n) in float64. The tensor is
            overwritten when the next block is asked for. While they are read, StorageError is raised where the
            temporary file cannot be read back.

        Raises:
            ValueError: No site was put, or a size below 1.
        """
        if not self._sites:
            raise ValueError("There is no sketch to read; put at least one site's.")
        if size is not None and size < 1:
            raise ValueError(f"A block must have at least one column, got {size}.")
        sites, columns = list(self._sites), self._columns
        rows = sum(site.rows for site in sites)
        width = min(columns, size or max(1, BLOCK_VALUES // max(1, rows)))

        def read() -> Iterator[tuple[slice, Tensor]]:
            # both are used again for every block: fresh pages would cost more than reading and converting
            values = torch.empty(rows * width, dtype=torch.float64)
            wire = torch.empty(4 * width, dtype=torch.uint8)
            for start in range(0, columns, width):
                where = slice(start, min(start + width, columns))
                count = where.stop - start
                block = values[: rows * count].view(rows, count)
                self._fill(block, wire, sites, start)
                yield where, block

        return read

    def close(self) -> None:
        """Free memory and file; done by itself when the sketches are no longer used."""
        self._finalizer()

    def _fill(self, block: Tensor, wire: Tensor, sites: list[_Site], start: int) -> None:
        """Read the columns from `start` on into a float64 block (R, n), row by row through `wire`."""
        count, at = block.shape[1], 0
        for site in sites:
            width = site.dtype.itemsize
            staged = wire[: count * width]
            view, typed = staged.numpy().data, staged.view(site.dtype)
            for row in range(site.rows):
                try:
                    self._file.seek(site.offset + (row * self._columns + start) * width)
                    got = self._file.readinto(view)
                    if got != len(view):
                        raise OSError(f"{got} of {len(view)} bytes")
                except OSError as error:
                    raise _no_storage("read back", error) from error
                block[at].copy_(typed)
                if site.scale is not None:
                    block[at].mul_(float(site.scale[row]))
                at += 1

    def _check(self, who: str, U: Tensor, scale: Tensor | None) -> None:
        def refuse(expected: str, got: str) -> PayloadError:
            return PayloadError(
                f"{who}: the Fisher sketch must have {expected}, got {got}. Let all sites and the server run the same "
                "version with the same model.",
                site=who,
            )

        if U.ndim != 2 or U.shape[1] < 1:
            raise refuse("rows of one value for each parameter", f"the shape {tuple(U.shape)}")
        if U.dtype not in DTYPES:
            raise refuse("the dtype float32, bfloat16 or int8", str(U.dtype))
        if self._sites and U.shape[1] != self._columns:
            raise refuse(f"{self._columns} columns as the other sites'", str(U.shape[1]))
        if (scale is None) is (U.dtype == torch.int8):
            raise refuse(
                "a scale exactly if it is int8", f"{'none' if scale is None else 'one'} for {U.dtype}"
            )
        if scale is None:
            return
        if scale.dtype != torch.float32 or scale.shape != (len(U),):
            raise refuse(f"{len(U)} scales, torch.float32", f"{tuple(scale.shape)}, {scale.dtype}")
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise refuse("finite scales of at least 0", "others")


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes in its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _close(file: IO[bytes] | tempfile.SpooledTemporaryFile[bytes]) -> None:
    with contextlib.suppress(
        OSError
    ):  # a full volume was told when it was written; nothing is needed any more
        file.close()


def _no_storage(verb: str, error: OSError) -> StorageError:
    return StorageError(
        f"The sites' sketches could not be {verb} for the aggregation (error {error.errno}). "
        "Free space where temporary files go (TMPDIR) and start the run again; it continues from its checkpoint.",
        detail=str(error),
    )
