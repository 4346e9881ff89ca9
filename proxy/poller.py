"""Non-blocking sockets on one edge-triggered epoll, and the coroutines that wait for them. Knows no HTTP.

A `Strand` is a coroutine stepped straight from the poller: waking one costs a function call, where an asyncio task
costs a turn of the loop. Work that needs asyncio (a store, DNS) is awaited through `Strand.finish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import ssl
import types
from array import array
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from fcntl import ioctl
from termios import FIONREAD
from typing import Any

from proxy.guard import where

_log = logging.getLogger("sallyport")

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET | select.EPOLLRDHUP
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_SWEEP = 0.5  # seconds between two looks for waits that have lasted too long
RECORD = 16384  # bytes of plaintext in a TLS record at most (RFC 8446 section 5.1)
CHUNK = 65536  # bytes read at a time
ROUNDS = 8  # looks at the kernel in a turn of the loop, which costs more than one
LOOK, BATCH = 256, 32  # events taken at each; channels told of theirs before the next, where they have one owner
TURNS = 16  # reads and writes that need no wait before the others have theirs: some milliseconds of a fast transfer

_COUNT = array("i", [0])  # what FIONREAD answers in

_BLOCKED_READ = (BlockingIOError, ssl.SSLWantReadError)
_BLOCKED_WRITE = (BlockingIOError, ssl.SSLWantWriteError)


@types.coroutine
def _park() -> Generator[None, None, None]:
    yield


def _call[T](callback: Callable[[T], None], argument: T) -> None:
    """An exception of one connection's callback must not reach the others whose events come after it."""
    try:
        callback(argument)
    except Exception as error:
        _log.error("a connection's callback failed: %s", where(error))


class Strand:
    """One running coroutine. `on_end` is told of the exception it ended with, or None."""

    __slots__ = ("_coroutine", "_on_end", "turns")
    current: Strand | None = None

    def __init__(
        self, coroutine: Coroutine[None, None, None], on_end: Callable[[BaseException | None], None] = lambda _: None
    ) -> None:
        self._coroutine = coroutine
        self._on_end = on_end
        self.turns = 0  # reads and writes since it last waited

    def step(self, error: BaseException | None = None) -> None:
        """Run until it waits again."""
        before, Strand.current = Strand.current, self
        self.turns = 0
        try:
            if error is None:
                self._coroutine.send(None)
            else:
                self._coroutine.throw(error)
        except StopIteration:
            _call(self._on_end, None)
        except (Exception, asyncio.CancelledError) as failure:
            _call(self._on_end, failure)
        finally:
            Strand.current = before

    async def rest(self) -> None:
        """Go on behind the others: a peer that is always ready must not starve them."""
        asyncio.get_running_loop().call_soon(self.step)
        await _park()

    @staticmethod
    async def finish[T](work: Coroutine[Any, Any, T]) -> T:
        """Await asyncio's kind of coroutine; what does not suspend costs no turn of the loop."""
        task: asyncio.Task[T] = asyncio.eager_task_factory(asyncio.get_running_loop(), work)
        if not task.done():
            strand = Strand.current
            assert strand
            task.add_done_callback(lambda _: strand.step())
            await _park()
        return task.result()


def _closed(_: object) -> Any:
    raise ConnectionAbortedError


