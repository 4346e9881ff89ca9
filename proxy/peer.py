"""What is known of one client connection, and where its decided requests may be dialled. No behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from random import getrandbits
from typing import TYPE_CHECKING

from mitmproxy import connection, http

from proxy.address import Host
from proxy.flow import Tunnel
from proxy.layers import HttpLayer
from proxy.proof import Proof
from proxy.reason import Reason
from proxy.settingvalue import Listener

if TYPE_CHECKING:
    from proxy.replay import Table
    from proxy.settled import Replay

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]


def _tails(random: Callable[[int], int]) -> Iterator[str]:
    """The 80 bits that tell ids of one millisecond apart: 70 at random, and a thousand in a row for each of those."""
    while True:
        number = random(70)
        begin = "".join([_PAIRS[number >> shift & 1023] for shift in range(60, -1, -10)])
        for pair in _PAIRS:
            yield begin + pair


_tail = _tails(getrandbits)


def ulid(now: float) -> str:
    """A sortable id: 48 bits of milliseconds and 80 more, in Crockford's base 32. It is no secret."""
    return _when(int(now * 1000)) + next(_tail)


@lru_cache(maxsize=4)
def _when(milliseconds: int) -> str:
    return "".join([_PAIRS[milliseconds >> shift & 1023] for shift in range(40, -1, -10)])


@dataclass(slots=True)
class Dial:
    """An upstream one decided request may be sent to."""

    host: Host
    private: bool
    owner: str = ""  # the agent whose connection it must be; nobody's is shared
    failure: Reason | None = None


@dataclass(slots=True)
class Peer:
    """One client connection."""

    client: connection.Client
    listener: Listener
    shown: tuple[Proof, ...] = ()  # by the connection itself, for every request on it
    redirected: int = 0  # the port a transparent client dialled
    tunnel: Tunnel | None = None
    sni_mismatch: bool = False
    connect: http.HTTPFlow | None = None  # kept where some rule passes tunnels through
    dials: dict[tuple[str, int], Dial] = field(default_factory=dict)
    open: dict[int, http.HTTPFlow] = field(default_factory=dict)  # not recorded yet
    agents: set[str] = field(default_factory=set)
    http: HttpLayer | None = None  # inside the tunnel
    settled: Table | None = None  # in tunnels like this one
    replay: Replay | None = None  # a request that was decided before and has no flow
    address: str = ""

    def __post_init__(self) -> None:
        peername = self.client.peername
        self.address = f"{peername[0]}:{peername[1]}" if peername else ""
