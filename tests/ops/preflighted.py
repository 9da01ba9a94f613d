"""Fakes and small servers for the preflight's tests: no engine, no network but loopback."""

import contextlib
import datetime
import json
import os
import shutil
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ops.kit_request import make_request
from ops.pki_issue import general_name, issue_server, private_pem
from ops.preflight_engine import Answer
from ops.preflight_run import Installation
from ops.preflight_site import UID, check_kit
from tests.datafiles import segmentation_site
from tests.ops.provisioned import kit_at_site, project

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="NOT TESTED: giving files to uid 10001 needs root")
INFO = {
    "ServerVersion": "26.1.5+dfsg1",
    "DockerRootDir": "/",
    "MemTotal": 32 << 30,
    "NCPU": 8,
    "Runtimes": {"runc": {}},
    "OSType": "linux",
    "SecurityOptions": ["name=seccomp,profile=builtin"],
}


class Programs:
    """Answers of programs by the beginning of their command line; remembers what was called."""

    def __init__(self, **info):
        self.calls = []
        self.answers = {
            "docker info": Answer(0, json.dumps(INFO | info)),
            "docker compose version": Answer(0, "2.26.1-4\n"),
            "docker image inspect": Answer(0, "0.1.0\n"),
            "timedatectl": Answer(127, err="timedatectl: not found"),
            "nvidia-smi": Answer(127, err="nvidia-smi: not found"),
        }

    def __call__(self, argv, seconds):
        line = " ".join(argv)
        self.calls.append(line)
        for begin, answer in self.answers.items():
            if line.startswith(begin):
                return answer
        raise AssertionError(f"unexpected: {line}")


def installation(folder, *, names=("localhost",), port=9092, keys="site", **changes):
    """A whole installation side by side; what the containers' user must read, everybody may or it owns."""
    made = project(folder / "project", ("oak",), coordinator={"names": names, "port": port}, keys=keys)
    kit = kit_at_site(made.folder, "oak", folder)
    open_to_all(kit)
    if keys == "site":
        make_request(kit)
    shutil.copy(kit / "site.toml", folder / "site.toml")
    os.chmod(folder / "site.toml", 0o644)
    open_to_all(segmentation_site(folder / "data", cases=3))
    return made, Installation(kit, environ={}, **changes)


def copied(place, folder):
    """The same installation in another folder: making one takes half a second, mostly for keys and fsync."""
    shutil.copytree(place.kit.parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("project"))
    return Installation(folder / "oak", environ={})


def ready(place):
    """In order, but for the key's owner where this is not run by root."""
    if ROOT:
        own(place.keys_place)
    return place


def own(folder):
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UID, UID)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def kit_of(place):
    return check_kit(place.kit)[1]


def open_to_all(folder):
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)


def pair(folder, authority, names=("localhost",), days=30):
    """Certificate and key of a server in files."""
    folder.mkdir(exist_ok=True)
    certificate, key = issue_server(authority, names, days)
    (folder / "server.crt").write_bytes(certificate)
    (folder / "server.key").write_bytes(key)
    return folder / "server.crt", folder / "server.key"


def dated_pair(folder, authority, begin, end):
    """The same with other dates (days from now), which `issue_server` would not write."""
    key = ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        authority.certificate.subject,
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wardround")]),
        key.public_key(), x509.random_serial_number(),
        now + datetime.timedelta(days=begin), now + datetime.timedelta(days=end),
    )  # fmt: skip
    identity = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName([general_name("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), False)
        .sign(authority.key, hashes.SHA384())
    )
    folder.mkdir(exist_ok=True)
    (folder / "server.crt").write_bytes(certificate.public_bytes(ssl_pem()))
    (folder / "server.key").write_bytes(private_pem(key))
    return folder / "server.crt", folder / "server.key"


def ssl_pem():
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM


@contextlib.contextmanager
def listening(handle, port=0):
    """A server on loopback: `handle(connection)` for each; yields its port."""
    server = socket.create_server(("127.0.0.1", port))
    held = []

    def one(connection):
        with contextlib.suppress(OSError, ssl.SSLError), connection:
            handle(connection)

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in held:
            connection.close()
        thread.join(5)


def tls(certificate, key, alpn=("h2",)):
    """A handler that speaks TLS and waits for the other end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if alpn:
        context.set_alpn_protocols(list(alpn))

    def handle(connection):
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    return handle


def proxy(seen, *, status=b"200 OK", login=None):
    """A handler that forwards CONNECT; `seen` gets every request's head."""

    def handle(connection):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        seen.append(head.decode())
        if login is not None and f"Basic {login}" not in head.decode():
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        connection.sendall(b"HTTP/1.1 " + status + b"\r\nVia: test\r\n\r\n")
        if not status.startswith(b"200"):
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            threading.Thread(target=pump, args=(connection, other), daemon=True).start()
            pump(other, connection)

    return handle


def pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
