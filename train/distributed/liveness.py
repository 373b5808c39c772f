"""Detects ranks that exit early: every rank keeps a TCP connection to rank 0, which closes when the process ends.

:attr:`LivenessMonitor.lost` is the rank that exited without a goodbye. The kernel closes a killed process's sockets
at once, and keepalive probes detect a machine that lost power; an NCCL collective would notice neither for minutes.
A main thread blocked in such a collective cannot react, so the monitor ends the process ``EXIT_TIMEOUT`` seconds after
a loss.

A message is a four-byte big-endian integer: the lost rank, or ``GOODBYE``.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

EXIT_TIMEOUT = 8.0  # seconds after a loss until a process that has not exited is ended
GOODBYE = 2**32 - 1
_HELLO = struct.Struct(">16sI")  # token of the run, rank
_MESSAGE = struct.Struct(">I")
_CONNECT_TIMEOUT = 5.0  # seconds per connection attempt


class LivenessMonitor:
    """Watches the connections of one process in a daemon thread.

    Attributes:
        lost: the first rank known to have exited without a goodbye, or None.
    """

    def __init__(
        self,
        rank: int,
        broadcast: Callable[[Any], Any],
        message_for: Callable[[int], str],
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect to rank 0, or listen on rank 0.

        Args:
            broadcast: returns the JSON value of rank 0 on every rank.
            message_for: returns the error message to print when the given rank was lost, or "" to print nothing.
            on_loss: called once, in the monitor's thread, as the main thread may be blocked.
        """
        self.rank = rank
        self.lost: int | None = None
        self._message_for, self._on_loss, self._exit_handled = message_for, on_loss, False
        self._rank_was_lost, self._rank_0_ended = threading.Event(), threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        if rank == 0:
            server, key = _listen(), secrets.token_bytes(16)
            broadcast([server.getsockname()[1], key.hex(), _addresses()])
            self._start(lambda: self._watch_peers(server, key))
        else:
            port, token, addresses = broadcast(None)
            connection = _connect(addresses, port, _HELLO.pack(bytes.fromhex(token), rank))
            if connection is not None:
                self._peers[0] = connection
                self._start(lambda: self._watch_rank_0(connection))

    @property
    def connected(self) -> bool:
        """Whether this process is notified of a loss; always True on rank 0."""
        return self.rank == 0 or bool(self._peers)

    def wait_for_loss(self, seconds: float) -> int | None:
        """Return the lost rank, or None if no rank is lost within ``seconds``."""
        self._rank_was_lost.wait(seconds)
        return self.lost

    def leave_exit_to_main_thread(self) -> None:
        """Let the main thread end the process: saving may take longer than ``EXIT_TIMEOUT``."""
        self._exit_handled = True

    def wait_for_rank_0(self, seconds: float) -> None:
        """Wait up to ``seconds`` for rank 0 to exit; from now on a loss does not end this process."""
        self._exit_handled = True
        self._rank_0_ended.wait(seconds if self._peers else 0)

    def close(self) -> None:
        """Send a goodbye, so that the exit of this process does not count as a loss."""
        self._exit_handled = True
        with self._lock:
            peers = list(self._peers.values())
        for connection in peers:
            with suppress(OSError):
                connection.sendall(_MESSAGE.pack(GOODBYE))
                connection.shutdown(socket.SHUT_WR)

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name="earshard-liveness", daemon=True).start()

    def _watch_peers(self, server: socket.socket, token: bytes) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is server:
                        accepted = _accept(server, token)
                        if accepted is not None:
                            peer, connection = accepted
                            with self._lock:
                                self._peers[peer] = connection
                            selector.register(connection, selectors.EVENT_READ, peer)
                            if self.lost is not None:
                                self._send_lost_rank(self.lost)
                    else:
                        if _receive_message(connection) != GOODBYE:
                            self._handle_lost_rank(key.data)
                        selector.unregister(connection)
                        connection.close()

    def _watch_rank_0(self, connection: socket.socket) -> None:
        said_goodbye = False
        while (message := _receive_message(connection)) is not None:
            if message == GOODBYE:
                said_goodbye = True
            else:
                self._handle_lost_rank(message)
        connection.close()
        self._rank_0_ended.set()
        if not said_goodbye:
            self._handle_lost_rank(0)

    def _handle_lost_rank(self, rank: int) -> None:
        if self._exit_handled or self.lost is not None:
            return
        self.lost = rank
        self._rank_was_lost.set()
        if self.rank == 0:
            self._send_lost_rank(rank)
        timer = threading.Timer(EXIT_TIMEOUT, self._exit_process)
        timer.daemon = True
        timer.start()
        self._on_loss()

    def _send_lost_rank(self, rank: int) -> None:
        with self._lock:
            others = [connection for peer, connection in self._peers.items() if peer != rank]
        for connection in others:
            with suppress(OSError):
                connection.sendall(_MESSAGE.pack(rank))

    def _exit_process(self) -> None:
        """End the process if the main thread has not handled the loss; it may be blocked in a collective."""
        if self._exit_handled:
            return
        if self.lost is not None and (message := self._message_for(self.lost)):
            print(f"failed: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """Return names of this machine, likeliest first; the launcher's master may be another machine than rank 0's."""
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    local_address = ""
    with suppress(OSError):
        family, _, _, _, destination = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(destination)  # sends nothing; the kernel selects the local address of the route
            local_address = probe.getsockname()[0]
    return list(dict.fromkeys(name for name in (local_address, master[0], socket.gethostname()) if name))


def _connect(addresses: list[str], port: int, hello: bytes) -> socket.socket | None:
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT)
            with suppress(OSError):
                connection.sendall(hello)
                if connection.recv(1) == b"K":  # otherwise another service answered
                    _enable_keepalive(connection)
                    return connection
            connection.close()
    return None


def _accept(server: socket.socket, token: bytes) -> tuple[int, socket.socket] | None:
    connection, _ = server.accept()
    with suppress(OSError):
        connection.settimeout(_CONNECT_TIMEOUT)
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(hello) == _HELLO.size and secrets.compare_digest(_HELLO.unpack(hello)[0], token):
            connection.sendall(b"K")
            _enable_keepalive(connection)
            return _HELLO.unpack(hello)[1], connection
    connection.close()
    return None


def _enable_keepalive(connection: socket.socket) -> None:
    """Make the socket blocking; a peer that answers no probe for 25 s counts as lost."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive_message(connection: socket.socket) -> int | None:
    """Return the next message, or None if the peer closed the connection."""
    with suppress(OSError):
        data = connection.recv(_MESSAGE.size, socket.MSG_WAITALL)
        if len(data) == _MESSAGE.size:
            return int(_MESSAGE.unpack(data)[0])
    return None
