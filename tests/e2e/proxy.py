"""A TCP proxy that counts what it passes on, in both directions, and that can be cut like a cable."""

import contextlib
import selectors
import socket
import struct
import threading
import time

RESET = struct.pack("ii", 1, 0)  # close with RST, as a network that forgot the connection answers


class CountingProxy:
    """Listens on a free loopback port and passes every connection on to a target, counting payload bytes."""

    def __init__(self, target):
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._closing = threading.Event()
        self._order = None
        self._hold = False
        self._restore_at = 0.0
        self._peers = {}
        self._spoiled = set()
        self.port = self._listener.getsockname()[1]
        self.up = self.down = self.connections = self.dropped = 0
        self.whole = threading.Event()
        self.whole.set()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._thread.join(5)
        for end in [self._listener, *self._peers]:
            end.close()
        self._selector.close()

    def cut(self, seconds, *, hold=False):
        """Cut the line for some seconds; returns at once, `whole` is set when it is restored.

        Nothing is accepted meanwhile. What is sent on an open connection is lost, and a connection that lost something
        is reset in the end; with `hold` nothing is lost, only late, as TCP makes it of a short outage.
        """
        self.whole.clear()
        self._order = (seconds, hold)

    def _serve(self):
        while not self._closing.is_set():
            self._obey()
            for key, _ in self._selector.select(timeout=0.1):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._peers:  # else it was closed by an event of the same look
                    self._pass_on(key.fileobj, *self._peers[key.fileobj])

    def _obey(self):
        if self._order is not None:
            seconds, self._hold = self._order
            self._order = None
            self._restore_at = time.monotonic() + seconds
            for end in [self._listener, *(self._peers if self._hold else ())]:
                self._unwatch(end)
        elif self._restore_at and time.monotonic() >= self._restore_at:
            self._restore_at = 0.0
            for end in list(self._spoiled):
                if end in self._peers:
                    self._close(end, reset=True)
            self._spoiled.clear()
            for end in [self._listener, *self._peers]:
                self._watch(end)
            self.whole.set()

    def _watch(self, end):
        with contextlib.suppress(KeyError):  # watched already
            self._selector.register(end, selectors.EVENT_READ)

    def _unwatch(self, end):
        with contextlib.suppress(KeyError):
            self._selector.unregister(end)

    def _accept(self):
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self.target)
        except OSError:
            client.close()
            return
        self.connections += 1
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[client], self._peers[server] = (server, "up"), (client, "down")
        self._watch(client)
        self._watch(server)

    def _pass_on(self, source, target, direction):
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(1 << 16)
        if self._restore_at:  # cut: bytes and endings alike do not reach the other side
            self.dropped += len(data)
            self._spoiled.add(source)
            if not data:
                self._unwatch(source)
            return
        if data:
            with contextlib.suppress(OSError):
                setattr(self, direction, getattr(self, direction) + len(data))
                target.sendall(data)
                return
        self._close(source)

    def _close(self, end, *, reset=False):
        other, _ = self._peers[end]
        for one in (end, other):
            self._unwatch(one)
            self._peers.pop(one, None)
            if reset:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()
