"""A startup kit: what a hospital needs to meet the coordinator, as a folder that proves itself unaltered.

    kit.json      what the kit is: project, alias, server, dates, SHA-256 of every file below
    kit.sig       the authority's signature over kit.json
    SHA256SUMS    the same checksums, and those of the two above, for `sha256sum -c`
    ca.crt        the authority that signs the coordinator's certificate
    site.toml     template of the hospital's own configuration
    compose.yaml  the hospital's two containers; compose.gpu.yaml adds a GPU
    README.md     the next steps
    private/      only if the project makes the keys (keys = "central"): key, key.pub, secret

The signature shows that nothing was changed by accident or by somebody without the authority's key. That the authority
is the right one, no file can show: for that the fingerprint (SHA-256 of kit.json, which covers all the rest) is compared
by telephone.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, Field

from common.config import Strict, checked
from common.errors import ConfigError, CredentialError, MismatchError
from ops.kit_pack import pack
from ops.pki import ALIAS, check_site_key
from ops.pki_issue import Authority
from ops.provision_files import (
    private_folder,
    read_limited,
    same_fingerprint,
    sha256,
    split_address,
    sync_folder,
    write,
    writing,
)

SCHEMA = 1
LIST, SIGNATURE, SUMS, CA = "kit.json", "kit.sig", "SHA256SUMS", "ca.crt"
COMPOSE, COMPOSE_GPU = "compose.yaml", "compose.gpu.yaml"
PUBLIC_FILES = (CA, "README.md", COMPOSE_GPU, COMPOSE, "site.toml")
KEY, PUBLIC_KEY, SECRET = "private/key", "private/key.pub", "private/secret"
PRIVATE_FILES = (KEY, PUBLIC_KEY, SECRET)
SLACK = datetime.timedelta(days=1)  # by which a hospital's clock may be behind
_CONTEXT = b"wardround startup kit, schema 1\n"
_AGAIN = "Do not use it: ask the coordinator for it again."

Keys = Literal["site", "central"]


class KitList(Strict):
    """What kit.json says.

    Attributes:
        schema_version: Of the kit's form.
        software: Version of wardround that made it.
        project: Name of the project.
        alias: The site it is for.
        keys: "site": the site makes its own key; "central": the kit holds one.
        server: HOST:PORT to be called.
        names: All names and addresses of the coordinator's certificate that sites may use.
        serial: Drawn at random, so that a kit made anew is another one, also within a second.
        created: When it was made.
        expires: When the authority's certificate ends, and the kit with it.
        authority: SHA-256 of the authority's certificate (DER).
        files: SHA-256 of every file of the kit but kit.json, kit.sig and SHA256SUMS.
    """

    schema_version: Literal[1]
    software: str
    project: str
    alias: str = Field(pattern=rf"^{ALIAS.pattern}$")
    keys: Keys
    server: str
    names: tuple[str, ...] = Field(min_length=1)
    serial: str = Field(default_factory=lambda: secrets.token_hex(8), pattern=r"^[0-9a-f]{16}$")
    created: AwareDatetime
    expires: AwareDatetime
    authority: str
    files: dict[str, str]


@dataclass(frozen=True)
class Kit:
    """A kit that was found whole.

    Attributes:
        folder: Where it lies.
        about: What kit.json says.
        fingerprint: SHA-256 of kit.json.
    """

    folder: Path
    about: KitList
    fingerprint: str


def write_kit(kit: KitList, contents: Mapping[str, bytes], authority: Authority, folder: Path) -> str:
    """Write a kit's folder, and a .tar.gz of it beside it, in one step each.

    Args:
        kit: What it is; `files` is filled in here.
        contents: Bytes by name: `PUBLIC_FILES`, and `PRIVATE_FILES` if the kit holds a key.
        authority: Signs it.
        folder: Is made (0700, files 0600); must not exist.

    Returns:
        The fingerprint.

    Raises:
        ConfigError: The folder is there already.
        StorageError: The volume cannot be written.
    """
    if folder.exists():
        raise ConfigError(
            "A kit's folder is there already and is not overwritten: move it away.", detail=str(folder)
        )
    complete = kit.model_copy(update={"files": {name: sha256(contents[name]) for name in sorted(contents)}})
    listed = (json.dumps(complete.model_dump(mode="json"), indent=2) + "\n").encode()
    signature = authority.key.sign(_CONTEXT + listed, ec.ECDSA(hashes.SHA384()))
    files = {**contents, LIST: listed, SIGNATURE: signature.hex().encode() + b"\n"}
    files[SUMS] = _sums(files)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing():
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            private_folder(temporary)
            for name, content in files.items():
                private_folder((temporary / name).parent)
                write(temporary / name, content)
            write(packed(folder), pack(folder.name, files, kit.created))
            temporary.replace(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return sha256(listed)


def packed(folder: Path) -> Path:
    """Return where the .tar.gz of a kit's folder lies."""
    return folder.with_name(folder.name + ".tar.gz")


