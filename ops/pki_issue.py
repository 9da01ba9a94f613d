"""Issuing: an authority, server certificates signed by it, site keys, and files only their owner can read.

Elliptic curves throughout (P-384, SHA-384): Flower takes NIST curves for its SuperNodes, and keys are small enough to
be carried in a mail.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError

USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
SSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
_PEM = serialization.Encoding.PEM
_SKEW = datetime.timedelta(days=1)  # a site whose clock is behind shall be told so by Flower, not by TLS


@dataclass(frozen=True)
class Authority:
    """A certificate authority: what sites trust, and the key that signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate (PEM)."""
        return self.certificate.public_bytes(_PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key (PEM, PKCS #8, no passphrase)."""
        return private_pem(self.key)


def new_authority(name: str, days: int) -> Authority:
    """Make a certificate authority that may sign certificates but no further authority.

    Args:
        name: Its common name (at most 64 characters).
        days: Validity from now.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(name)
    start, end = _validity(days)
    usage = dict.fromkeys(USAGES, False) | {
        "key_cert_sign": True,
        "crl_sign": True,
        "digital_signature": True,
    }
    identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), start, end)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(identity, critical=False)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate, key)


def issue_server(authority: Authority, names: Sequence[str], days: int) -> tuple[bytes, bytes]:
    """Return a new server certificate and its private key (both PEM).

    Args:
        authority: Signs it.
        names: Host names and addresses by which the server is called.
        days: Validity from now; never longer than the authority's own.

    Raises:
        ConfigError: A name that is neither a host name nor an address.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    start, end = _validity(days)
    own = authority.certificate
    start, end = max(start, own.not_valid_before_utc), min(end, own.not_valid_after_utc)
    identity = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    serial, usage = x509.random_serial_number(), dict.fromkeys(USAGES, False) | {"digital_signature": True}
    certificate = (
        x509.CertificateBuilder(own.subject, _subject("wardround"), key.public_key(), serial, start, end)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority.key, hashes.SHA384())
    )
    return certificate.public_bytes(_PEM), private_pem(key)


def new_site_key(alias: str) -> tuple[bytes, bytes]:
    """Return a site's new private key and public key (both OpenSSH), the latter with its alias as comment."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    return private, key.public_key().public_bytes(*SSH) + f" {alias}\n".encode()


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM form without a passphrase (a server cannot type one)."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def general_name(name: str) -> x509.GeneralName:
    """Return a host name or an address as certificates write it.

    Raises:
        ConfigError: It is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError(f"'{name}' is neither a host name nor an address.") from error


def write_private(path: Path, content: bytes) -> Path:
    """Write a file that only its owner can read (mode 0600), whole or not at all.

    Written by root it belongs to the folder's owner: a project that was given to a container's user stays readable for it
    when root approves a site.

    Raises:
        OSError: The volume cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.geteuid() == 0:
                folder = path.parent.stat()
                os.fchown(file.fileno(), folder.st_uid, folder.st_gid)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _validity(days: int) -> tuple[datetime.datetime, datetime.datetime]:
    start = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - _SKEW
    return start, start + _SKEW + datetime.timedelta(days=days)
