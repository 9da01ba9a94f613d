"""A site's request for admission: its own public key, bound to its kit, with a proof that it has the private half.

The request's fingerprint covers project, alias, kit and key. One comparison by telephone therefore settles both ways: a
site that was given a forged kit makes a request that names that kit, and a request that was replaced on its way has
another fingerprint.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from common.config import Strict, checked
from common.errors import ConfigError, CredentialError, MismatchError
from ops.kit import KEY, PUBLIC_KEY, SECRET, Kit, verify_kit
from ops.pki import ALIAS, TrialPki, check_site_key, parse_public_key
from ops.pki_issue import SSH, new_site_key
from ops.provision_files import private_folder, read_limited, sha256, write, writing

SCHEMA = 1
LEAST_BITS = 256  # Flower would take NIST curves below, which nobody should use any more
_CONTEXT = b"wardround site request, schema 1\n"
_DIGEST = r"^[0-9a-f]{64}$"


class SiteRequest(Strict):
    """A request file.

    Attributes:
        schema_version: Of the file's form.
        project: Name of the project.
        alias: The site.
        kit: Fingerprint of the kit that the site has.
        public_key: The site's public key (OpenSSH, without comment).
        signature: By the private half, over everything else (DER, hexadecimal).
    """

    schema_version: Literal[1]
    project: str = Field(max_length=64)
    alias: str = Field(pattern=rf"^{ALIAS.pattern}$")
    kit: str = Field(pattern=_DIGEST)
    public_key: str = Field(max_length=1000)
    signature: str = Field(max_length=1000)

    def signed(self) -> bytes:
        """Return the bytes that are signed."""
        return (
            _CONTEXT
            + json.dumps(
                self.model_dump(mode="json", exclude={"signature"}), sort_keys=True, separators=(",", ":")
            ).encode()
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is signed; compared by telephone."""
        return sha256(self.signed())

    @property
    def key_fingerprint(self) -> str:
        """SHA-256 of the public key's line; names the key in the project's log."""
        return key_fingerprint(self.public_key)


@dataclass(frozen=True)
class MadeRequest:
    """What `make_request` made.

    Attributes:
        request: The request.
        path: Its file.
        keys: Folder with the private key.
        new_key: Whether the key was made now.
    """

    request: SiteRequest
    path: Path
    keys: Path
    new_key: bool


def key_fingerprint(public_key: str) -> str:
    """Return the SHA-256 of a public key (OpenSSH line without comment) as 64 hexadecimal digits."""
    return sha256(public_key.encode())


def keys_folder(kit: Path) -> Path:
    """Return where a site's own key lies by default: beside the kit."""
    return kit.absolute().with_name(f"{kit.absolute().name}-keys")


def make_request(folder: Path, *, keys: Path | None = None, out: Path | None = None) -> MadeRequest:
    """Make a site's own key, unless it is there already, and write the request for its admission.

    Args:
        folder: The kit.
        keys: Folder for the private key, mode 0700; `keys_folder` if none.
        out: The request file; ALIAS-request.json beside the kit if none.

    Raises:
        ConfigError: The kit holds a key already, or a folder that cannot be used.
        CredentialError: The kit is not in order, or the key that is there is not.
        MismatchError: The kit has another schema version.
        StorageError: The volume cannot be written.
    """
    kit = verify_kit(folder)
    about = kit.about
    if about.keys != "site":
        raise ConfigError(
            f"The kit of site '{about.alias}' holds its key already (the coordinator made it): no request is needed."
        )
    home = keys or keys_folder(folder)
    path = out or folder.absolute().with_name(f"{about.alias}-request.json")
    for place in (home, path):
        if place.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                "Keys and request lie outside the kit, which stays as it came: choose another place."
            )
    if path.resolve().parent == home.resolve():
        raise ConfigError(
            "The request is sent away, the keys never are: choose another folder for the request."
        )
    private, new = _own_key(home, about.alias)
    unsigned = SiteRequest(
        schema_version=SCHEMA, project=about.project, alias=about.alias, kit=kit.fingerprint,
        public_key=private.public_key().public_bytes(*SSH).decode(), signature="",
    )  # fmt: skip
    signature = private.sign(unsigned.signed(), ec.ECDSA(hashes.SHA384())).hex()
    request = unsigned.model_copy(update={"signature": signature})
    write(path, (json.dumps(request.model_dump(mode="json"), indent=2) + "\n").encode())
    return MadeRequest(request, path, home, new)


