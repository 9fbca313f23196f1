"""Ends a process when another of its run is gone.

A process that waits in a collective operation for one that died would wait for ever, or until JAX's
own heartbeat aborts it with a stack trace.  Here every process holds a connection to process 0,
which the operating system closes the moment either end dies.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

_BYE, _FAILED = b".", b"!"
_TOKEN = 32
_GRACE = 0.7
"""Seconds in which the others may fail for the same reason, and say so in their own words."""

EXIT_CODE = 75
"""Exit code of a process that another has left alone: EX_TEMPFAIL, "try again"."""


class Watch:
    """Connections between process 0 and all others.

    Where none can be made (a firewall), nothing is watched and JAX's heartbeat has to do.
    """

    def __init__(self, index: int, count: int, exchange: Callable[[str], list[str]]) -> None:
        """Connects.

        Args:
          index: number of this process.
          count: of processes.
          exchange: given a text, returns those of all processes, in order.
        """
        self._closing, self._gone = False, threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        self._server = None
        if index == 0:
            self._server = socket.create_server(("", 0), backlog=count)
            self._server.settimeout(10)
            # Whoever else finds the port does not know the token, and is not listened to.
            token = secrets.token_hex(_TOKEN // 2)
            exchange(f"{_address()}:{self._server.getsockname()[1]}:{token}")
            arguments = (token.encode(), count - 1)
            threading.Thread(target=self._welcome, args=arguments, daemon=True).start()
        else:
            host, port, token = exchange("")[0].rsplit(":", 2)
            try:
                connection = socket.create_connection((host, int(port)), timeout=10)
                connection.sendall(token.encode() + index.to_bytes(4))
            except OSError:
                return
            self._listen(0, connection)

    def close(self) -> None:
        """Says goodbye: from now on the others may go."""
        self._closing = True
        self._tell(_BYE)

    def fail(self, message: str) -> NoReturn:
        """Ends this process for a reason that the others may share, and them if they do not.

        Args:
          message: shown on stderr.
        """
        self._closing = True
        sys.stderr.write(f"error: {message}\n")
        self._tell(_FAILED)
        # Without process 0, to which JAX too is connected, the others would be aborted.
        time.sleep(_GRACE if self._server is None else 3 * _GRACE)
        _leave(1)

    def is_alone(self) -> bool:
        """Tells whether an error of communication has its cause in another process's end."""
        return self._gone.wait(_GRACE)

    def _tell(self, word: bytes) -> None:
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)

    def _welcome(self, token: bytes, others: int) -> None:
        assert self._server is not None
        while len(self._sockets) < others:
            try:
                connection, _ = self._server.accept()
            except OSError:  # nobody has come for a while
                return
            connection.settimeout(5)
            try:
                greeting = connection.recv(_TOKEN + 4, socket.MSG_WAITALL)
            except OSError:
                greeting = b""
            if greeting[:_TOKEN] == token:
                self._listen(int.from_bytes(greeting[_TOKEN:]), connection)
            else:
                connection.close()

    def _listen(self, number: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._sockets[number] = connection
        threading.Thread(target=self._wait, args=(number, connection), daemon=True).start()

    def _wait(self, number: int, connection: socket.socket) -> None:
        try:
            last = connection.recv(1)
        except OSError:
            last = b""
        if last == _BYE or self._closing:
            return
        self._gone.set()
        if last == _FAILED:
            time.sleep(_GRACE)
            if number:
                with contextlib.suppress(OSError):
                    connection.settimeout(10 * _GRACE)
                    connection.recv(1)  # returns when the other has ended
        if not self._closing:
            # A process that lost another goes too, which is all that the rest of them see.
            who = f"process {number}" if number else "process 0, or one that it waited for,"
            sys.stderr.write(
                f"error: {who} is gone; this one cannot go on without it.  Run the same command "
                "again in all processes to resume from the newest checkpoint\n"
            )
            _leave(EXIT_CODE)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: what is still to be done would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _address() -> str:
    """The address by which other machines reach this one; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
