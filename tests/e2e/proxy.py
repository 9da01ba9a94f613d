"""A TCP proxy that counts what it passes on, in both directions."""

import selectors
import socket
import threading


class CountingProxy:
    """Listens on a free loopback port and passes every connection on to a target, counting payload bytes."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._closing = threading.Event()
        self.port = self._listener.getsockname()[1]
        self.up = self.down = self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()

    def _serve(self):
        while not self._closing.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._pass_on(key.fileobj, *key.data)

    def _accept(self):
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        self.connections += 1
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(client, selectors.EVENT_READ, (server, "up"))
        self._selector.register(server, selectors.EVENT_READ, (client, "down"))

    def _pass_on(self, source, target, direction):
        try:
            data = source.recv(1 << 16)
            if data:
                setattr(self, direction, getattr(self, direction) + len(data))
                target.sendall(data)
                return
        except OSError:
            pass
        for end in (source, target):
            if end in [key.fileobj for key in self._selector.get_map().values()]:
                self._selector.unregister(end)
            end.close()
