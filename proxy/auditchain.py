"""The chain of audit lines: each holds the hash of the one before it, and its own, so that none can be changed, taken
out or put in without a trace. Who can write the file can make a new chain: a hash that was kept elsewhere shows that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

BEGIN = "0" * 64  # what the first line of all has for the one before it
_LINKED = re.compile(rb'(\{(?:.*,)?"prev":"([0-9a-f]{64})"),"hash":"([0-9a-f]{64})"\}')
_WHOLE = re.compile(rb"\{.*\}")


def link(data: bytes, last: str) -> tuple[bytes, str]:
    """Whole lines of JSON objects with `prev` and `hash` added to each, and the hash of the last; `last` comes before
    them. The hash is SHA-256 of the line as it is without its last field."""
    before = last.encode()
    out: list[bytes] = []
    for line in data.split(b"\n")[:-1]:
        body = b'%b%b"prev":"%b"' % (line[:-1], b"," if len(line) > 2 else b"", before)
        before = sha256(body + b"}").hexdigest().encode()
        out += body, b',"hash":"', before, b'"}\n'
    return b"".join(out), before.decode()


def last_hash(tail: bytes) -> str:
    """The hash of the last whole line in the end of a file."""
    for line in reversed(tail.split(b"\n")):
        if match := _LINKED.fullmatch(line):
            return match[3].decode()
    return BEGIN


@dataclass(slots=True)
class Chain:
    """What verifying found; `wrong` holds what, and `torn` how many lines a killed process did not finish."""

    lines: int = 0
    unlinked: int = 0  # from before there was a chain
    torn: int = 0
    after: str = BEGIN  # the hash of a line before the first
    last: str = BEGIN
    expected: bool = False  # the hash that was asked for is in it

    def verify(self, lines: Iterable[bytes], expect: str = "") -> Iterator[tuple[int, str]]:
        """Go on with the lines of one more file; the number of each wrong line, from 1, and what is wrong with it."""
        for number, line in enumerate(lines, 1):
            line = line.rstrip(b"\n")
            match = _LINKED.fullmatch(line)
            if match is None:
                yield from self._odd(number, line)
                continue
            before = match[2].decode()
            if not self.lines and not self.torn:
                self.after = before
            elif before != self.last:
                yield number, "does not follow the line before it: lines are missing, or that one was changed"
            if sha256(match[1] + b"}").hexdigest() != match[3].decode():
                yield number, "was changed"
            self.lines += 1
            self.last = match[3].decode()
            self.expected = self.expected or self.last == expect

    def _odd(self, number: int, line: bytes) -> Iterator[tuple[int, str]]:
        if not line:
            return
        if not _WHOLE.fullmatch(line):
            self.torn += 1  # a line that was taken out shows in the next one
        elif self.lines:
            yield number, "is not in the chain"
        else:
            self.unlinked += 1
