"""What the hospital itself brings: kit, key, site.toml with its policy, data; and whether the containers may read it."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import common
from common.errors import ConfigError, CredentialError, DataError, WardroundError
from ops.containers import places
from ops.preflight import Finding, fail, failed, ok, skipped, warn

if TYPE_CHECKING:
    from client.site_config import SiteConfig
    from ops.kit import Kit

UID = 10001
"""The user of the containers."""
AS_ROOT = "Run this command as root to have it looked at."
Readable = Literal["yes", "no", "unknown"]


def readable(path: Path, uid: int = UID) -> Readable:
    """Return whether a user whose group has the same number may read a file, or list and enter a folder.

    What lies above the path does not matter: it is mounted into the container by the engine, as root.

    Args:
        path: File or folder; a link counts as what it leads to.
        uid: The user, and the only group.

    Returns:
        "unknown" where the mode forbids it and an access list might allow it.

    Raises:
        OSError: It is not there, or may not be looked at.
    """
    found = path.stat()
    needed = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
    shift = 6 if found.st_uid == uid else 3 if found.st_gid == uid else 0
    if (found.st_mode >> shift) & needed == needed:
        return "yes"
    try:
        listed = "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        listed = False
    return "unknown" if listed else "no"


def unreadable(paths: Iterable[Path], uid: int = UID) -> tuple[list[Path], list[Path]]:
    """Return the paths that a user may not read, and those of which it is not known."""
    no: list[Path] = []
    unknown: list[Path] = []
    for path in paths:
        answer = readable(path, uid)
        if answer != "yes":
            (no if answer == "no" else unknown).append(path)
    return no, unknown


def check_kit(folder: Path, *, shifted: bool = False) -> tuple[Finding, Kit | None]:
    """Return the finding about the kit, and the kit if it is in order.

    Args:
        folder: The unpacked kit.
        shifted: The engine maps user ids, so that rights cannot be judged.
    """
    from ops.kit import verify_kit

    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        return fail(
            "kit", "This account may not read the kit's folder.", "Run this command as root, or mend the folder's rights.",
            str(folder), CredentialError,
        ), None  # fmt: skip
    try:
        kit = verify_kit(folder)
        closed, unknown = unreadable([folder, *sorted(folder.rglob("*"))])
    except WardroundError as error:
        return failed("kit", error, "Ask the coordinator for a new kit."), None
    except OSError as error:
        return fail(
            "kit", "The kit cannot be read.", "Mend the folder's rights.", str(error), CredentialError
        ), None
    about = kit.about
    said = f"Site {about.alias} of {about.project}, whole and signed, until {about.expires:%Y-%m-%d}."
    if (closed or unknown) and not shifted:
        mend = (
            f"`sudo chown -R {UID} KIT`"
            if about.keys == "central"
            else "`chmod -R a+rX KIT` (it holds no secret)"
        )
        finding = _rights("kit", "the kit", closed, unknown, mend, CredentialError)
        return finding, kit
    if about.software != common.__version__:
        return warn(
            "kit", f"{said} It was made by wardround {about.software}, this is {common.__version__}.",
            "Use the version that the coordinator uses.", str(folder),
        ), kit  # fmt: skip
    return ok("kit", said, str(folder)), kit


def check_key(kit: Kit | None, keys: Path | None, *, shifted: bool = False) -> Finding:
    """Check the site's own key: there, a pair, private, and readable by the containers' user.

    Args:
        kit: The kit, if it is in order.
        keys: Folder of the key; beside the kit if none.
        shifted: The engine maps user ids.
    """
    from ops.kit_request import site_credentials

    if kit is None:
        return skipped("key", "The kit is not in order.")
    home = key_folder(kit, keys)
    alias = kit.about.alias
    there = exists(home)
    if there is None:
        return fail("key", "This account may not look at the key.", AS_ROOT, str(home), CredentialError)
    if not there:
        remedy = f"Make it and the request for admission: `wardround site request {alias}`."
        return fail("key", f"Site {alias} has no key yet.", remedy, str(home), CredentialError)
    if not os.access(home, os.R_OK | os.X_OK):
        if home.stat().st_uid == UID:
            found = f"The key's folder belongs to uid {UID}, as it must; this account cannot look inside."
            return warn("key", found, AS_ROOT, str(home))
        return fail("key", "This account may not look at the key.", AS_ROOT, str(home), CredentialError)
    try:
        credentials = site_credentials(kit, keys)
        wanted = [home, credentials.site_keys[alias], credentials.site_secrets[alias]]
        closed, unknown = unreadable(wanted)
    except WardroundError as error:
        return failed("key", error, f"Make a new one: `wardround site request {alias} --keys NEW-FOLDER`.")
    except OSError as error:
        return fail("key", "The key cannot be read.", AS_ROOT, str(error), CredentialError)
    if (closed or unknown) and not shifted:
        return _rights("key", "the key", closed, unknown, f"`sudo chown -R {UID} KEYS`", CredentialError)
    return ok("key", f"Private key and secret of {alias}, for nobody else to read.", str(home))


def key_folder(kit: Kit, keys: Path | None) -> Path:
    """Return where a site's key lies."""
    from ops.kit_request import keys_folder

    if kit.about.keys == "central":
        return kit.folder / "private"
    return keys or keys_folder(kit.folder)


