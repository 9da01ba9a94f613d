"""Reading one image, whatever its format, into channels-first voxels with their geometry.

The reader is chosen by the format and nothing else is tried: a file that its own reader refuses is refused.
MONAI's readers do the decoding; here is what they leave open: which files of a folder make one DICOM series,
in which order, and with which gaps; what a NRRD space is called; what a palette or a one-bit picture means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, NrrdReader, PILReader
from monai.transforms import EnsureChannelFirst
from monai.utils import convert_to_tensor
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray
from torch import Tensor

from common.dataset_json import PICTURE_SUFFIXES
from common.errors import DataError


class Format(StrEnum):
    """The image formats that a data folder may hold."""

    NIFTI = "NIfTI"
    NRRD = "NRRD"
    META = "MetaImage"
    DICOM = "DICOM"
    PICTURE = "picture"


_SUFFIXES = {
    ".nii": Format.NIFTI,
    ".nii.gz": Format.NIFTI,
    ".nrrd": Format.NRRD,
    ".mha": Format.META,
    ".mhd": Format.META,
    ".dcm": Format.DICOM,
    **dict.fromkeys(PICTURE_SUFFIXES, Format.PICTURE),
}
_LPS = {None, "left-posterior-superior", "lps"}
_RAS = {"right-anterior-superior", "ras"}
# Slices may lie a little unevenly (table feed, rounding); from half a slice on, one is missing.
_MAX_GAP = 1.5


class Unreadable(Exception):
    """What is wrong with a file, as a clause that may be shown; always turned into a `DataError`."""


@dataclass
class Volume:
    """One decoded image.

    Attributes:
        data: (C, *S) in the file's own dtype (scaled values are float).
        affine: float64 (4, 4), voxel index to millimetres, RAS; diagonal for 2D.
        spacing: Millimetres between voxels by axis (1 for pictures).
        orientation: Axis codes ("RAS"), "" for 2D.
        dtype: Name of the decoded dtype.
        format: Where it came from.
    """

    data: Tensor
    affine: NDArray[np.float64]
    spacing: tuple[float, ...]
    orientation: str
    dtype: str
    format: Format

    @property
    def size(self) -> tuple[int, ...]:
        """Return the voxels by axis."""
        return tuple(self.data.shape[1:])


def detect(path: Path) -> Format | None:
    """Return a path's format by its suffix; a folder is a DICOM series; else DICOM's own mark counts."""
    if path.is_dir():
        return Format.DICOM
    name = path.name.lower()
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    try:
        with path.open("rb") as stream:
            return Format.DICOM if stream.read(132)[128:] == b"DICM" else None
    except OSError:
        return None


def known_formats() -> str:
    """Return the accepted forms, for a sentence."""
    return f"{', '.join(_SUFFIXES)} or a folder of DICOM files"


def read_image(
    paths: Sequence[Path], *, site: str, alias: str, dims: int, channels: int, what: str = "image"
) -> Volume:
    """Read an image from one file, or from one file per channel.

    Args:
        paths: One file for all channels, or one per channel, on the same grid.
        site: Site alias, for the sentence.
        alias: Case alias, for the sentence.
        dims: 2 or 3 axes.
        channels: How many channels are expected; a colour file of three equal channels counts as one.
        what: "image" or "label".

    Raises:
        DataError: Unknown format, unreadable file, another number of axes, or channels that lie on different
            grids.
    """
    volumes = [_read_one(path, site, alias, dims, channels, what) for path in paths]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for number, other in enumerate(volumes[1:], 2):
        if other.data.shape[0] != 1 or first.data.shape[0] != 1:
            raise _error(
                site, alias, what, "gives one file per channel, so each file must hold one channel", paths[0]
            )
        if other.size != first.size or not np.allclose(other.affine, first.affine, atol=1e-3):
            raise _error(
                site,
                alias,
                what,
                f"has file {number} on another grid than file 1 "
                f"({_sizes(other.size)} and {_sizes(first.size)} voxels); "
                "all channels of a case must share size and geometry: register and resample them first",
                paths[number - 1],
            )
    first.data = torch.cat([volume.data.to(torch.float32) for volume in volumes])
    first.dtype = ", ".join(sorted({volume.dtype for volume in volumes}))
    return first


def _read_one(path: Path, site: str, alias: str, dims: int, channels: int, what: str) -> Volume:
    kind = detect(path)
    if kind is None:
        raise _error(site, alias, what, f"has an unknown format; expected {known_formats()}", path)
    try:
        array, meta = _decode(_reader(kind, path, what), path)
        return _volume(array, meta, kind, dims, channels, what)
    except Unreadable as error:
        raise _error(site, alias, what, str(error), path) from error
    except Exception as error:  # decoders raise anything at all on a broken file
        clause = f"cannot be read as {kind}; expected an undamaged file that this account may read"
        raise _error(site, alias, what, clause, f"{path}: {type(error).__name__}: {error}") from error


def _error(site: str, alias: str, what: str, clause: str, detail: Path | str) -> DataError:
    return DataError(f"{site}, {alias}: the {what} {clause}.", detail=str(detail), site=site)


def _reader(kind: Format, path: Path, what: str) -> ImageReader:
    """Return a new reader: MONAI's readers remember file names between calls, so none is shared."""
    if kind is Format.NIFTI:
        return NibabelReader()
    if kind is Format.NRRD:
        return _NrrdReader()
    if kind is Format.PICTURE:
        return PILReader(converter=functools.partial(_plain_picture, label=what == "label"))
    if kind is Format.DICOM and path.is_dir():
        return _SeriesReader()
    return ITKReader()


