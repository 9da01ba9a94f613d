"""Keys and certificates: made for a trial, checked for anybody.

A federation needs four kinds of credentials: a certificate authority that every site trusts, a server
certificate for the coordinator, one elliptic-curve key pair per site (the coordinator registers its public
half), and one shared secret per pair of SuperLink or SuperNode and the launcher of its apps.
`make_trial_pki` makes all of them, short-lived; `check_credentials` tells in one sentence what is wrong
with any, before a TLS handshake fails with a riddle.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from common.errors import ConfigError, CredentialError
from ops.pki_issue import SSH, general_name, issue_server, new_authority, new_site_key, write_private
from ops.pki_issue import USAGES as _USAGES  # noqa: F401  (tests build certificates of their own with it)

VALID_DAYS = 30
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")

_NIST_CURVES = (ec.SECP192R1, ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True)
class TrialPki:
    """Where the credentials of a trial lie; secret files have mode 0600, folders 0700."""

    folder: Path
    ca: Path
    server_cert: Path
    server_key: Path
    server_secret: Path
    site_keys: dict[str, Path] = field(default_factory=dict)
    site_public: dict[str, Path] = field(default_factory=dict)
    site_secrets: dict[str, Path] = field(default_factory=dict)


def make_trial_pki(
    folder: Path, sites: Sequence[str], *, names: Sequence[str] = (), days: int = VALID_DAYS
) -> TrialPki:
    """Make all credentials of a trial, new ones at every call.

    The authority's private key is used and forgotten: nobody can sign another certificate with it later.

    Args:
        folder: Made if missing, set to mode 0700. Gets `ca.crt`, `server/` and a folder per site in `sites/`.
        sites: Aliases (lower-case letters, digits, `-` and `_`, at most 32).
        names: Host names or addresses of the coordinator beside localhost, 127.0.0.1 and ::1.
        days: Validity of the certificates from now (1 or more).

    Raises:
        ConfigError: An alias that cannot be a file name, a doubled alias, or a validity below a day.
    """
    for alias in sites:
        if not ALIAS.fullmatch(alias):
            raise ConfigError(
                f"Site alias '{alias}' cannot be used: expected 1-32 lower-case letters, digits, '-' or '_'."
            )
    if len(set(sites)) != len(sites):
        raise ConfigError("Two sites have the same alias: give each site its own.")
    if days < 1:
        raise ConfigError(f"Certificates must be valid for at least 1 day, got {days}.")
    authority = new_authority("wardround trial authority", days)
    cert, key = issue_server(authority, [*dict.fromkeys((*LOCAL_NAMES, *names))], days)
    for path in (folder, folder / "server", folder / "sites", *(folder / "sites" / alias for alias in sites)):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    pki = TrialPki(
        folder=folder,
        ca=write_private(folder / "ca.crt", authority.pem),
        server_cert=write_private(folder / "server" / "server.crt", cert),
        server_key=write_private(folder / "server" / "server.key", key),
        server_secret=write_private(folder / "server" / "secret", secrets.token_bytes(32)),
    )
    for alias in sites:
        home = folder / "sites" / alias
        private, public = new_site_key(alias)
        pki.site_keys[alias] = write_private(home / "key", private)
        pki.site_public[alias] = write_private(home / "key.pub", public)
        pki.site_secrets[alias] = write_private(home / "secret", secrets.token_bytes(32))
    return pki


def check_credentials(
    *,
    ca: Path,
    cert: Path | None = None,
    key: Path | None = None,
    names: Sequence[str] = (),
    site_key: Path | None = None,
    site_public: Path | None = None,
    site: str = "",
    now: datetime.datetime | None = None,
) -> None:
    """Check that credentials are readable, current and fit together; what is not given is not checked.

    Args:
        ca: Certificate authority (PEM).
        cert: Server certificate, intermediates after it (PEM).
        key: Private key of the server certificate (PEM, no passphrase).
        names: Host names or addresses under which sites will call the server.
        site_key: A site's private key (OpenSSH, elliptic curve, no passphrase).
        site_public: The public half that the coordinator registers (OpenSSH).
        site: Alias for the sentences.
        now: The time to check for; the clock's if none.

    Raises:
        CredentialError: With the first reason found, in one sentence.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    authority = _load_certificates(ca, "The authority's certificate")[0]
    _check_dates(authority, "The authority's certificate", moment)
    if cert is not None:
        chain = _load_certificates(cert, "The server's certificate")
        _check_dates(chain[0], "The server's certificate", moment)
        if key is not None:
            _check_pair(chain[0], key)
        _check_chain(authority, chain, names, moment)
    if site_key is not None:
        check_site_key(site_key, site_public, site=site)