def check_config(path: Path, alias: str, *, shifted: bool = False) -> tuple[Finding, SiteConfig | None]:
    """Return the finding about site.toml, and what it says.

    Args:
        path: The hospital's own copy.
        alias: The kit's; any if empty.
        shifted: The engine maps user ids.
    """
    from client.site_config import read_site_config

    there = exists(path)
    if there is None:
        return fail("site.toml", "This account may not look at it.", AS_ROOT, str(path), ConfigError), None
    if not there:
        remedy = (
            "Copy the kit's template (`cp KIT/site.toml site.toml`), edit the copy, or give it with --config."
        )
        return fail("site.toml", "It is not there.", remedy, str(path), ConfigError), None
    try:
        config = read_site_config(path)
        closed, unknown = unreadable([path])
    except WardroundError as error:
        finding = failed("site.toml", error, "Correct it; docs/security.md has every key.")
        # what was got may be a name or a path of the hospital: for this terminal alone
        found = re.sub(r",? got .*", ".", finding.found, flags=re.DOTALL)
        return replace(finding, found=found, detail=error.message), None
    except OSError as error:
        return fail("site.toml", "It cannot be read.", AS_ROOT, str(error), ConfigError), None
    wrong = [
        f'{name} = "{wanted}"'
        for name, wanted in (("data", places.DATA), ("home", places.HOME), ("socket", places.SOCKET))
        if getattr(config, name) != wanted
    ]
    wrong += [
        f'{name} below "{places.HOME}"'
        for name in ("models", "events")
        if (value := getattr(config, name)) is not None and places.HOME not in value.parents
    ]
    if alias and config.alias != alias:
        return fail(
            "site.toml", f"It is for '{config.alias}', the kit for '{alias}'.", "Use the two of one site.", str(path),
            CredentialError,
        ), config  # fmt: skip
    if wrong:
        return fail(
            "site.toml", "A folder is not where the container has it.",
            f"Write {', '.join(wrong)}; where the folders lie on this machine is said by --data and the volumes.",
            str(path), ConfigError,
        ), config  # fmt: skip
    if (closed or unknown) and not shifted:
        return _rights(
            "site.toml", "site.toml", closed, unknown, "`chmod a+r site.toml`", ConfigError
        ), config
    return ok(
        "site.toml",
        f"Alias {config.alias}, device {config.compute.device}; folders as the container's.",
        str(path),
    ), config


def check_policy(config: SiteConfig | None) -> Finding:
    """Say in one line what may leave the hospital, and warn where nothing was decided."""
    if config is None:
        return skipped("policy", "site.toml cannot be used.")
    policy, privacy = config.policy, config.privacy
    words = {name: _listed(getattr(policy, name)) for name in ("methods", "kinds", "sketches")}
    said = "; ".join(f"{name} {value}" for name, value in words.items())
    said += f"; from {policy.min_cases} training case(s)"
    said += f"; at most {policy.max_out_mb:g} MB a round" if policy.max_out_mb else "; no limit of size"
    said += f"; figures from {privacy.metrics_min_cases} case(s)" if privacy.metrics else "; no figures"
    said += f"; summary {privacy.summary}."
    if "*" in policy.methods and "*" in policy.kinds and policy.min_cases == 1 and not policy.max_out_mb:
        remedy = "Nothing was narrowed yet: decide [policy] in site.toml (docs/security.md)."
        return warn("policy", f"May leave: {said}", remedy)
    return ok("policy", f"May leave: {said}")


def _listed(values: tuple[str, ...]) -> str:
    return "all" if "*" in values else ", ".join(values) or "none"


