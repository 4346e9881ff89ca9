"""How a connection came in where its socket alone does not tell. No behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from socket import socket

from proxy.proof import Proof
from proxy.settingvalue import Listener


@dataclass(frozen=True, slots=True)
class Arrival:
    """By which listener, from whom, and what it has proved already. `redirected`: the port a transparent client asked
    for, else 0."""

    listener: Listener
    peername: tuple[str, int]
    sockname: tuple[str, int]
    shown: tuple[Proof, ...] = ()
    redirected: int = 0


# What a listening socket's door makes of an accepted connection; None: it is not served.
type Door = Callable[[socket], Arrival | None]
