"""A shelf: one payload of many sites, kept beside the memory until a reduction needs all of them at once.

A mean can be summed as replies come; a median cannot. So the sites' tensors are appended, one site after the other, to
one temporary file with a fixed layout, and read back tensor by tensor across the sites. Memory then holds one tensor
times the number of sites, not one model times the number of sites. The file has no name in any folder: the operating
system frees it however the process ends.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import PayloadError, StorageError

IN_MEMORY = 32 << 20  # bytes of all sites together; beyond them the shelf goes to a temporary file


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies within a site's part of the file."""

    offset: int
    size: int
    shape: torch.Size
    dtype: torch.dtype


class Shelf:
    """Tensors of one payload from many sites; all sites have the same names, shapes and dtypes.

    Args:
        what: Name of the payload, for sentences.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._slots: dict[str, _Slot] = {}
        self._stride = 0
        self._sites = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 closed by `close`
        self._finalizer = weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        """Return the number of sites."""
        return self._sites

    def names(self) -> list[str]:
        """Return the names of the tensors, in the first site's order."""
        return list(self._slots)

    def put(self, tensors: Mapping[str, Tensor], *, who: str = "") -> None:
        """Append one site's tensors.

        Args:
            tensors: The site's tensors, on the CPU; the first site's names, shapes and dtypes hold for all.
            who: Alias of the site, for the sentence.

        Raises:
            PayloadError: Other names, shapes or dtypes than the first site's; nothing was appended.
            StorageError: The volume of the temporary files is full or cannot be written.
        """
        if self._sites == 0:
            self._lay_out(tensors)
        else:
            self._compare(tensors, who)
        try:
            self._file.seek(self._sites * self._stride)  # what a failed call left behind is written over
            for name in self._slots:
                self._file.write(_bytes_of(tensors[name]))
        except OSError as error:
            raise _no_storage("written", error) from error
        self._sites += 1

    def stack(self, name: str) -> Tensor:
        """Return one tensor of all sites, shape (sites, ...), in the order in which they were put.

        Args:
            name: One of `names()`.

        Raises:
            StorageError: The temporary file cannot be read back.
        """
        slot = self._slots[name]
        result = torch.empty((self._sites, *slot.shape), dtype=slot.dtype)
        if not slot.size:
            return result
        view = _bytes_of(result)
        try:
            for site in range(self._sites):
                self._file.seek(site * self._stride + slot.offset)
                got = self._file.readinto(view[site * slot.size : (site + 1) * slot.size])
                if got != slot.size:
                    raise OSError(f"{got} of {slot.size} bytes")
        except OSError as error:
            raise _no_storage("read back", error) from error
        return result

    def close(self) -> None:
        """Free memory and file; done by itself when the shelf is no longer used."""
        self._finalizer()

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        self._slots, offset = {}, 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            self._slots[name] = _Slot(offset, size, tensor.shape, tensor.dtype)
            offset += size
        self._stride = offset

    def _compare(self, tensors: Mapping[str, Tensor], who: str) -> None:
        place = f"{who}: '{self.what}'" if who else f"'{self.what}'"
        if tensors.keys() != self._slots.keys():
            missing = sorted(self._slots.keys() - tensors.keys())[:3]
            extra = sorted(tensors.keys() - self._slots.keys())[:3]
            raise PayloadError(
                f"{place} has other tensors than the other sites': missing {missing}, unexpected {extra}. "
                "A median or trimmed mean needs the same from every site.",
                site=who,
            )
        for name, slot in self._slots.items():
            got = tensors[name]
            if got.shape != slot.shape or got.dtype != slot.dtype:
                raise PayloadError(
                    f"{place} tensor '{name}' is {got.dtype} of shape {tuple(got.shape)}, the other sites' is "
                    f"{slot.dtype} of shape {tuple(slot.shape)}. A median or trimmed mean needs the same from "
                    "every site.",
                    site=who,
                )


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in its own memory where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _no_storage(verb: str, error: OSError) -> StorageError:
    return StorageError(
        f"The sites' replies could not be {verb} for the median or trimmed mean (error {error.errno}). "
        "Free space where temporary files go (TMPDIR) and start the run again; it continues from its checkpoint.",
        detail=str(error),
    )
