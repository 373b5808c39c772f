"""Who of a run's processes is still there: one TCP connection from every rank to rank 0, which ends when its rank ends.

In: a rank and a way to tell every rank where rank 0 listens. Out: :attr:`LivenessMonitor.lost`, the rank that ended
without saying goodbye. The kernel closes the sockets of a killed process at once, on whatever machine, and keepalive
probes find a machine that lost power; a collective of NCCL would notice neither for minutes. A main thread that
waits in such a collective cannot act on it, so the process ends itself ``GRACE`` seconds after a loss.

Messages are four bytes, big-endian: the rank that was lost, or ``GOODBYE``.
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

EXIT_TIMEOUT = 8.0  # seconds between the loss of a rank and the end of a process that does not end by itself
GOODBYE = 2**32 - 1
_HELLO = struct.Struct(">16sI")  # the run's token, the rank
_MESSAGE = struct.Struct(">I")
_CONNECT_TIMEOUT = 5.0  # seconds for one attempt to connect


class LivenessMonitor:
    """The connections of one process; a daemon thread watches them.

    Attributes:
        lost: the first rank known to have ended without a goodbye, or None.
    """

    def __init__(self, rank: int, broadcast: Callable[[Any], Any], message_for: Callable[[int], str]) -> None:
        """``broadcast`` gives rank 0's JSON value to all; ``tells(lost)`` is this process's last sentence, or ""."""
        self.rank = rank
        self.lost: int | None = None
        self._message_for, self._exit_handled = message_for, False
        self._rank_was_lost, self._rank_0_ended = threading.Event(), threading.Event()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        if rank == 0:
            server, key = _listen(), secrets.token_bytes(16)
            broadcast([server.getsockname()[1], key.hex(), _addresses()])
            self._start(lambda: self._watch_peers(server, key))
        else:
            port, token, addresses = broadcast(None)
            line = _connect(addresses, port, _HELLO.pack(bytes.fromhex(token), rank))
            if line is not None:
                self._peers[0] = line
                self._start(lambda: self._watch_rank_0(line))

    @property
    def connected(self) -> bool:
        """Whether this process hears of a loss; rank 0 always does."""
        return self.rank == 0 or bool(self._peers)

    def wait_for_loss(self, seconds: float) -> int | None:
        """The lost rank, waiting up to ``seconds`` for one."""
        self._rank_was_lost.wait(seconds)
        return self.lost

    def leave_exit_to_main_thread(self) -> None:
        """The main thread ends the process in its own time: saving may take longer than ``GRACE``."""
        self._exit_handled = True

    def wait_for_rank_0(self, seconds: float) -> None:
        """Return when rank 0 has ended, or after ``seconds``; a loss does not end this process any more."""
        self._exit_handled = True
        self._rank_0_ended.wait(seconds if self._peers else 0)

    def close(self) -> None:
        """Say goodbye: from now on the end of this process is no loss."""
        self._exit_handled = True
        with self._lock:
            peers = list(self._peers.values())
        for line in peers:
            with suppress(OSError):
                line.sendall(_MESSAGE.pack(GOODBYE))
                line.shutdown(socket.SHUT_WR)

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="earshard-lifeline", daemon=True).start()

    def _watch_peers(self, server: socket.socket, token: bytes) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    line = key.fileobj
                    assert isinstance(line, socket.socket)
                    if line is server:
                        new = _accept(server, token)
                        if new is not None:
                            peer, line = new
                            with self._lock:
                                self._peers[peer] = line
                            selector.register(line, selectors.EVENT_READ, peer)
                            if self.lost is not None:
                                self._send_lost_rank(self.lost)
                    else:
                        if _receive_message(line) != GOODBYE:
                            self._handle_lost_rank(key.data)
                        selector.unregister(line)
                        line.close()

    def _watch_rank_0(self, connection: socket.socket) -> None:
        leaves = False
        while (message := _receive_message(connection)) is not None:
            if message == GOODBYE:
                leaves = True
            else:
                self._handle_lost_rank(message)
        connection.close()
        self._rank_0_ended.set()
        if not leaves:
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

    def _send_lost_rank(self, rank: int) -> None:
        with self._lock:
            others = [line for peer, line in self._peers.items() if peer != rank]
        for line in others:
            with suppress(OSError):
                line.sendall(_MESSAGE.pack(rank))

    def _exit_process(self) -> None:
        """The main thread had its time: it waits for a rank that is not there."""
        if self._exit_handled:
            return
        if self.lost is not None and (sentence := self._message_for(self.lost)):
            print(f"failed: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """Names of this machine, the likeliest first: the launcher's master need not be the machine of rank 0."""
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    towards = ""
    with suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing: it asks the kernel which of our addresses leads there
            towards = probe.getsockname()[0]
    return list(dict.fromkeys(name for name in (towards, master[0], socket.gethostname()) if name))


def _connect(addresses: list[str], port: int, hello: bytes) -> socket.socket | None:
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT)
            with suppress(OSError):
                connection.sendall(hello)
                if connection.recv(1) == b"K":  # else another service answered
                    _enable_keepalive(connection)
                    return connection
            connection.close()
    return None


def _accept(server: socket.socket, token: bytes) -> tuple[int, socket.socket] | None:
    connection, _ = server.accept()
    with suppress(OSError):
        connection.settimeout(_CONNECT_TIMEOUT)
        said = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(said) == _HELLO.size and secrets.compare_digest(_HELLO.unpack(said)[0], token):
            connection.sendall(b"K")
            _enable_keepalive(connection)
            return _HELLO.unpack(said)[1], connection
    connection.close()
    return None


def _enable_keepalive(connection: socket.socket) -> None:
    """Blocking from now on; a peer that answers no probe for 25 s is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive_message(connection: socket.socket) -> int | None:
    """The next message; None when the other end is gone."""
    with suppress(OSError):
        data = connection.recv(_MESSAGE.size, socket.MSG_WAITALL)
        if len(data) == _MESSAGE.size:
            return int(_MESSAGE.unpack(data)[0])
    return None
