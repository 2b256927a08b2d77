"""Ranks that notice the death of another: all end at once and say which it was.

A collective that a dead rank does not join waits for minutes, or for ever. Here each rank keeps a TCP connection to the
first one, over which nothing is sent while all is well. Whether a rank lives is what the kernel says of its connection:
it closes that of a process that was killed, and TCP's keep-alive probes find a machine that is gone within 20 s. A rank
that is slow, stopped in a debugger or holding Python's lock is alive all the while, so there are no false alarms and
nothing to tune.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastft.distributed import Ranks
from fastft.errors import FastftError

F = TypeVar("F", bound=Callable)
CONNECT_SECONDS = 10.0
# How long the others may go on when a rank ends with an error of its own; mostly they end with the same one.
GRACE_SECONDS = 10.0
# How long an error of torch.distributed waits for the watch, which knows its cause.
CAUSE_SECONDS = 2.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

_watch: Watch | None = None
# What the first rank does with the cause before it ends, in the watch's thread; it must not need the other ranks.
last_words: Callable[[str], None] | None = None


def begin(ranks: Ranks) -> None:
    """Watch the other ranks from now on, in a thread; a collective."""
    global _watch
    _watch = Watch.connect(ranks) if ranks.world_size > 1 else None


def watched(function: F) -> F:
    """Tell the other ranks how this function ended, in which all of them work together."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        global _watch
        error_text = None
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            error_text = f"{type(error).__name__}: {error}".splitlines()[0]
            if _watch and isinstance(error, RuntimeError):
                time.sleep(CAUSE_SECONDS)  # where a rank died, the watch ends this process meanwhile
                if _watch.cause and not _watch.cause.endswith(error_text):
                    raise FastftError(_watch.cause) from error
            raise
        finally:
            watch, _watch = _watch, None
            if watch:
                watch.leave(error_text)

    return wrapper


@dataclass
class Peer:
    """The other end of a connection; waiting: what has come of a line."""

    connection: socket.socket
    rank: int
    place: str  # process and host, for a message
    waiting: bytes = b""


class Watch:
    """The connections of this rank: the first has one to each other rank, they one to the first."""

    def __init__(self, ranks: Ranks, peers: list[Peer]):
        self.ranks, self.peers, self.leaving = ranks, peers, False
        self.cause = ""  # which rank stopped with an error of its own, and with which
        self.thread = threading.Thread(target=self._run, name="fastft-watch", daemon=True)
        self.thread.start()

    @classmethod
    def connect(cls, ranks: Ranks) -> Watch | None:
        """Connect all ranks with the first; None, with a line that says so, where a firewall keeps them apart."""
        own = {"rank": ranks.rank, "place": f"process {os.getpid()} on {socket.gethostname()}"}
        server, address = None, None
        if ranks.is_first:
            server = _listen(os.environ["MASTER_ADDR"], ranks.world_size)
            address = (os.environ["MASTER_ADDR"], server.getsockname()[1], secrets.token_hex(16))
        first, (host, port, token) = ranks.gather((own["place"], address))[0]
        peers, problem = [], None
        if not ranks.is_first:
            try:
                connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
                connection.sendall(json.dumps({**own, "token": token}).encode() + b"\n")
                peers = [Peer(connection, 0, first)]
            except OSError as error:
                problem = f"rank {ranks.rank} cannot reach {host}:{port}: {error.strerror or error}"
        problem = next((p for p in ranks.gather(problem) if p), None)
        if server:
            with server:
                while problem is None and len(peers) < ranks.world_size - 1:
                    if peer := _accept(server, token):
                        peers.append(peer)
        if problem:
            if ranks.is_first:
                print(f"start      {problem}; a rank that dies will not be named", flush=True)
            for peer in peers:
                peer.connection.close()
            return None
        for peer in peers:
            peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                peer.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            peer.connection.setblocking(False)
        return cls(ranks, peers)

    def leave(self, error: str | None) -> None:
        """Say that this rank ends by itself, with an error or because it is done."""
        self.leaving = True
        self._tell({"left": self.ranks.rank, "error": error})

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self.peers:
            try:
                peer.connection.send(json.dumps(message).encode() + b"\n")
            except OSError:  # it is gone, or has no room for a line: it will see the connection end
                continue

    def _run(self) -> None:
        deadline = None
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while selector.get_map() or deadline is not None:
                ready = selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
                if deadline is not None and time.monotonic() >= deadline:
                    if not self.leaving:
                        self._end(self.cause)
                    deadline = None
                for key, _ in ready:
                    messages, is_open = _receive(key.data)
                    for message in messages:
                        if "lost" in message:  # from the first rank, which sees all
                            self._end(message["lost"], heard=True)
                        if message["error"] and not self.cause:
                            deadline = time.monotonic() + GRACE_SECONDS
                            self.cause = f"rank {key.data.rank} ({key.data.place}) stopped: {message['error']}"
                    if any("left" in m for m in messages) or (not is_open and self.leaving):
                        selector.unregister(key.fileobj)
                    elif not is_open:
                        self._end(f"rank {key.data.rank} ({key.data.place}) died")

    def _end(self, cause: str, *, heard: bool = False) -> None:
        """Say why and end this process, whatever it is doing."""
        if not heard:
            self._tell({"lost": cause})
        local, of_first = os.environ.get("LOCAL_RANK", "0"), cause.startswith("rank 0 ")
        if local == "0" or (of_first and local == "1"):  # one process of a node speaks
            sys.stdout.flush()
            text = f"fastft: {cause}; the other ranks end with it. To go on, run the same command with resume=auto\n"
            os.write(sys.stderr.fileno(), text.encode())
        try:
            if self.ranks.is_first and last_words:
                last_words(cause)
        finally:
            os._exit(1)


def _listen(host: str, backlog: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=backlog)
    except OSError:  # the name that others know this node by is none of its own addresses
        return socket.create_server(("", 0), backlog=backlog)


def _accept(server: socket.socket, token: str) -> Peer | None:
    """The next connection, if it is a rank of this run."""
    connection, _ = server.accept()
    connection.settimeout(CONNECT_SECONDS)
    try:
        hello = json.loads(connection.makefile("rb").readline(1000))
        if secrets.compare_digest(hello["token"], token):
            return Peer(connection, hello["rank"], hello["place"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    connection.close()
    return None


def _receive(peer: Peer) -> tuple[list[dict[str, Any]], bool]:
    """Whole messages that have come, and whether more can."""
    try:
        data = peer.connection.recv(65536)
    except BlockingIOError:
        return [], True
    except OSError:
        data = b""
    *lines, peer.waiting = (peer.waiting + data).split(b"\n")
    return [json.loads(line) for line in lines], bool(data)
