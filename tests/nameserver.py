"""A name server for the tests, on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rrset


class Nameserver:
    """Answers A and AAAA by `names`: name -> addresses, or None to say nothing. `asked` holds every name it was asked.

    An entry that is a name is a CNAME. A list of lists is answered one after the other, the last for ever.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str] | list[list[str]] | None] = {}
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a close would not wake the thread
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                data, client = self._socket.recvfrom(4096)
            except OSError:
                return
            if not data:
                return
            answer = self._answer(dns.message.from_wire(data))
            if answer:
                self._socket.sendto(answer.to_wire(), client)

    def _answer(self, query: dns.message.Message) -> dns.message.Message | None:
        question = query.question[0]
        name = question.name.to_text().removesuffix(".")
        self.asked.append(name)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if name not in self.names:
            answer.set_rcode(dns.rcode.NXDOMAIN)
            return answer
        entry = self.names[name]
        if entry is None:
            return None
        addresses = self._turn(entry) if entry and isinstance(entry[0], list) else entry
        owner = question.name
        for text in addresses:
            assert isinstance(text, str)
            kind = "AAAA" if ":" in text else "A" if text.replace(".", "").isdigit() else "CNAME"
            if kind == "CNAME":
                answer.answer.append(dns.rrset.from_text(owner, 1, "IN", kind, text + "."))
                owner = answer.answer[-1][0].target
            elif kind == question.rdtype.name:
                answer.answer.append(dns.rrset.from_text(owner, 1, "IN", kind, text))
        return answer

    @staticmethod
    def _turn(entry: list[list[str]]) -> list[str]:
        return entry.pop(0) if len(entry) > 1 else entry[0]