def verify_kit(
    folder: Path,
    *,
    alias: str = "",
    server: str = "",
    fingerprint: str = "",
    now: datetime.datetime | None = None,
) -> Kit:
    """Check a kit before anything is started with it.

    Args:
        folder: The unpacked kit.
        alias: The site it must be for; any if empty.
        server: HOST or HOST:PORT by which the coordinator will be called; not checked if empty.
        fingerprint: What the coordinator read out; not checked if empty.
        now: The time to check for; the clock's if none.

    Raises:
        ConfigError: An argument that cannot be compared.
        CredentialError: Altered, incomplete, with extra files, out of date, or for another alias or server.
        MismatchError: Made for another version of the form.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    names = _found(folder)
    listed = read_limited(folder / LIST, "The kit's list (kit.json)")
    kit = _parsed(listed)
    expected = {*PUBLIC_FILES, *(PRIVATE_FILES if kit.keys == "central" else ()), LIST, SIGNATURE, SUMS}
    _check_names(folder, names, expected, kit)
    contents = {name: read_limited(folder / name, f"The kit's file {name}") for name in sorted(expected)}
    _check_contents(contents, kit)
    if fingerprint and not same_fingerprint(fingerprint, sha256(listed)):
        raise CredentialError(
            "The kit's fingerprint is not the one that was read out: it is another kit, or somebody replaced it. "
            "Do not use it; call the coordinator by a number that you know."
        )
    _check_dates(kit, contents[CA], moment)
    if alias and alias != kit.alias:
        raise CredentialError(
            f"The kit is for site '{kit.alias}', not for '{alias[:64]}': use your own kit, and tell the coordinator whose "
            "you were sent."
        )
    if server:
        check_server(kit, server)
    if kit.keys == "central":
        _check_private(folder, kit)
    return Kit(folder, kit, sha256(listed))


def read_list(folder: Path) -> KitList:
    """Return what a kit's list says, without any check of the kit: enough to stop what was started with it.

    Raises:
        CredentialError: No list, or a damaged one.
        MismatchError: Made for another version of the form.
    """
    return _parsed(read_limited(folder / LIST, "The kit's list (kit.json)"))


def check_server(kit: KitList, server: str) -> None:
    """Check that a kit is for the coordinator under this name.

    Args:
        kit: The kit's list.
        server: HOST or HOST:PORT.

    Raises:
        ConfigError: Not an address.
        CredentialError: Another server, or another port.
    """
    host, port = split_address(server)
    if host not in kit.names:
        raise CredentialError(
            f"The kit is for the coordinator at {', '.join(kit.names)}, not for {host}: call it by one of these names, or "
            "ask the coordinator for a kit with this one."
        )
    own = split_address(kit.server)[1]
    if port is not None and port != own:
        raise CredentialError(
            f"The kit is for port {own}, not for {port}: use the kit's, or ask for a new kit."
        )


def _found(folder: Path) -> dict[str, int]:
    """Return what lies in a kit's folder: mode by relative name; folders with a slash at the end."""
    if not folder.is_dir():
        raise CredentialError(
            "The kit's folder is not there. Unpack the kit (tar xzf) and give the folder that holds kit.json.",
            detail=str(folder),
        )
    found: dict[str, int] = {}
    try:
        for parent, folders, files in os.walk(folder, onerror=_raise):
            place = Path(parent)
            for name in (*folders, *files):
                path = place / name
                mode = path.lstat().st_mode
                found[path.relative_to(folder).as_posix() + ("/" if stat.S_ISDIR(mode) else "")] = mode
    except OSError as error:
        raise CredentialError(
            "The kit's folder cannot be read: check its rights.", detail=str(error)
        ) from error
    return found


def _raise(error: OSError) -> None:
    raise error


