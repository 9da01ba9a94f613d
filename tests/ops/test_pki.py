"""Credentials: what is made is accepted by TLS, Flower and the checks; each fault is named."""

import base64
import datetime
import ipaddress
import socket
import ssl
import stat
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, CredentialError
from ops import pki

DAY = datetime.timedelta(days=1)


def now():
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pki.make_trial_pki(tmp_path_factory.mktemp("pki") / "new", ["oak", "elm-2"], names=["superlink"])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return pki.make_trial_pki(tmp_path_factory.mktemp("other"), ["oak"])


def check(made, **changes):
    arguments = {"ca": made.ca, "cert": made.server_cert, "key": made.server_key, "names": ["localhost"]}
    pki.check_credentials(**(arguments | changes))


def test_files_are_private(made):
    for path in [made.folder, *made.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    secrets = [made.server_secret, *made.site_secrets.values()]
    assert len({path.read_bytes() for path in secrets}) == 3
    assert all(len(path.read_bytes()) == 32 for path in secrets)
    private = [path for path in made.folder.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert set(private) == {made.server_key, *made.site_keys.values()}  # the authority's key is forgotten


def test_what_is_made_passes_the_checks(made):
    for name in ("localhost", "127.0.0.1", "::1", "superlink", "SuperLink"):
        check(made, names=[name])
    for site in ("oak", "elm-2"):
        check(made, site_key=made.site_keys[site], site_public=made.site_public[site], site=site)


def test_tls_handshake_by_name_and_address(made):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.server_cert, made.server_key)
    client = ssl.create_default_context(cafile=str(made.ca))
    for name in ("localhost", "127.0.0.1", "superlink"):
        left, right = socket.socketpair()
        with left, right:
            thread = threading.Thread(
                target=lambda end=left: server.wrap_socket(end, server_side=True).close()
            )
            thread.start()
            with client.wrap_socket(right, server_hostname=name) as secured:
                assert secured.version() == "TLSv1.3"
            thread.join(5)


def test_flower_takes_the_site_keys(made):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supernode.cli.flower_supernode import (
        _parse_args_run_supernode,
        _try_setup_client_authentication,
    )

    arguments = _parse_args_run_supernode().parse_args(
        ["--auth-supernode-private-key", str(made.site_keys["oak"])]
    )
    pair = _try_setup_client_authentication(arguments)
    pem = pair[1].public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert try_load_public_key(made.site_public["oak"]) == pem


def test_validity_is_short_and_checked(made):
    certificate = x509.load_pem_x509_certificate(made.server_cert.read_bytes())
    length = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert datetime.timedelta(days=30) <= length <= datetime.timedelta(days=31)
    with pytest.raises(CredentialError, match="authority's certificate expired on"):
        check(made, now=now() + 31 * DAY)
    with pytest.raises(CredentialError, match=r"is not valid before .* clock"):
        check(made, now=now() - 2 * DAY)


def test_wrong_name(made, other):
    with pytest.raises(
        CredentialError, match=r"is for localhost, superlink, 127\.0\.0\.1, ::1, not for example\.org"
    ):
        check(made, names=["localhost", "example.org"])
    with pytest.raises(CredentialError, match="not for superlink"):
        check(other, names=["superlink"])


def test_key_of_another_certificate(made, other):
    with pytest.raises(CredentialError, match="does not match its certificate"):
        check(made, key=other.server_key)


def test_unknown_authority(made, other):
    with pytest.raises(CredentialError, match="signed by another authority"):
        check(made, ca=other.ca)


def test_site_key_and_public_key_of_two_pairs(made, other):
    with pytest.raises(CredentialError, match="Site oak: the private key does not match"):
        check(made, site_key=made.site_keys["oak"], site_public=other.site_public["oak"], site="oak")


def test_unreadable_and_malformed_files_are_named_without_their_path(made, tmp_path):
    rubbish = tmp_path / "secret-place.pem"
    rubbish.write_bytes(b"-----BEGIN NOTHING-----\n")
    missing = tmp_path / "absent.pem"
    faults = [
        ({"ca": missing}, "authority's certificate cannot be read"),
        ({"ca": rubbish}, "authority's certificate is not a certificate"),
        ({"cert": rubbish}, "server's certificate is not a certificate"),
        ({"key": missing}, "server's key cannot be read"),
        ({"key": rubbish}, "server's key is not a private key"),
        ({"site_key": rubbish}, "private key is not an OpenSSH"),
        ({"site_key": made.site_keys["oak"], "site_public": rubbish}, "not an OpenSSH public key"),
    ]
    for change, sentence in faults:
        with pytest.raises(CredentialError, match=sentence) as caught:
            check(made, **change)
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path) in caught.value.detail