class Channel:
    """A connected socket, plain or TLS. At most one strand reads and one writes at a time."""

    __slots__ = (
        "_pending",
        "_poller",
        "_recv",
        "_send",
        "_stirred",
        "_waiting",
        "due",
        "fd",
        "hung_up",
        "on_event",
        "owner",
        "sock",
    )

    def __init__(self, poller: Poller, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock: socket.socket | ssl.SSLSocket = sock
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[bytes | memoryview], int] = sock.send
        self._pending: Callable[[], int] | None = None  # bytes that TLS has deciphered but not given out
        self.fd = sock.fileno()
        self._stirred = True  # something may have arrived since it was last found empty
        self.on_event: Callable[[bool], None] | None = None  # the peer acted while nobody reads; whether it hung up
        self.owner = ""  # for whom it works: owners take turns
        self.due = 0  # events it was not told of yet
        self.hung_up = False  # the peer sends no more, though some of it may still be unread
        self._poller = poller
        # By strand, not by event: in TLS a reader may have to write and a writer to read (SSL_ERROR_WANT_WRITE).
        self._waiting: dict[Strand, tuple[int, float]] = {}
        poller.add(self)

    @property
    def closed(self) -> bool:
        """Whether it was given up."""
        return self.fd < 0

    def ready(self, events: int) -> None:
        """Wake who waits for what happened."""
        if events & _HUNG_UP:
            self.hung_up = True
            events |= READ | WRITE
        if events & READ:
            self._stirred = True
        if self.on_event and events & READ and not any(event == READ for event, _ in self._waiting.values()):
            _call(self.on_event, bool(events & _HUNG_UP))
        for strand in [strand for strand, (event, _) in self._waiting.items() if event & events]:
            self._wake(strand)

    def _wake(self, strand: Strand, error: BaseException | None = None) -> None:
        if self._waiting.pop(strand, None):  # none: what woke another strand has woken this one too
            strand.step(error)

    def late(self, now: float) -> None:
        """Fail the waits whose time is over."""
        for strand, (_, deadline) in list(self._waiting.items()):
            if deadline <= now:
                self._wake(strand, TimeoutError())

    async def wait(self, event: int, seconds: float) -> None:
        """Wait for the socket. Raises TimeoutError, and ConnectionError when it is closed meanwhile."""
        if self.fd < 0:
            raise ConnectionAbortedError
        strand = Strand.current
        assert strand
        self._waiting[strand] = event, self._poller.now() + seconds
        await _park()

    async def recv(self, seconds: float) -> bytes:
        """What has arrived; empty at the end. Raises OSError, TimeoutError."""
        if strand := Strand.current:
            strand.turns += 1
            if strand.turns > TURNS:
                await strand.rest()
        if not self.hung_up and self.fd >= 0 and not self.unread():  # asking costs a tenth of a failed read
            await self.wait(READ, seconds)
        while True:
            try:
                return self._recv(CHUNK if self._pending is None else RECORD)
            except _BLOCKED_READ:
                await self.wait(READ, seconds)
            except ssl.SSLWantWriteError:
                await self.wait(WRITE, seconds)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return b""  # with or without close_notify: framing tells whether something is missing

    def unread(self) -> int:
        """Bytes that have arrived and were not read."""
        if not self._stirred:
            return 0
        ioctl(self.fd, FIONREAD, _COUNT)
        count = _COUNT[0] or (self._pending() if self._pending else 0)
        self._stirred = count > 0
        return count

    async def recv_more(self, seconds: float) -> bytes:
        """As `recv`, and for TLS what further records have arrived too, up to some `CHUNK`."""
        data = await self.recv(seconds)
        if len(data) < RECORD or not isinstance(self.sock, ssl.SSLSocket):
            return data
        parts, size = [data], len(data)
        try:
            while size < CHUNK and data:
                data = self._recv(RECORD)
                parts.append(data)
                size += len(data)
        except (*_BLOCKED_READ, OSError):
            pass  # the next recv meets it again
        return b"".join(parts)

    async def peek(self, size: int, seconds: float, known: int = 0) -> bytes:
        """What has arrived of a plain socket, more than the `known` bytes seen before, left where it is. Empty where
        no more will come."""
        while True:
            try:
                data = self.sock.recv(size, socket.MSG_PEEK)
            except BlockingIOError:
                data = None
            if data is not None and (len(data) > known or not data):
                return data
            if self.hung_up:
                return b""
            await self.wait(READ, seconds)

    async def send(self, data: bytes, seconds: float) -> None:
        """Send all of it. Raises OSError, TimeoutError."""
        if strand := Strand.current:
            strand.turns += 1
            if strand.turns > TURNS:
                await strand.rest()
        view: bytes | memoryview = data
        while view:
            try:
                sent = self._send(view)
                if sent == len(view):
                    return
                view = memoryview(view)[sent:]
            except _BLOCKED_WRITE:
                await self.wait(WRITE, seconds)
            except ssl.SSLWantReadError:
                await self.wait(READ, seconds)

    async def start_tls(self, context: ssl.SSLContext, seconds: float, **options: Any) -> None:
        """A TLS handshake on the socket, `seconds` in all. Raises OSError (ssl.SSLError), TimeoutError."""
        deadline = self._poller.now() + seconds
        wrapped = context.wrap_socket(self.sock, do_handshake_on_connect=False, suppress_ragged_eofs=False, **options)
        self.sock = wrapped
        while True:
            try:
                wrapped.do_handshake()
                # Below SSLSocket's own methods, which cost as much again as OpenSSL.
                tls: Any = wrapped._sslobj  # type: ignore[attr-defined]
                self._recv, self._send, self._pending = tls.read, tls.write, tls.pending
                return
            except ssl.SSLWantReadError:
                await self.wait(READ, deadline - self._poller.now())
            except ssl.SSLWantWriteError:
                await self.wait(WRITE, deadline - self._poller.now())

    def say_goodbye(self) -> None:
        """Tell a TLS peer that nothing more comes: without close_notify it must take the end for a cut. What it still
        sends can only be dropped, below TLS: OpenSSL may read no more once it met data after its own close_notify."""
        if isinstance(self.sock, ssl.SSLSocket) and not self.closed:
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()  # sends, then fails because the answer is not there yet
            self.sock = socket.socket(fileno=self.sock.detach())
            self.sock.setblocking(False)
            self._recv, self._send, self._pending = self.sock.recv, self.sock.send, None

    def detach(self) -> socket.socket:
        """The plain socket, for somebody else; the channel is over."""
        self._poller.remove(self)
        self.fd = -1
        return self.sock

    def close(self) -> None:
        """Hang up. Who waits gets ConnectionError."""
        if self.fd < 0:
            return
        self._poller.remove(self)
        self.fd = -1
        self.on_event = self._pending = None
        self._recv = self._send = _closed
        self.sock.close()
        for strand in list(self._waiting):
            self._wake(strand, ConnectionAbortedError())


