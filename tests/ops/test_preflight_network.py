"""The way to the Fleet port, against real servers on loopback: right, and wrong in every way that was seen."""

import base64
import socket
import threading
from concurrent import futures

import grpc
import pytest

from common.errors import ConfigError, CredentialError, ProcessError
from ops.pki_issue import new_authority
from ops.preflight_network import Route, check_connection, check_name, check_tls
from ops.preflight_proxy import bypassed, chosen_proxy, parse_proxy
from tests.ops.preflighted import dated_pair, free_port, listening, pair, proxy, tls

SECONDS = 5.0
PORT = 9092


@pytest.fixture(scope="module")
def authority():
    return new_authority("wardround liver-2026", 100)


@pytest.fixture(scope="module")
def right(authority, tmp_path_factory):
    return pair(tmp_path_factory.mktemp("right"), authority)


def handshake(port, authority, through=None, seconds=SECONDS, host="localhost"):
    return check_tls(Route(host, port, through), authority.pem, seconds=seconds)


def test_right_server(authority, right):
    with listening(tls(*right)) as port:
        assert check_connection(Route("localhost", port)).mark == "ok"
        found = handshake(port, authority)
    assert found.finding.mark == "ok"
    assert "TLSv1.3, HTTP/2, certificate of the kit's authority for localhost" in found.finding.found
    assert found.begins is not None


def test_certificate_that_ends_soon_is_a_warning(authority, tmp_path):
    with listening(tls(*pair(tmp_path, authority, days=3))) as port:
        found = handshake(port, authority).finding
    assert found.mark == "warn"
    assert "ends soon" in found.remedy


@pytest.mark.parametrize("name", ["hospital firewall", "wardround liver-2026"])
def test_another_authority_is_told_with_its_name(authority, tmp_path, name):
    """Also one that calls itself like ours."""
    with listening(tls(*pair(tmp_path, new_authority(name, 10)))) as port:
        found = handshake(port, authority)
    assert found.finding.mark == "fail"
    assert found.finding.exit_code == CredentialError.exit_code
    assert "another authority than the kit's" in found.finding.found
    assert "exempt" in found.finding.remedy
    assert f"issued by CN={name}" in found.finding.detail
    assert name not in found.finding.found  # the name of the hospital's firewall is not passed on
    assert found.begins is None


def test_another_name(authority, tmp_path):
    with listening(tls(*pair(tmp_path, authority, names=("fl.example.org", "192.0.2.7")))) as port:
        found = handshake(port, authority).finding
        address = handshake(port, authority, host="127.0.0.1").finding
    assert "not for localhost" in found.found
    assert found.detail == "for fl.example.org, 192.0.2.7"
    assert "not for 127.0.0.1" in address.found


@pytest.mark.parametrize(
    ("begin", "end", "said"), [(-9, -2, "has expired"), (2, 9, "not valid yet")], ids=["expired", "not yet"]
)
def test_dates_that_do_not_fit(authority, tmp_path, begin, end, said):
    with listening(tls(*dated_pair(tmp_path, authority, begin, end))) as port:
        found = handshake(port, authority).finding
    assert found.mark == "fail"
    assert said in found.found
    assert "clock" in found.remedy


def test_no_http2(authority, right):
    for alpn in ((), ("http/1.1",)):
        with listening(tls(*right, alpn=alpn)) as port:
            found = handshake(port, authority).finding
        assert found.mark == "fail"
        assert "does not speak HTTP/2" in found.found


def test_plain_text_is_no_tls(authority):
    with listening(lambda connection: connection.sendall(b"220 mail.example.org ready\r\n")) as port:
        found = handshake(port, authority).finding
    assert found.exit_code == ProcessError.exit_code
    assert "does not speak TLS" in found.found


def test_server_that_hangs_up_and_one_that_is_silent(authority):
    with listening(lambda connection: connection.recv(10)) as port:
        assert "ends the connection" in handshake(port, authority).finding.found
    wait = threading.Event()
    with listening(lambda connection: wait.wait(5)) as port:
        found = handshake(port, authority, seconds=0.3).finding
        wait.set()
    assert "began no TLS within" in found.found


