"""Data that is full of patients' names, and a search that finds such a name in whatever the coordinator saw.

`plant` writes a small segmentation data root whose folders, files, headers and descriptions carry made-up names; `leaks`
looks for them in a folder, bytes or a text, in plain and in simply encoded forms.
"""

import base64
import binascii
import csv
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import nibabel as nib
import numpy as np

from common.errors import DataError
from common.federation import Federation, write_federation
from tests.datafiles import AFFINE, save_series

FILES = "JANE_DOE_19500101"
FOLDER = "Snodgrass_Archibald"
DESCRIP = "Quimbleworth^Ottoline"
RECORD_NUMBER = "MRN-0099887766"
INTENT = "Voss_Petronella"
EXTENSION = "Rackstraw, Bartholomew"
DICOM = "ASHDOWN^CLEMENTINE"
NOTE = "Thistlewaite Cornelius"
GROUP = "family-Pennyfeather"
STRAY = "Übelhör_Jörg"
TOKENS = (FILES, FOLDER, DESCRIP, RECORD_NUMBER, INTENT, EXTENSION, DICOM, NOTE, GROUP, STRAY)
SHAPE = (18, 17, 16)
CHANNELS, LABELS = ("T1",), ("background", "lesion")
TEXT = f"cannot read /mnt/pacs/{FOLDER}/{FILES}.nii of {DICOM} ({STRAY})"
LEAST = 8  # letters: a shorter token is found in random bytes


def plant(root: Path, sites: Sequence[str]) -> list[str]:
    """Write a data root of tiny volumes whose names and headers carry patients; return what must never be seen.

    Every site has two training cases (one of them a DICOM series), one for validation and one for the test.

    Args:
        root: Folder to write.
        sites: Aliases of the sites.
    """
    for number, alias in enumerate(sites):
        _site(root / alias, number)
    settings = {
        "data": {"task": "segmentation", "spatial_dims": 3, "channels": list(CHANNELS), "labels": list(LABELS),
                 "patch": [16, 16, 16], "patches_per_case": 1, "augment": False},
        "model": {"width": 4, "levels": 2},
        "train": {"batch_size": 2, "optimizer": "adam", "lr": 0.005},
        "rounds": {"rounds": 2},
    }  # fmt: skip
    write_federation(root, Federation("planted", "Volumes full of names", "made up", settings))
    return list(TOKENS)


def _site(folder: Path, number: int) -> None:
    listed: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for index, split in enumerate(["training", "training", "validation", "test"]):
        image, label = _volume(100 * number + index)
        name = f"{FOLDER}/{FILES}_{index}"
        if index == 0:
            save_series(folder / name, image, AFFINE, name=DICOM, uid=f"1.2.3.{number}")
        else:
            name += ".nii"
            _write(folder / name, image)
        _write(folder / f"{FOLDER}/{FILES}_{index}_seg.nii", label)
        listed[split].append(
            {"image": name, "label": f"{FOLDER}/{FILES}_{index}_seg.nii", "group": f"{GROUP}-{index}"}
        )
    document = {
        "name": f"study of {NOTE}", "description": f"scans of {NOTE}", "note": NOTE, "reference": NOTE, "release": NOTE,
        "modality": dict(enumerate(CHANNELS)), "labels": dict(enumerate(LABELS)), **listed,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
    with (folder / f"patients_{FILES}.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["patient_name", "record"], [STRAY, RECORD_NUMBER]])


def _volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    x, y, z = rng.integers(3, 7, 3)
    label[x : x + 7, y : y + 7, z : z + 7] = 1
    return (rng.normal(200, 40, SHAPE) + 300.0 * label).astype(np.int16), label


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = nib.Nifti1Image(array, AFFINE)
    header = picture.header
    header["descrip"] = DESCRIP.encode()
    header["db_name"] = RECORD_NUMBER.encode()
    header["aux_file"] = f"{FILES}.par".encode()
    header["intent_name"] = INTENT.encode()
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", EXTENSION.encode()))
    nib.save(picture, path)


# ---- the search ------------------------------------------------------------------------------------------------------


def leaks(found: Path | bytes | str, tokens: Iterable[str]) -> list[str]:
    """Return every place where a token stands, as "TOKEN in PLACE (form)".

    Args:
        found: A folder (its files' names and contents), a file, bytes or a text.
        tokens: What is looked for, whatever its case.
    """
    needles = [(token, form, needle) for token in tokens for form, needle in _forms(token)]
    return [f"{token} in {place} ({form})" for place, data in _pieces(found) for token, form, needle in needles
            if needle in (data if form == "base64" else data.lower())]  # fmt: skip


def _pieces(found: Path | bytes | str) -> list[tuple[str, bytes]]:
    if isinstance(found, str):
        return [("text", found.encode("utf-8", "surrogatepass"))]
    if isinstance(found, bytes):
        return [("bytes", found)]
    if found.is_file():
        return [(found.name, found.read_bytes())]
    pieces = []
    for path in sorted(found.rglob("*")):
        place = str(path.relative_to(found))
        pieces.append((f"the name {place}", place.encode("utf-8", "surrogateescape")))
        if path.is_file():
            pieces.append((place, path.read_bytes()))
    return pieces


@functools.lru_cache(maxsize=64)
def _forms(token: str) -> set[tuple[str, bytes]]:
    assert len(token) >= LEAST, f"{token} is too short to be looked for"
    forms: set[tuple[str, bytes]] = set()
    for text in {token, token.lower(), token.upper(), token.replace("_", " "), token.replace("^", " ")}:
        plain = text.encode()
        forms |= {
            ("plain", plain.lower()),
            ("reversed", text[::-1].encode().lower()),
            ("hex", binascii.hexlify(plain)),
        }
        forms |= {
            (code, text.encode(code).lower()) for code in ("latin-1", "utf-16-le", "utf-16-be", "utf-32-le")
        }
        forms |= {("percent", quote(text, safe="").lower().encode()),
                  ("percent", "".join(f"%{byte:02x}" for byte in plain).encode()),
                  ("json", json.dumps(text)[1:-1].lower().encode()),
                  ("json", "".join(f"\\u{ord(letter):04x}" for letter in text).encode()),
                  ("quoted", ascii(text)[1:-1].lower().encode())}  # fmt: skip
        for code in (base64.b64encode, base64.urlsafe_b64encode):
            forms |= {("base64", _middle(code, plain, shift)) for shift in range(3)}
    return forms


def _middle(code, plain: bytes, shift: int) -> bytes:
    """Return those letters of the base64 of a longer text that the token alone decides."""
    whole = code(b"\0" * shift + plain).rstrip(b"=")
    first = -(-shift * 8 // 6)
    return whole[first : (shift + len(plain)) * 8 // 6]


# ---- exceptions that quote what they should not ----------------------------------------------------------------------


class Foreign(Exception):
    def __str__(self):
        return TEXT


def with_note():
    error = ValueError("bad")
    error.add_note(TEXT)
    error.__cause__ = OSError(2, TEXT, TEXT)
    return error


ERRORS = {
    "runtime": lambda: RuntimeError(TEXT), "os": lambda: OSError(2, TEXT, f"/data/{FILES}"), "key": lambda: KeyError(FILES),
    "decode": lambda: UnicodeDecodeError("utf-8", TEXT.encode(), 0, 1, TEXT), "group": lambda: ExceptionGroup(TEXT, [ValueError(TEXT)]),
    "foreign": Foreign, "note": with_note, "memory": lambda: MemoryError(TEXT),
    "ours": lambda: DataError("beta, case-0001: the image cannot be read.", detail=TEXT),
}  # fmt: skip
