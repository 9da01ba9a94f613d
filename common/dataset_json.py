"""The `dataset.json` of a data folder: the Decathlon form, read strictly, without looking at any image.

It is what both ends of the command line need before a volume is opened: the task, the number of axes, the
channels and
the class names. `client/data/datalist.py` turns it into cases. Free of torch, so that it costs nothing to
import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from common.config import Strict, TaskName, brief
from common.errors import DataError, nearest

DATASET_FILE = "dataset.json"
SPLITS = ("training", "validation", "test")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_LINES = 60  # of a detail
M = TypeVar("M", bound=BaseModel)


class SplitFractions(Strict):
    """How cases are divided where the lists `validation` and `test` are absent."""

    validation: float = Field(default=0.2, ge=0, lt=1)
    test: float = Field(default=0.2, ge=0, lt=1)
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _some_training(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing for training")
        return self


class CaseEntry(Strict):
    """One item of a list: an image (or one file per channel), its label, and whose it is."""

    image: str | tuple[str, ...]
    label: str | int | None = None
    group: str | int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Return the image's files, one per channel or one for all."""
        return (self.image,) if isinstance(self.image, str) else self.image


class DatasetJson(Strict):
    """A checked `dataset.json`. Spelling of the keys is the Decathlon's own."""

    name: str = ""
    description: str = ""
    reference: str = ""
    licence: str = ""
    license: str = ""
    release: str = ""
    relase: str = ""  # the Decathlon's own files carry this slip of the pen
    version: str = ""
    note: str = ""
    tensorImageSize: Literal["2D", "3D", "4D"] | None = None
    numTraining: int | None = None
    numValidation: int | None = None
    numTest: int | None = None
    task: TaskName | None = None
    modality: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str]
    training: list[Any] = Field(default_factory=list)
    validation: list[Any] | None = None
    test: list[Any] | None = None
    split: SplitFractions | None = None
    table: str | None = None
    features: tuple[str, ...] = ()
    target: str = "target"
    split_column: str | None = None
    group_column: str | None = None
    missing_values: dict[str, tuple[float, ...]] = Field(default_factory=dict)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the class names; a name's place is its label value."""
        return tuple(self.labels[str(index)] for index in range(len(self.labels)))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Return the channel names in order, or the table's features."""
        if self.table is not None:
            return self.features
        return tuple(self.modality[str(index)] for index in range(len(self.modality)))

    def entries(self, site: str) -> list[tuple[str, CaseEntry]]:
        """Return (split, entry) of every listed case, in the file's order of `SPLITS`.

        A plain string is an image without a label, as the Decathlon lists its test cases.

        Raises:
            DataError: An entry that is neither a string nor an object with known keys.
        """
        found = []
        for split in SPLITS:
            for number, raw in enumerate(getattr(self, split) or []):
                item = {"image": raw} if isinstance(raw, str) else raw
                entry = _checked(CaseEntry, item, site=site, place=f"{split}[{number}]", detail="")
                if not entry.files or not all(entry.files):
                    raise DataError(
                        f"{site}: {split}[{number}] of dataset.json names no image. Give its file.", site=site
                    )
                found.append((split, entry))
        return found

    def infer_task(self, entries: list[tuple[str, CaseEntry]]) -> TaskName:
        """Return the declared task, or the one that the labels show: files are masks, numbers are classes."""
        if self.task is not None:
            return self.task
        if self.table is not None:
            return "tabular"
        labels = [entry.label for _, entry in entries if entry.label is not None]
        return (
            "classification" if labels and all(isinstance(label, int) for label in labels) else "segmentation"
        )

    def infer_dims(self, entries: list[tuple[str, CaseEntry]]) -> int:
        """Return 0 for a table, 2 for pictures, 3 for volumes (the Decathlon's 4D is channels of volumes)."""
        if self.table is not None:
            return 0
        if self.tensorImageSize is not None:
            return 2 if self.tensorImageSize == "2D" else 3
        return 2 if entries and self.holds_pictures(entries) else 3

    @staticmethod
    def holds_pictures(entries: list[tuple[str, CaseEntry]]) -> bool:
        """Tell whether the listed images are PNG, JPEG or TIFF."""
        return all(name.lower().endswith(PICTURE_SUFFIXES) for _, entry in entries for name in entry.files)