def check_site_key(private: Path, public: Path | None = None, *, site: str = "") -> None:
    """Check a site's private key and, if given, that the public file is its other half.

    Raises:
        CredentialError: Unreadable, protected by a passphrase, of a kind Flower does not take, or not a pair.
    """
    who = f"Site {site}: the private key" if site else "The site's private key"
    try:
        loaded = serialization.load_ssh_private_key(_read(private, who), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError) as error:
        reason = "is protected by a passphrase" if "assw" in str(error) else "is not an OpenSSH private key"
        raise CredentialError(
            f"{who} {reason}: make one with `ssh-keygen -t ecdsa -b 384 -N ''`.",
            detail=f"{private}: {error}",
            site=site,
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or not isinstance(loaded.curve, _NIST_CURVES):
        raise CredentialError(
            f"{who} is of another kind than an elliptic-curve (NIST) key: "
            "make one with `ssh-keygen -t ecdsa -b 384 -N ''`.",
            detail=str(private),
            site=site,
        )
    if public is not None:
        mine = loaded.public_key().public_bytes(*SSH)
        if load_public_key(public, site=site).public_bytes(*SSH) != mine:
            raise CredentialError(
                f"{who} does not match the public key to be registered: use the two halves of one pair.",
                detail=f"{private}, {public}",
                site=site,
            )


def load_public_key(path: Path, *, site: str = "") -> ec.EllipticCurvePublicKey:
    """Read a site's public key (one OpenSSH line).

    Raises:
        CredentialError: Unreadable, or not an elliptic-curve (NIST) key.
    """
    who = f"Site {site}: the public key" if site else "The site's public key"
    return parse_public_key(_read(path, who), site=site, detail=str(path))


def parse_public_key(line: bytes, *, site: str = "", detail: str = "") -> ec.EllipticCurvePublicKey:
    """Return the key of one OpenSSH line.

    Args:
        line: The line.
        site: Alias for the sentences.
        detail: Where the line is from.

    Raises:
        CredentialError: It is not an elliptic-curve (NIST) key.
    """
    who = f"Site {site}: the public key" if site else "The site's public key"
    try:
        loaded = serialization.load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm, NotImplementedError) as error:  # the last: a compressed point
        raise CredentialError(
            f"{who} is not an OpenSSH public key.", detail=f"{detail}: {error}", site=site
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePublicKey) or not isinstance(loaded.curve, _NIST_CURVES):
        raise CredentialError(
            f"{who} is of another kind than an elliptic-curve (NIST) key.", detail=detail, site=site
        )
    return loaded


def load_public_pem(path: Path, *, site: str = "") -> bytes:
    """Return a site's public key as Flower lists it (PEM).

    Raises:
        CredentialError: The file cannot be read or holds no such key.
    """
    key = load_public_key(path, site=site)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path, who: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialError(
            f"{who} cannot be read ({error.strerror or 'unknown reason'}): check the file and its rights.",
            detail=str(error),
        ) from error


def _load_certificates(path: Path, who: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path, who))
    except ValueError as error:
        raise CredentialError(
            f"{who} is not a certificate in PEM form.", detail=f"{path}: {error}"
        ) from error


def _check_dates(certificate: x509.Certificate, who: str, now: datetime.datetime) -> None:
    if now > certificate.not_valid_after_utc:
        raise CredentialError(
            f"{who} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: issue a new one."
        )
    if now < certificate.not_valid_before_utc:
        raise CredentialError(
            f"{who} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
            "check this machine's clock."
        )


def _check_pair(certificate: x509.Certificate, key: Path) -> None:
    try:
        private = serialization.load_pem_private_key(_read(key, "The server's key"), None)
    except TypeError as error:
        raise CredentialError(
            "The server's key is protected by a passphrase, which a server cannot type: store it without.",
            detail=str(key),
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CredentialError(
            "The server's key is not a private key in PEM form.", detail=f"{key}: {error}"
        ) from error
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise CredentialError(
            "The server's key does not match its certificate: use the pair that was issued together.",
            detail=str(key),
        )


def _check_chain(
    authority: x509.Certificate, chain: list[x509.Certificate], names: Sequence[str], now: datetime.datetime
) -> None:
    """Check who signed, and that every name is covered."""
    leaf, intermediates = chain[0], chain[1:]
    try:
        (intermediates or [leaf])[-1].verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CredentialError(
            "The server's certificate was signed by another authority than the one given: "
            "give every site the authority that signed it.",
            detail=str(error),
        ) from error
    known = _names(leaf)
    if not known:
        raise CredentialError(
            "The server's certificate names no host (no subject alternative name): issue one with the name."
        )
    for name in names or known[:1]:
        if _normal(name) not in known and not any(_covers(pattern, name) for pattern in known):
            raise CredentialError(
                f"The server's certificate is for {', '.join(known)}, not for {name}: "
                "call the server by one of these names, or issue a certificate for this one."
            )
        policy = verification.PolicyBuilder().store(verification.Store([authority])).time(now)
        general = general_name(name)
        subject = verification.IPAddress(general.value) if isinstance(general, x509.IPAddress) else None
        try:
            policy.build_server_verifier(subject or verification.DNSName(name)).verify(leaf, intermediates)
        except verification.VerificationError as error:
            raise CredentialError(
                "The server's certificate is not accepted by the rules for TLS: issue a new one.",
                detail=str(error),
            ) from error


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _normal(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def _covers(pattern: str, name: str) -> bool:
    """A wildcard stands for exactly one label."""
    return pattern.startswith("*.") and name.lower().partition(".")[2] == pattern[2:].lower()
