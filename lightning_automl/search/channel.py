"""How a rank of a trial speaks with the process that runs the search: a JSON array a line, over a socket of its own."""

import json
import socket
import threading
from typing import Any


class Channel:
    """The rank's end. Handed to the function that a trial calls.

    Sending is safe from several threads; :meth:`ask` belongs to one thread, the one that trains.

    Args:
        rank: Of this process in its trial, from 0.
        connection: A connected stream socket.
    """

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank = rank
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Tell something and go on.

        Args:
            message: JSON values. One with the key ``beat`` says only that this rank is alive.

        Raises:
            ConnectionError: If nobody listens any more.
            TypeError: If the message holds what JSON does not know.
        """
        self._write("say", message)

    def beat(self) -> None:
        """Say that this rank is alive; every other message says it too."""
        self._write("say", {"beat": True})

    def ask(self, message: dict[str, Any]) -> Any:
        """Tell something and wait for the answer. On rank 0 alone, which hands the answer on to the others.

        Args:
            message: JSON values.

        Returns:
            What ``on_message`` of :meth:`TrialServer.run` returned.

        Raises:
            ConnectionError: If nobody answers any more.
        """
        assert self.rank == 0, "rank 0 asks; the others get the answer from it"
        self._write("ask", message)
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._connection.recv(1 << 16)
            if not part:
                raise ConnectionError("the search that this trial belongs to has ended")
            answer += part
        return json.loads(answer)

    def end(self, message: dict[str, Any]) -> None:
        """The last message: ``{"result": …}``, or ``{"reason": …, "exception": …, "at": …}`` of a failure."""
        self._write("end", message)

    def _write(self, kind: str, message: dict[str, Any]) -> None:
        line = json.dumps([kind, message]).encode() + b"\n"
        with self._sending:
            self._connection.sendall(line)