def _parsed(listed: bytes) -> KitList:
    try:
        document: Any = json.loads(listed)
    except (ValueError, RecursionError) as error:
        raise CredentialError(
            f"The kit's list (kit.json) is damaged or altered. {_AGAIN}", detail=str(error)
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA or isinstance(version, bool):
        said = version if isinstance(version, int) else "none"
        raise MismatchError(
            f"The kit has schema version {said}, this wardround reads {SCHEMA}: install the version of wardround that the "
            "coordinator uses, or ask for a new kit."
        )
    try:
        return checked(KitList, document)
    except ConfigError as error:
        raise CredentialError(
            f"The kit's list (kit.json) is damaged or altered. {_AGAIN}", detail=error.message
        ) from error


def _check_names(folder: Path, found: Mapping[str, int], expected: set[str], kit: KitList) -> None:
    wanted = expected - {LIST, SIGNATURE, SUMS}
    unlisted = sorted(wanted - kit.files.keys())
    if unlisted:
        raise CredentialError(
            f"The kit's list (kit.json) does not name {', '.join(unlisted)}, which every kit has: it was made by an earlier "
            "version of wardround, or altered. Ask the coordinator for a new kit (`wardround provision --reissue`)."
        )
    if set(kit.files) != wanted:
        raise CredentialError(
            f"The kit's list (kit.json) names other files than a kit has: it is damaged or altered. {_AGAIN}"
        )
    missing = sorted(expected - found.keys())
    if missing:
        raise CredentialError(f"The kit is not whole: {', '.join(missing)} is missing. {_AGAIN}")
    folders = {"private/"} if kit.keys == "central" else set()
    extra = sorted(found.keys() - expected - folders)
    if extra:
        keys = [name for name in extra if _looks_private(folder / name)]
        what = "a private key" if keys else "a file or folder"
        raise CredentialError(
            f"The kit holds {what} that its list does not name. If you put it there, keep it outside the kit; if not, do "
            "not use the kit and tell the coordinator.", detail=", ".join(extra),
        )  # fmt: skip
    odd = [name for name in sorted(expected) if not stat.S_ISREG(found[name])]
    if odd:
        raise CredentialError(f"The kit's {odd[0]} is a link or device instead of a plain file. {_AGAIN}")


def _looks_private(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            return False  # what lies in it is listed on its own
        return b"PRIVATE KEY" in read_limited(path, "A file")
    except CredentialError:
        return False


def _check_contents(contents: Mapping[str, bytes], kit: KitList) -> None:
    for name, digest in kit.files.items():
        if sha256(contents[name]) != digest:
            raise CredentialError(f"The kit's {name} was altered or damaged: its checksum differs. {_AGAIN}")
    if contents[SUMS] != _sums({name: content for name, content in contents.items() if name != SUMS}):
        raise CredentialError(
            "The kit was altered or damaged: its checksums (SHA256SUMS) are not those of its files. " + _AGAIN
        )
    try:
        signature = bytes.fromhex(contents[SIGNATURE].decode("ascii"))
        if contents[SIGNATURE] != signature.hex().encode() + b"\n":
            raise ValueError("not written as wardround writes it")
        authority = x509.load_pem_x509_certificate(contents[CA])
        key = authority.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("the authority has another kind of key")
        key.verify(signature, _CONTEXT + contents[LIST], ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise CredentialError(
            f"The kit's list (kit.json) was not signed by the kit's authority: altered or damaged. {_AGAIN}",
            detail=str(error) or type(error).__name__,
        ) from error
    if authority_fingerprint(authority) != kit.authority:
        raise CredentialError(f"The kit's authority (ca.crt) is another than its list names. {_AGAIN}")


def authority_fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate (DER) as 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _check_dates(kit: KitList, ca: bytes, now: datetime.datetime) -> None:
    authority = x509.load_pem_x509_certificate(ca)
    end = min(kit.expires, authority.not_valid_after_utc)
    start = max(kit.created - SLACK, authority.not_valid_before_utc)
    if now > end:
        raise CredentialError(
            f"The kit expired on {end:%Y-%m-%d %H:%M} UTC: ask the coordinator for a new one."
        )
    if now < start:
        raise CredentialError(
            f"The kit is not valid before {start:%Y-%m-%d %H:%M} UTC: correct this machine's clock; if it is right, ask "
            "the coordinator for a new kit."
        )


def _check_private(folder: Path, kit: KitList) -> None:
    for name in (KEY, SECRET):
        if (folder / name).stat().st_mode & 0o077:
            raise CredentialError(
                "Others on this machine can read the kit's private key: run `chmod -R go= KIT` on its folder. If anybody "
                "may have read it, ask for a new kit.", site=kit.alias,
            )  # fmt: skip
    check_site_key(folder / KEY, folder / PUBLIC_KEY, site=kit.alias)


def _sums(files: Mapping[str, bytes]) -> bytes:
    return "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files)).encode()