def _own_key(home: Path, alias: str) -> tuple[ec.EllipticCurvePrivateKey, bool]:
    """Return the key in a folder and whether it was made now; the folder then has all that the site needs."""
    key, public, secret = (home / Path(name).name for name in (KEY, PUBLIC_KEY, SECRET))
    with writing():
        if home.exists() and (not home.is_dir() or home.stat().st_mode & 0o077):
            raise CredentialError(
                "The folder for the private key is open to others on this machine, or is no folder: run `chmod 700` on "
                "it, or give a new one with --keys.", detail=str(home), site=alias,
            )  # fmt: skip
        private_folder(home)
    new = not key.exists()
    if new:
        write(key, new_site_key(alias)[0])
    check_site_key(key, site=alias)
    if key.stat().st_mode & 0o077:
        raise CredentialError(
            "Others on this machine can read the site's private key. If nobody did, run `chmod 600` on it; else make a "
            "new one in another folder (--keys).", detail=str(key), site=alias,
        )  # fmt: skip
    loaded = serialization.load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    write(public, loaded.public_key().public_bytes(*SSH) + f" {alias}\n".encode())
    if not secret.exists():
        write(secret, secrets.token_bytes(32))
    return loaded, new


def read_request(path: Path) -> SiteRequest:
    """Read a request and check its proof of possession.

    Raises:
        CredentialError: Unreadable, altered, with a weak key, or signed by another key than its own.
        MismatchError: Another schema version.
    """
    try:
        document: Any = json.loads(read_limited(path, "The request"))
    except (ValueError, RecursionError) as error:
        raise CredentialError(
            "The request is not a file that `wardround site request` wrote: ask the site for it again.",
            detail=f"{path}: {error}",
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA or isinstance(version, bool):
        said = version if isinstance(version, int) else "none"
        raise MismatchError(
            f"The request has schema version {said}, this wardround reads {SCHEMA}: use the same version of wardround at "
            "both ends."
        )
    try:
        request = checked(SiteRequest, document)
    except ConfigError as error:
        raise CredentialError(
            "The request is damaged or altered: ask the site for it again.", detail=error.message
        ) from error
    key = parse_public_key(request.public_key.encode(), site=request.alias, detail=str(path))
    if key.public_bytes(*SSH).decode() != request.public_key or key.curve.key_size < LEAST_BITS:
        raise CredentialError(
            f"Site {request.alias}: the request's public key is not written as wardround writes it, or has fewer than "
            f"{LEAST_BITS} bits: let the site make a new key with `wardround site request`.", site=request.alias,
        )  # fmt: skip
    try:
        key.verify(bytes.fromhex(request.signature), request.signed(), ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise CredentialError(
            f"Site {request.alias}: the request's signature is not by its own key, so it was altered or damaged, or "
            "whoever sent it does not have the private key: ask the site for it again.", site=request.alias,
        ) from error  # fmt: skip
    return request


def site_credentials(kit: Kit, keys: Path | None = None) -> TrialPki:
    """Return a site's credentials in the form that the commands of its processes take.

    Args:
        kit: The kit.
        keys: Folder of the site's own key; beside the kit if none. Not used if the kit holds the key.

    Raises:
        CredentialError: The key is missing or not in order, or others can read it.
    """
    alias = kit.about.alias
    home = kit.folder / "private" if kit.about.keys == "central" else keys or keys_folder(kit.folder)
    key, public, secret = (home / Path(name).name for name in (KEY, PUBLIC_KEY, SECRET))
    check_site_key(key, public, site=alias)
    read_limited(secret, f"Site {alias}: the secret of its processes")
    for path in (key, secret):
        if path.stat().st_mode & 0o077:
            raise CredentialError(
                f"Site {alias}: others on this machine can read its key or secret: run `chmod 600` on both.",
                detail=str(path), site=alias,
            )  # fmt: skip
    none = Path()  # a site has nothing of the server's
    return TrialPki(
        kit.folder, kit.folder / "ca.crt", none, none, none, {alias: key}, {alias: public}, {alias: secret}
    )