class Poller:
    """The epoll of one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._epoll = select.epoll()
        self._channels: dict[int, Channel] = {}
        self._due: dict[str, deque[Channel]] = {}  # by owner: what happened, and nobody was told yet
        self._again = False
        self._loop.add_reader(self._epoll.fileno(), self._poll)
        self._timer = self._loop.call_later(_SWEEP, self._sweep)

    def add(self, channel: Channel) -> None:
        """Watch a channel until it is removed. Raises ConnectionAbortedError when the poller is closed."""
        if self._epoll.closed:
            channel.sock.close()
            raise ConnectionAbortedError
        self._epoll.register(channel.fd, _EVENTS)
        self._channels[channel.fd] = channel

    def remove(self, channel: Channel) -> None:
        """Watch it no more."""
        if self._channels.get(channel.fd) is channel:  # a failed wrap_socket has closed it, and others may have its fd
            del self._channels[channel.fd]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(channel.fd)

    def _poll(self) -> None:
        self._again = False
        for _ in range(ROUNDS):
            if self._epoll.closed:
                return
            for fd, events in self._epoll.poll(0, LOOK):
                if channel := self._channels.get(fd):
                    if not channel.due:
                        self._due.setdefault(channel.owner, deque()).append(channel)
                    channel.due |= events
            if not self._due:
                return
            self._take_turns()
        if self._due and not self._again:
            self._again = True
            self._loop.call_soon(self._poll)

    def _take_turns(self) -> None:
        """One channel of each owner has its turn, or several where there is only one owner: who has many ready must not
        make others wait for all of them."""
        turns = BATCH if len(self._due) == 1 else 1
        for owner, waiting in list(self._due.items()):
            for _ in range(min(turns, len(waiting))):
                channel = waiting.popleft()
                events, channel.due = channel.due, 0
                if not channel.closed:
                    channel.ready(events)
            if not waiting:
                del self._due[owner]

    def _sweep(self) -> None:
        self._timer = self._loop.call_later(_SWEEP, self._sweep)
        now = self.now()
        for channel in list(self._channels.values()):
            channel.late(now)

    def close(self) -> None:
        """Hang up on everybody."""
        if self._epoll.closed:
            return
        self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        while self._channels:
            next(iter(self._channels.values())).close()