def check_data(folder: Path, alias: str, *, shifted: bool = False) -> Finding:
    """Check that dataset.json can be used and that its files are there for the containers' user; opens no image.

    Args:
        folder: On this machine; the container has it as /data.
        alias: For the sentences.
        shifted: The engine maps user ids.
    """
    from common.dataset_json import DATASET_FILE, read_dataset_json

    site, here = alias or "site", str(folder)
    if exists(folder) is None:
        return warn("data", "This account may not look into the data folder.", AS_ROOT, here)
    if not folder.is_dir():
        return fail("data", "The data folder is not there.", "Give it with --data.", here, DataError)
    if not os.access(folder, os.R_OK | os.X_OK):
        return warn("data", "This account may not look into the data folder.", AS_ROOT, here)
    try:
        dataset = read_dataset_json(folder, site)
        entries = dataset.entries(site)
        names = [name for _, entry in entries for name in (*entry.files, *_label(entry.label))]
        names += [dataset.table] if dataset.table else []
        paths = [folder / name for name in names]
        finding = _files(folder, paths)
        if finding is not None:
            return finding
        closed, unknown = unreadable(
            [folder, folder / DATASET_FILE, *sorted(_folders(folder, paths)), *paths]
        )
    except WardroundError as error:
        return failed("data", error, "Correct dataset.json (docs/data.md).")
    except OSError as error:
        return fail("data", "A file of the data cannot be looked at.", AS_ROOT, str(error), DataError)
    if (closed or unknown) and not shifted:
        mend = "`chmod -R o+rX DATA`, or a copy that belongs to this user"
        return _rights("data", "the data", closed, unknown, mend, DataError)
    counts = Counter(split for split, _ in entries)
    cases = f"table of {len(dataset.features)} features" if dataset.table else f"{len(entries)} cases listed"
    splits = f" ({', '.join(f'{count} {split}' for split, count in counts.items())})" if counts else ""
    said = f"{cases}{splits}, {len(dataset.labels)} classes; every file is there. --full reads them."
    if not entries and not dataset.table:
        return fail("data", "dataset.json lists no case.", "List the cases (docs/data.md).", here, DataError)
    return ok("data", said, here)


def _label(label: str | int | None) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) and label else ()


def exists(path: Path) -> bool | None:
    """Return whether something is there, none where this account may not look."""
    try:
        return path.exists()
    except OSError:
        return None


def _folders(folder: Path, paths: list[Path]) -> set[Path]:
    """Return the folders between the data folder and its files: the containers' user must enter each."""
    return {up for path in paths for up in path.parents if up != folder and up.is_relative_to(folder)}


def _by_full_path(folder: Path, path: Path) -> bool:
    """Return whether a file, or a folder on its way, is a link with a full path: the container has it elsewhere."""
    places_ = (path, *_folders(folder, [path]))
    return any(place.is_symlink() and os.path.isabs(os.readlink(place)) for place in places_)


def _files(folder: Path, paths: list[Path]) -> Finding | None:
    """Return what is wrong with listed files, none if all are there and inside the folder."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        found = f"{len(missing)} of {len(paths)} files that dataset.json lists are not there."
        return fail("data", found, "Bring them, or take them off the list.", str(missing[0]), DataError)
    home = folder.resolve()
    outside = [
        path for path in paths if not path.resolve().is_relative_to(home) or _by_full_path(folder, path)
    ]
    if outside:
        found = f"{len(outside)} of {len(paths)} listed files are links that lead out of the folder, or have a full path."
        remedy = "The container has only this folder: put the files themselves into it."
        return fail("data", found, remedy, str(outside[0]), DataError)
    return None


def check_cases(folder: Path, alias: str, command: str) -> Finding:
    """Read every case, as `wardround site check DATA` does.

    Args:
        folder: The data.
        alias: For the sentences.
        command: What does the same in a container, for a machine without the worker's libraries.
    """
    if importlib.util.find_spec("monai") is None:
        found = "This machine has wardround without what reads images (pip install 'wardround[worker]')."
        return warn("cases", found, "Let the worker's image do it, by the command shown here.", command)
    from client.data.check import check_site

    found_here = check_site(folder, alias or "site", None)
    wrong = [problem for problem in found_here.problems if problem.level == "error"]
    notes = len(found_here.problems) - len(wrong)
    remedy = f"`wardround site check {folder}` lists them."
    if wrong:
        found = f"{len(wrong)} error(s), {notes} warning(s); the first: {wrong[0].sentence}"
        return fail("cases", found, "List them: `wardround site check DATA`.", remedy, DataError)
    if notes:
        return warn(
            "cases", f"Every case can be used; {notes} warning(s).", "List them: `wardround site check DATA`."
        )
    return ok("cases", "Every case was read and can be used.")


def _rights(
    name: str, what: str, closed: list[Path], unknown: list[Path], mend: str, kind: type[WardroundError]
) -> Finding:
    """Say that the containers' user may not read something."""
    if closed:
        found = f"The containers' user (uid {UID}) may not read {what}."
        return fail(name, found, f"Run {mend}.", str(closed[0]), kind)
    found = f"{what[:1].upper() + what[1:]} has an access list (ACL), which is not judged here."
    return warn(name, found, f"Make sure that uid {UID} may read it, or run {mend}.", str(unknown[0]))