def _decode(reader: ImageReader, path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    # The reader is called itself: MONAI's LoadImage builds every other reader too and logs paths.
    array, meta = reader.get_data(reader.read(str(path)))
    if not np.issubdtype(array.dtype, np.number) and array.dtype != np.bool_:
        raise Unreadable(
            "holds structured values (such as RGB triples); expected one number a voxel and channel"
        )
    return array.astype(
        array.dtype.newbyteorder("=")
    ), meta  # a copy: it must outlive the reader's own buffer


def _volume(
    array: NDArray[Any], meta: dict[str, Any], kind: Format, dims: int, channels: int, what: str
) -> Volume:
    data = EnsureChannelFirst()(convert_to_tensor(array), meta_dict=meta)
    data = data.as_tensor() if isinstance(data, MetaTensor) else data
    affine = np.eye(4)
    given = np.asarray(meta.get("affine", np.eye(4)), dtype=np.float64)
    rank = given.shape[0] - 1
    affine[:rank, :rank], affine[:rank, 3] = given[:rank, :rank], given[:rank, rank]
    while data.ndim - 1 > dims and data.shape[-1] == 1:
        data = data[..., 0]  # a picture stored as a volume of one slice
    if data.ndim - 1 != dims or data.numel() == 0:
        raise Unreadable(f"has {data.ndim - 1} axes ({_sizes(data.shape[1:])} voxels), expected {dims} axes")
    if data.is_complex():
        raise Unreadable("holds complex numbers; expected real values: store the magnitude")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise Unreadable(
            "has a geometry without volume or with values that are not finite; correct its header"
        )
    wanted = 1 if what == "label" else channels
    if (
        data.shape[0] in (3, 4)
        and wanted == 1
        and kind is Format.PICTURE
        and bool((data[:3] == data[:1]).all())
    ):
        data = data[:1]  # grey, saved as colour
    spacing = tuple(round(float(np.linalg.norm(affine[:3, axis])), 6) for axis in range(dims))
    if dims == 2:
        affine = np.diag([*spacing, 1.0, 1.0])  # in-plane only: a slice's pose in the body is not used
    codes = "".join(str(code) for code in aff2axcodes(affine)) if dims == 3 else ""
    dtype = str(data.dtype).removeprefix("torch.")
    return Volume(data.contiguous(), affine, spacing, codes, dtype, kind)


def _sizes(size: Sequence[int]) -> str:
    return "x".join(str(length) for length in size)


def _plain_picture(picture: Any, *, label: bool) -> Any:
    """Bring a picture to grey, colour or class numbers.

    A palette picture is class numbers as a label and colours as an image; transparency is dropped; one bit
    becomes 0 and 255.
    """
    if getattr(picture, "n_frames", 1) > 1:
        raise Unreadable(f"holds {picture.n_frames} pages, expected one picture a file; store pages as files")
    if picture.mode in ("1", "LA"):
        return picture.convert("L")
    if picture.mode == "P" and label:
        return picture
    if picture.mode in ("P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"):
        return picture.convert("RGB")
    return picture


class _NrrdReader(NrrdReader):
    """MONAI's reader takes any space it does not know for RAS; here an unknown one is refused."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        result: Any = super().read(data, **kwargs)
        self.dtype = result.array.dtype  # the file's own, not the reader's float32
        return result

    def _switch_lps_ras(self, header: dict[str, Any]) -> dict[str, Any]:
        space = header.get("space")
        name = space.lower() if isinstance(space, str) else None
        if name in _RAS:
            return header
        if name not in _LPS:
            raise Unreadable(
                "has a NRRD space other than left-posterior-superior or right-anterior-superior; convert it"
            )
        return super()._switch_lps_ras({**header, "space": "left-posterior-superior"})


class _SeriesReader(ITKReader):
    """Reads a folder as one DICOM series, with the slices in the order of their positions."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        import itk  # slow to import, and only this format needs it

        folder = data[0] if isinstance(data, tuple | list) else data
        files = series_files(Path(folder))
        return itk.imread(files if len(files) > 1 else files[0])


def series_files(folder: Path) -> list[str]:
    """Return the files of a folder's one DICOM series, sorted along the slices' normal.

    Files that are not DICOM images (a DICOMDIR, a text) are passed over.

    Raises:
        Unreadable: No image, more than one series, slices without or with the same position, differing
            orientation, or a missing slice.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    tags = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns"]
    slices = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            except InvalidDicomError:
                continue
            if "Rows" in header:
                slices.append((str(path), header))
    if not slices:
        raise Unreadable("is a folder without a DICOM image")
    if len({str(header.get("SeriesInstanceUID", "")) for _, header in slices}) > 1:
        raise Unreadable("is a folder with more than one DICOM series; give each series a folder of its own")
    if len({(header.Rows, header.Columns) for _, header in slices}) > 1:
        raise Unreadable("is a DICOM series whose slices differ in size; leave the localiser out")
    if len(slices) == 1:
        return [slices[0][0]]
    return _in_order(slices)


def _in_order(slices: list[tuple[str, Any]]) -> list[str]:
    if any(
        header.get("ImagePositionPatient") is None or header.get("ImageOrientationPatient") is None
        for _, header in slices
    ):
        raise Unreadable("is a DICOM series with slices that do not say where they lie")
    planes = np.array([[float(v) for v in header.ImageOrientationPatient] for _, header in slices])
    if np.abs(planes - planes[0]).max() > 1e-2:
        raise Unreadable(
            "is a DICOM series whose slices differ in orientation; give each orientation its own folder"
        )
    normal = np.cross(planes[0, :3], planes[0, 3:])
    points = np.array([[float(v) for v in header.ImagePositionPatient] for _, header in slices])
    places = points @ normal
    order = np.argsort(places, kind="stable")
    gaps = np.diff(places[order])
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3 or usual < 1e-3:
        raise Unreadable(
            "is a DICOM series with several slices at one position; give each time or echo its own folder"
        )
    if gaps.max() > _MAX_GAP * usual:
        raise Unreadable(
            f"is a DICOM series with {int((gaps > _MAX_GAP * usual).sum())} gaps: slices are missing"
        )
    return [slices[index][0] for index in order]
