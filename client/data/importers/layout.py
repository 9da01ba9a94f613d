"""Writing a data root: every site's folder and `federation.json`, all of it or nothing.

    OUT/federation.json            what the sites are, and settings that suit them
    OUT/<site>/dataset.json        Decathlon form
    OUT/<site>/imagesTr/case-0001.nii.gz, labelsTr/case-0001.nii.gz

Everything is written into a folder beside OUT, read back with the reader that the sites use, and renamed at the end.
Files get neutral names in the order in which they are listed; no list leads back to the source's own names.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from client.data.datalist import read_datalist
from client.data.split import split_by_group
from common.config import TaskName
from common.dataset_json import DATASET_FILE, SPLITS
from common.errors import DataError
from common.federation import FEDERATION_FILE, find_sites, read_federation

MARKER_FILE = ".wardround-data.json"
FRACTIONS = {"validation": 0.2, "test": 0.2}
# (phase, done, total): called after each step of a phase
Progress = Callable[[str, int, int], None]


def no_progress(_phase: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class About:
    """What a site's dataset.json says of the data as a whole.

    Attributes:
        name: Short name.
        description: One or two sentences.
        channels: Channel names in order; empty for a table.
        labels: Class names; a name's place is its label value.
        size: "2D", "3D" or "4D" (channels of volumes in one file); None for a table.
        task: What the labels are for.
        reference: Whom to cite.
        licence: Terms of the source.
        note: What must be said beside a result of this site.
    """

    name: str
    description: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    size: str | None
    task: TaskName
    reference: str = ""
    licence: str = ""
    note: str = ""

    def document(self) -> dict[str, Any]:
        """Return the keys of dataset.json, without any list of cases."""
        texts = {
            "name": self.name,
            "description": self.description,
            "reference": self.reference,
            "licence": self.licence,
            "note": self.note,
            "task": self.task,
            "tensorImageSize": self.size,
        }
        document: dict[str, Any] = {key: value for key, value in texts.items() if value}
        if self.channels:
            document["modality"] = {str(index): name for index, name in enumerate(self.channels)}
        document["labels"] = {str(index): name for index, name in enumerate(self.labels)}
        return document


@dataclass
class SiteFolder:
    """One site's folder while it is written.

    Args:
        root: The data root (the temporary one).
        alias: The site's alias.
        about: What dataset.json says.
    """

    root: Path
    alias: str
    about: About
    _lists: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in SPLITS})

    @property
    def folder(self) -> Path:
        """Return the site's folder."""
        return self.root / self.alias

    def add(
        self, split: str, images: Sequence[str], label: str | int, group: str = ""
    ) -> tuple[list[Path], Path | None]:
        """List a case and return where its files belong. Call in the order of `SPLITS`.

        Args:
            split: One of `SPLITS`.
            images: Ending of each image file: (".nii.gz",), or one per channel ("_t1.nii.gz", "_t2.nii.gz").
            label: Ending of the mask file, or the class.
            group: Neutral key of the subject; "" makes the case its own.

        Returns:
            The image paths, and the label's path (None for a class). Their folders exist.
        """
        stem = f"case-{sum(map(len, self._lists.values())) + 1:04d}"
        names = [f"imagesTr/{stem}{ending}" for ending in images]
        entry: dict[str, Any] = {"image": f"./{names[0]}" if len(names) == 1 else [f"./{n}" for n in names]}
        mask = None
        if isinstance(label, str):
            mask = self.folder / "labelsTr" / f"{stem}{label}"
            mask.parent.mkdir(parents=True, exist_ok=True)
            entry["label"] = f"./labelsTr/{stem}{label}"
        else:
            entry["label"] = label
        if group:
            entry["group"] = group
        self._lists[split].append(entry)
        (self.folder / "imagesTr").mkdir(parents=True, exist_ok=True)
        return [self.folder / name for name in names], mask

    def finish(self, **extra: Any) -> None:
        """Write dataset.json; a table's keys come as `extra`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lists = {} if "table" in extra else self._lists
        document = {**self.about.document(), **extra, **lists}
        write_json(self.folder / DATASET_FILE, document)


@contextmanager
def new_root(out: Path, kind: str, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` if the block ends well, and vanishes if not.

    Args:
        out: The data root to write; absent or empty.
        kind: What writes it ("msd"); kept in the marker file.
        force: Replace `out` if wardround wrote it.

    Raises:
        DataError: `out` holds something already, cannot be written, or what was written cannot be read back.
    """
    out = out.absolute()
    if out.is_symlink():
        out = out.resolve()
    refuse_occupied(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DataError(
            f"OUT cannot be made ({error.strerror}). Give a folder that this account may write.",
            detail=str(error),
        ) from error
    root = temporary / "root"
    try:
        root.mkdir(mode=0o755)
        yield root
        write_json(root / MARKER_FILE, {"written_by": "wardround", "kind": kind})
        _read_back(root)
        _move(root, out, temporary / "old")
    except OSError as error:
        raise DataError(
            f"Writing the data stopped ({error.strerror or type(error).__name__}); nothing was left behind. "
            "Look at disk space and permissions, and start again.",
            detail=str(error),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(out: Path, *, force: bool) -> None:
    """Refuse an OUT that holds something, unless wardround wrote it and may replace it.

    Raises:
        DataError: It is a file, or a folder with content that may not be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError("OUT is a file; expected a new or empty folder.", detail=str(out))
    try:
        empty = not any(out.iterdir())
    except OSError as error:
        raise DataError(
            "OUT cannot be read by this account. Give another folder.", detail=str(error)
        ) from error
    if empty:
        return
    if not force:
        raise DataError(
            "OUT is not empty. Give a new folder, or --force to replace one that wardround wrote.",
            detail=str(out),
        )
    if not (out / MARKER_FILE).is_file():
        raise DataError(
            "OUT was not written by an importer of wardround, so --force does not replace it. "
            "Give another folder, or remove it yourself.",
            detail=str(out),
        )


def site_seed(seed: int, alias: str) -> int:
    """Return the seed of one site's choices, below 2**32; other sites do not change it."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(alias.encode())])
    return int(sequence.generate_state(1)[0])


def split_cases(groups: Sequence[str], strata: Sequence[int], *, seed: int, alias: str) -> list[str]:
    """Return each case's split, 60/20/20 by group and class, seeded per site.

    Raises:
        DataError: Fewer than three groups: one of the splits would be empty.
    """
    if len(set(groups)) < len(SPLITS):
        raise DataError(
            f"{alias}: {len(set(groups))} subjects are too few for training, validation and test; "
            "at least 3 are needed. Make fewer sites, or merge this one with another.",
            site=alias,
        )
    return split_by_group(groups, strata, FRACTIONS, seed=site_seed(seed, alias))


def write_json(path: Path, document: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_nifti(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a NIfTI file whose bytes depend on array and affine alone.

    nibabel stamps neither time nor name into the gzip header.
    """
    image = nib.Nifti1Image(np.asarray(array), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    nib.save(image, path)


def place(source: Path, target: Path, *, move: bool) -> None:
    """Bring a file into the root: moved out of an unpacked archive, else hard-linked, else copied.

    A link costs no space; where source and target lie on different file systems the file is copied.
    """
    source = source.resolve()
    if move:
        os.replace(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def counts(root: Path) -> dict[str, tuple[dict[str, int], str]]:
    """Return each site's cases by split and its note, read with the sites' own reader.

    Raises:
        DataError: What `find_sites` and `read_datalist` refuse.
    """
    found = {}
    for alias, folder in find_sites(root).items():
        document = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
        found[alias] = (read_datalist(folder, alias).counts, str(document.get("note", "")))
    return found


def _read_back(root: Path) -> None:
    if not (root / FEDERATION_FILE).is_file():
        raise RuntimeError("an importer ended without federation.json")
    read_federation(root).config()
    counts(root)


def _move(root: Path, out: Path, old: Path) -> None:
    if out.exists() and any(out.iterdir()):
        os.rename(out, old)
        try:
            os.rename(root, out)
        except OSError:
            os.rename(old, out)
            raise
    else:
        os.rename(root, out)  # also onto an empty folder