def read_dataset_json(folder: Path, site: str) -> DatasetJson:
    """Read and check a data folder's `dataset.json`.

    Args:
        folder: The site's data folder.
        site: The site's alias, for the sentences.

    Raises:
        DataError: Missing, not JSON, an unknown key (with the nearest known one), a wrong value, or class or
            channel numbers that do not run from 0.
    """
    path = folder / DATASET_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(
            f"{site}: no dataset.json in the data folder. Write one (docs/data.md) or import the data.",
            detail=str(path),
            site=site,
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{site}: dataset.json is not JSON (line {error.lineno}, column {error.colno}). Correct it.",
            detail=f"{path}: {error}",
            site=site,
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{site}: dataset.json cannot be read; expected UTF-8 text that this account may read.",
            detail=f"{path}: {error}",
            site=site,
        ) from error
    dataset = _checked(DatasetJson, document, site=site, place="", detail=str(path))
    _check_numbering(dataset.labels, "labels", 2, site)
    if dataset.table is None:
        _check_numbering(dataset.modality, "modality", 1, site)
    elif not dataset.features or len(set(dataset.features)) != len(dataset.features):
        raise DataError(
            f"{site}: dataset.json names a table; 'features' must list its columns, each once.", site=site
        )
    return dataset


def _check_numbering(mapping: dict[str, str], key: str, least: int, site: str) -> None:
    expected = {str(index) for index in range(len(mapping))}
    if len(mapping) < least or mapping.keys() != expected:
        raise DataError(
            f"{site}: '{key}' of dataset.json must map the numbers from 0 on to names, at least {least}; "
            f'got {len(mapping)} entries. Write, for example, {{"0": "background", "1": "tumour"}}.',
            site=site,
        )
    if len(set(mapping.values())) != len(mapping):
        raise DataError(
            f"{site}: '{key}' of dataset.json gives two numbers the same name. Name each once.", site=site
        )


def _checked(model: type[M], document: Any, *, site: str, place: str, detail: str) -> M:
    """Validate against a model; the sentence names places of the schema alone.

    Values may be file names, and keys are the hospital's own words: both go into the detail.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        found = error.errors()
        # a misspelt key also leaves the right one missing: say the cause
        first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
        path = _schema_place(model, place, first["loc"])
        text = "\n".join(
            brief(line, 300) for line in f"{detail}: {error}".removeprefix(": ").splitlines()[:_LINES]
        )
        if first["type"] == "extra_forbidden":
            owner = SplitFractions if first["loc"][:-1] == ("split",) else model
            key = brief(str(first["loc"][-1]))
            where = f" in '{path}'" if path else ""
            raise DataError(
                f"{site}: dataset.json has an unknown key{where}. {nearest(key, owner.model_fields)} "
                "`wardround site check` at the site says which.",
                detail=f"unknown key '{key}'; {text}",
                site=site,
            ) from error
        if first["type"] == "missing":
            raise DataError(
                f"{site}: dataset.json lacks '{path}'. Add it (docs/data.md).", detail=text, site=site
            ) from error
        raise DataError(
            f"{site}: bad value for '{path or 'the whole'}' in dataset.json: {first['msg']}. Correct it; "
            "`wardround site check` at the site says more.",
            detail=text,
            site=site,
        ) from error


def _schema_place(model: type[BaseModel], place: str, loc: tuple[int | str, ...]) -> str:
    """Return the part of an error's place that is the schema's own: up to the first key that is the site's."""
    parts = [place] if place else []
    owner: type[BaseModel] | None = model
    for part in loc:
        if owner is None or part not in owner.model_fields:
            break
        parts.append(str(part))
        owner = SplitFractions if part == "split" else None
    return ".".join(parts)