def passphrase_key():
    """An OpenSSH key file that says its private part is encrypted."""

    def string(data):
        return len(data).to_bytes(4, "big") + data

    public = b"".join(map(string, (b"ecdsa-sha2-nistp384", b"nistp384", b"\x04" + bytes(96))))
    options = string(bytes(16)) + (16).to_bytes(4, "big")
    head = b"openssh-key-v1\0" + string(b"aes256-ctr") + string(b"bcrypt") + string(options)
    body = base64.encodebytes(head + (1).to_bytes(4, "big") + string(public) + string(bytes(160)))
    return b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + body + b"-----END OPENSSH PRIVATE KEY-----\n"


def test_a_public_key_with_a_compressed_point_is_refused_by_name(made):
    kind, body, *_ = made.site_public["oak"].read_bytes().split()
    blob = bytearray(base64.b64decode(body))
    assert blob[-97] == 4  # an uncompressed point; 02 and 03 begin the compressed ones
    blob[-97] = 2
    with pytest.raises(CredentialError, match="not an OpenSSH public key"):
        pki.parse_public_key(kind + b" " + base64.b64encode(bytes(blob)), site="oak")


def test_site_keys_that_flower_would_refuse(made, tmp_path):
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH)
    curve25519, locked = tmp_path / "ed", tmp_path / "locked"
    curve25519.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(*form, serialization.NoEncryption())
    )
    locked.write_bytes(passphrase_key())
    with pytest.raises(CredentialError, match="another kind"):
        check(made, site_key=curve25519)
    with pytest.raises(CredentialError, match="passphrase"):
        check(made, site_key=locked)


def signed(tmp_path, *, san, days=30, purpose=None):
    """An authority and a server certificate of a hospital's own making."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hospital")])
    start, end = now() - 60 * DAY, now() + days * DAY
    identity = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    usages = dict.fromkeys(pki._USAGES, False) | {"key_cert_sign": True}

    def builder(public):
        return x509.CertificateBuilder(name, name, public, x509.random_serial_number(), start, end)

    root = builder(authority.public_key()).add_extension(x509.BasicConstraints(True, None), True)
    root = root.add_extension(x509.KeyUsage(**usages), True).add_extension(identity, False)
    leaf = builder(key.public_key()).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), False
    )
    if san:
        leaf = leaf.add_extension(x509.SubjectAlternativeName(san), False)
    if purpose:
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([purpose]), False)
    paths = tmp_path / "ca.crt", tmp_path / "own.crt"
    for path, certificate in zip(paths, (root, leaf), strict=True):
        made = certificate.sign(authority, hashes.SHA256())
        path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return {"ca": paths[0], "cert": paths[1]}


def test_certificate_that_has_no_names_for_tls(tmp_path):
    with pytest.raises(CredentialError, match="names no host"):
        pki.check_credentials(**signed(tmp_path, san=[]), names=["hospital"])


def test_own_certificates_with_wildcard_and_address(tmp_path):
    files = signed(
        tmp_path, san=[x509.DNSName("*.example.org"), x509.IPAddress(ipaddress.ip_address("192.0.2.7"))]
    )
    pki.check_credentials(**files, names=["fl.example.org", "192.0.2.7"])
    with pytest.raises(CredentialError, match=r"not for a\.b\.example\.org"):
        pki.check_credentials(**files, names=["a.b.example.org"])
    with pytest.raises(CredentialError, match=r"not for 192\.0\.2\.8"):
        pki.check_credentials(**files, names=["192.0.2.8"])


def test_certificate_for_another_purpose_is_refused(tmp_path):
    files = signed(tmp_path, san=[x509.DNSName("localhost")], purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(CredentialError, match="not accepted by the rules for TLS"):
        pki.check_credentials(**files, names=["localhost"])


def test_expired_server_certificate(tmp_path):
    with pytest.raises(CredentialError, match="expired on"):
        pki.check_credentials(**signed(tmp_path, san=[x509.DNSName("localhost")], days=-1))


@pytest.mark.parametrize("alias", ["", "Oak", "../x", "a/b", "-a", "a b", "ä", "x" * 33])
def test_aliases_that_cannot_be_file_names(tmp_path, alias):
    with pytest.raises(ConfigError, match="alias"):
        pki.make_trial_pki(tmp_path / "pki", [alias])
    assert not (tmp_path / "pki").exists()


def test_doubled_alias_bad_name_and_bad_validity(tmp_path):
    for arguments in (
        {"sites": ["a", "a"]},
        {"sites": ["a"], "names": ["bad näme"]},
        {"sites": ["a"], "days": 0},
    ):
        with pytest.raises(ConfigError):
            pki.make_trial_pki(tmp_path / "pki", **arguments)
        assert not (tmp_path / "pki").exists()


def test_second_call_replaces_everything_and_leaves_no_temporary_file(tmp_path):
    first = pki.make_trial_pki(tmp_path, ["a"])
    before = first.site_keys["a"].read_bytes()
    pki.make_trial_pki(tmp_path, ["a"])
    assert first.site_keys["a"].read_bytes() != before
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]
    check(first)
