"""Ports: reservations hold against others, let the real server in, and end with their owner."""

import concurrent.futures
import os
import socket
import subprocess
import sys

import grpc
import pytest

from common.errors import ProcessError
from ops import ports


@pytest.fixture(autouse=True)
def _release():
    yield
    ports.release_ports()


def test_ports_are_distinct_and_free():
    got = ports.free_ports(50)
    assert len(set(got)) == 50
    for port in got:
        ports.check_port(ports.LOOPBACK, port)


def test_two_trials_at_once_get_different_ports():
    code = (
        "from ops.ports import free_ports; import sys; print(*free_ports(300), flush=True); sys.stdin.read()"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        mine = ports.free_ports(300)
        theirs = [[int(word) for word in other.stdout.readline().split()] for other in others]
    finally:
        for other in others:
            other.communicate(input="")
    assert len(set(mine) | set(theirs[0]) | set(theirs[1])) == 900


def test_nobody_who_asks_for_any_port_gets_a_reserved_one():
    reserved = set(ports.free_ports(500))
    sockets = [socket.create_server((ports.LOOPBACK, 0)) for _ in range(200)]
    try:
        assert not reserved & {item.getsockname()[1] for item in sockets}
    finally:
        for item in sockets:
            item.close()


def test_grpc_server_starts_on_a_port_that_is_still_reserved():
    (port,) = ports.free_ports(1)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    try:
        assert server.add_insecure_port(f"{ports.LOOPBACK}:{port}") == port
        server.start()
        with socket.create_connection((ports.LOOPBACK, port), timeout=5):
            pass
    finally:
        server.stop(None).wait()


def test_taken_port_is_named_with_its_holder():
    with socket.create_server((ports.LOOPBACK, 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(
            ProcessError, match=f"Port {port} on 127.0.0.1 .* process {os.getpid()}"
        ) as caught:
            ports.check_port(ports.LOOPBACK, port)
    assert "python" in caught.value.detail.lower() or "pytest" in caught.value.detail.lower()
    assert "python" not in str(caught.value).lower()  # a program's path is local detail
    ports.check_port(ports.LOOPBACK, port)


def test_address_of_another_machine_is_refused():
    with pytest.raises(ProcessError, match="cannot be bound"):
        ports.check_port("192.0.2.1", 45000)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_port_numbers_that_do_not_exist(port):
    with pytest.raises(ProcessError, match="does not exist"):
        ports.check_port(ports.LOOPBACK, port)


def test_released_port_can_be_taken_again():
    (port,) = ports.free_ports(1)
    ports.release_ports([port, 1])
    with socket.create_server((ports.LOOPBACK, port)) as server:
        assert server.getsockname()[1] == port


def test_too_many_ports_is_a_clear_error_and_leaves_none_held(monkeypatch):
    real = socket.socket

    class Scarce(real):
        made = 0

        def bind(self, address):
            Scarce.made += 1
            if Scarce.made > 3:
                raise OSError(98, "Address already in use")
            super().bind(address)

    monkeypatch.setattr(ports.socket, "socket", Scarce)
    with pytest.raises(ProcessError, match=r"Expected 10 free ports on 127\.0\.0\.1, got 3"):
        ports.free_ports(10)
    assert not ports._held


def test_two_commands_cannot_have_one_port():
    (port,) = ports.free_ports(1)
    second = pytest.raises(ProcessError, match=f"SuperLink on port {port + 1}")
    with ports.alone_at(port, port + 1), second, ports.alone_at(port + 1):
        pass
    with ports.alone_at(port):
        pass
    ports.release_ports([port])
