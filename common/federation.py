"""A data root: one folder per site, and `federation.json`, which says how a run over them is best set up.

    ROOT/federation.json     name, title, note, and any of data, model, train, rounds (a partial run
    configuration) ROOT/STARE/dataset.json  one folder per site; the folder's name is the site's alias
    ROOT/CHASE_DB1/dataset.json

Importers write it. Where it is absent, the data settings are derived from the first site's `dataset.json`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.dataset_json import DATASET_FILE, read_dataset_json
from common.errors import DataError, nearest

FEDERATION_FILE = "federation.json"
SECTIONS = ("data", "model", "train", "rounds", "method", "params", "seed")
_TEXTS = ("name", "title", "note")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Federation:
    """What a data root says about itself.

    Attributes:
        name: Short name of the data ("vessels").
        title: One line for people.
        note: What must be said beside a result (simulated sites, no subject key, terms).
        settings: Partial run configuration: any of `SECTIONS`.
    """

    name: str
    title: str = ""
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        """Return the run configuration with these settings over the defaults.

        Raises:
            ConfigError: A setting that the run configuration does not know or accept.
        """
        return RunConfig.from_mapping(self.settings)


def is_alias(name: str) -> bool:
    """Tell whether a name can be a site's alias: 1 to 64 letters, digits, dots, dashes and underscores."""
    return _ALIAS.fullmatch(name) is not None


def find_sites(root: Path) -> dict[str, Path]:
    """Return the site folders under a data root: alias to folder, sorted by alias.

    Raises:
        DataError: The root is not a folder, holds no site, or a site's folder name cannot be an alias.
    """
    if not root.is_dir():
        raise DataError(
            "The data root is not a folder. Give the folder that holds the sites' folders.", detail=str(root)
        )
    sites = {path.name: path for path in sorted(root.iterdir()) if (path / DATASET_FILE).is_file()}
    if not sites:
        raise DataError(
            "The data root holds no site. Expected folders with a dataset.json, one per site (docs/data.md).",
            detail=str(root),
        )
    for number, alias in enumerate(sites, 1):
        if not is_alias(alias):
            raise DataError(
                f"The name of site folder number {number} cannot be an alias: use 1 to 64 letters, digits, "
                "dots, dashes and underscores, beginning with a letter or digit. Rename the folder.",
                detail=str(sites[alias]),
            )
    return sites


def read_federation(root: Path) -> Federation:
    """Read a data root's `federation.json`, or derive the data settings from its first site.

    Raises:
        DataError: Not JSON, an unknown key, a text where an object belongs, or no site to derive from.
        ConfigError: A setting that the run configuration does not know or accept.
    """
    path = root / FEDERATION_FILE
    if not path.is_file():
        return _derived(root)
    return read_federation_file(path)


def read_federation_file(path: Path) -> Federation:
    """Read one `federation.json` wherever it lies.

    Raises:
        DataError: Missing, not JSON, an unknown key, or a text where an object belongs.
        ConfigError: A setting that the run configuration does not know or accept.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(
            "federation.json cannot be read; expected a JSON object in UTF-8. Correct it, or remove it to "
            "derive the settings from the first site.",
            detail=f"{path}: {error}",
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            f"federation.json must be a JSON object, got {type(document).__name__}.", detail=str(path)
        )
    known = (*_TEXTS, *SECTIONS)
    for key in document:
        if key not in known:
            raise DataError(
                f"Unknown key '{key}' in federation.json. {nearest(key, known)}", detail=str(path)
            )
    for key in _TEXTS:
        if not isinstance(document.get(key, ""), str):
            raise DataError(f"'{key}' of federation.json must be a text. Put it in quotes.", detail=str(path))
    settings = {key: document[key] for key in SECTIONS if key in document}
    federation = Federation(
        document.get("name") or path.absolute().parent.name,
        document.get("title", ""),
        document.get("note", ""),
        settings,
    )
    federation.config()  # refuse now, where the file is named, and not in the middle of a run
    return federation


def write_federation(root: Path, federation: Federation) -> Path:
    """Write `federation.json` into a data root, whole or not at all, and return its path.

    Raises:
        ConfigError: A setting that the run configuration does not know or accept.
    """
    federation.config()
    document = {key: getattr(federation, key) for key in _TEXTS} | federation.settings
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    path = root / FEDERATION_FILE
    handle, temporary = tempfile.mkstemp(dir=root, prefix=".federation-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out the accounts that run the sites
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _derived(root: Path) -> Federation:
    alias, folder = next(iter(find_sites(root).items()))
    dataset = read_dataset_json(folder, alias)
    entries = dataset.entries(alias)
    dims = dataset.infer_dims(entries)
    data: dict[str, Any] = {
        "task": dataset.infer_task(entries),
        "spatial_dims": dims,
        "channels": list(dataset.channel_names),
        "labels": list(dataset.label_names),
    }
    if dims == 2:
        data["patch"] = [64, 64]
        if dataset.holds_pictures(entries):
            data["normalise"] = "range"
    return Federation(dataset.name or root.absolute().name, dataset.description, dataset.note, {"data": data})