def test_nobody_listens(authority):
    port = free_port()
    found = check_connection(Route("127.0.0.1", port))
    assert found.mark == "warn"  # between two runs nobody listens: a site may be started before one begins
    assert "refuses the connection" in found.found
    assert f"to 127.0.0.1:{port} (TCP)" in found.remedy
    assert "connects by itself" in found.remedy
    assert "refuses" in handshake(port, authority).finding.found


def test_time_out_of_a_connection(monkeypatch):
    def slow(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", slow)
    found = check_connection(Route("192.0.2.7", 9092), seconds=3)
    assert "did not answer within 3 s" in found.found
    assert "firewall" in found.found


def test_names():
    rows = [(2, 1, 6, "", ("192.0.2.7", 0)), (2, 1, 6, "", ("192.0.2.8", 0))]
    route = Route("fl.example.org", 9092)
    assert (
        check_name(route, resolver=lambda *_, **__: rows).found == "fl.example.org is 192.0.2.7, 192.0.2.8."
    )
    assert check_name(Route("192.0.2.7", 9092), resolver=None).mark == "ok"

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    found = check_name(route, resolver=unknown)
    assert found.mark == "fail"
    assert "is not known here" in found.found
    wait = threading.Event()
    slow = check_name(route, resolver=lambda *_, **__: wait.wait(5) and rows, seconds=0.1)
    wait.set()
    assert "not looked up in time" in slow.found


def test_name_of_a_proxy_is_looked_up_instead():
    way = parse_proxy("http://proxy.hospital.example:3128", "https_proxy")
    rows = [(2, 1, 6, "", ("10.0.0.9", 0))]
    asked = []
    found = check_name(
        Route("fl.example.org", 9092, way), resolver=lambda *a, **_: asked.append(a[0]) or rows
    )
    assert asked == ["proxy.hospital.example"]
    assert found.mark == "ok"
    assert "hospital" not in found.found
    assert "proxy.hospital.example" in found.detail


def test_through_a_proxy(authority, right):
    seen = []
    with listening(tls(*right)) as port, listening(proxy(seen)) as at:
        way = parse_proxy(f"http://127.0.0.1:{at}", "https_proxy")
        connection = check_connection(Route("localhost", port, way))
        found = handshake(port, authority, way)
    assert connection.mark == found.finding.mark == "ok"
    assert "through a proxy (https_proxy)" in connection.found
    assert [head.splitlines()[0] for head in seen] == [f"CONNECT localhost:{port} HTTP/1.1"] * 2


def test_proxy_that_looks_inside_shows_another_authority(authority, right, tmp_path):
    """It answers CONNECT, and then speaks TLS itself."""
    inside = tls(*pair(tmp_path, new_authority("Hospital Web Gateway", 10)))

    def intercept(connection):
        while not connection.recv(4096).endswith(b"\r\n\r\n"):
            pass
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        inside(connection)

    with listening(tls(*right)) as port, listening(intercept) as at:
        found = handshake(port, authority, parse_proxy(f"http://127.0.0.1:{at}", "https_proxy")).finding
    assert "another authority" in found.found
    assert "the proxy opens TLS" in found.remedy
    assert "Hospital Web Gateway" in found.detail


def test_proxy_with_a_password_that_is_never_shown(right):
    login = base64.b64encode(b"ward:s3cret/x").decode()
    with listening(tls(*right)) as port, listening(proxy([], login=login)) as at:
        known = parse_proxy(f"http://ward:s3cret%2Fx@127.0.0.1:{at}", "https_proxy")
        other = parse_proxy(f"http://ward:wrong@127.0.0.1:{at}", "https_proxy")
        found, refused = (check_connection(Route("localhost", port, way)) for way in (known, other))
    assert found.mark == "ok"
    assert "wants a name and a password" in refused.found
    assert known.url == f"http://ward:s3cret%2Fx@127.0.0.1:{at}"
    assert "s3cret" not in repr(known) + repr(found) + repr(refused)


@pytest.mark.parametrize(
    ("status", "said"), [(b"403 Forbidden", "does not open a way"), (b"502 Bad Gateway", "status 502")]
)
def test_proxy_that_refuses(status, said):
    with listening(proxy([], status=status)) as at:
        found = check_connection(Route("fl.example.org", 9092, parse_proxy(f"127.0.0.1:{at}", "https_proxy")))
    assert found.mark == (
        "warn" if b"502" in status else "fail"
    )  # 502: the proxy lets through, no run is under way
    assert said in found.found
    assert ("connects by itself" if b"502" in status else "no_proxy") in found.remedy


def test_something_else_than_a_proxy():
    with listening(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")) as at:
        way = parse_proxy(f"127.0.0.1:{at}", "https_proxy")
        assert "does not answer as a proxy does" in check_connection(Route("localhost", 1, way)).found
    gone = Route("localhost", 1, parse_proxy(f"127.0.0.1:{at}", "https_proxy"))
    assert "The proxy (https_proxy) refuses" in check_connection(gone).found


def test_which_variable_counts():
    def chosen(**environ):
        found = chosen_proxy("fl.example.org", 9092, environ)
        return (found.variable, found.host, found.port) if found else None

    assert chosen() is None
    assert chosen(https_proxy="") is None
    assert chosen(HTTPS_PROXY="http://p:3128") == ("HTTPS_PROXY", "p", 3128)
    assert chosen(HTTPS_PROXY="http://q:1", https_proxy="http://p:3128") == ("https_proxy", "p", 3128)
    assert chosen(https_proxy="http://q:1", grpc_proxy="p") == ("grpc_proxy", "p", 80)
    assert chosen(https_proxy="http://p:1", no_proxy="example.org") is None
    assert chosen(https_proxy="http://p:1", NO_PROXY="example.com") == ("https_proxy", "p", 1)
    assert chosen(https_proxy="http://p:1", no_grpc_proxy="x", no_proxy="*") == ("https_proxy", "p", 1)
    assert chosen(WARDROUND_PROXY="http://p:1", no_proxy="*") == ("WARDROUND_PROXY", "p", 1)


@pytest.mark.parametrize(
    "text", ["https://p:3128", "socks5://p:1080", "http://:3128", "http://p:x", "http://"]
)
def test_proxies_that_cannot_be_used(text):
    with pytest.raises(ConfigError, match=r"https_proxy names no proxy.*http://HOST:PORT"):
        parse_proxy(text, "https_proxy")


@pytest.mark.parametrize(
    ("entries", "host", "expected"),
    [
        ("*", "fl.example.org", True),
        ("example.org", "fl.example.org", True),
        (".example.org", "fl.example.org", True),
        ("*.example.org", "fl.example.org", True),
        ("FL.example.ORG", "fl.example.org", True),
        ("ample.org", "fl.example.org", False),
        ("localhost, example.com", "fl.example.org", False),
        ("fl.example.org:9092", "fl.example.org", True),
        ("fl.example.org:443", "fl.example.org", False),
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.0/30", "192.0.2.7", False),
        ("2001:db8::/32", "2001:db8::7", True),
        ("[2001:db8::7]:9092", "2001:db8::7", True),
        ("", "fl.example.org", False),
        (" , ", "fl.example.org", False),
    ],
)
def test_no_proxy(entries, host, expected):
    assert bypassed(host, PORT, entries) is expected


def test_grpc_goes_the_way_that_was_checked(authority, right, monkeypatch):
    """gRPC itself, with the variables as the kit's compose file sets them: by CONNECT, and not for its own loopback."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    certificate, key = (path.read_bytes() for path in right)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    local = server.add_insecure_port("127.0.0.1:0")
    server.start()
    seen = []
    try:
        with listening(proxy(seen)) as at:
            monkeypatch.setenv("grpc_proxy", parse_proxy(f"127.0.0.1:{at}", "https_proxy").url)
            monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")  # here the coordinator is called localhost
            with grpc.secure_channel(
                f"localhost:{port}", grpc.ssl_channel_credentials(authority.pem)
            ) as channel:
                grpc.channel_ready_future(channel).result(10)
            with grpc.insecure_channel(f"127.0.0.1:{local}") as channel:
                grpc.channel_ready_future(channel).result(10)
            monkeypatch.setenv("grpc_proxy", "")
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{at}")
            with grpc.secure_channel(
                f"localhost:{port}", grpc.ssl_channel_credentials(authority.pem)
            ) as channel:
                grpc.channel_ready_future(channel).result(10)
    finally:
        server.stop(None)
    assert [head.splitlines()[0].split()[:2] for head in seen] == [["CONNECT", f"localhost:{port}"]]
