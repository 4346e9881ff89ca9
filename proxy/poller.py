"""Non-blocking sockets, edge-triggered, on the event loop's own epoll, and the coroutines that wait for them. Knows no
HTTP.

A `Strand` is a coroutine stepped straight from the poller: waking one costs a function call, where an asyncio task
costs a turn of the loop. Work that needs asyncio (a store, DNS) is awaited through `Strand.finish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import selectors
import socket
import ssl
import time
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Generator
from fcntl import ioctl
from functools import partial
from termios import FIONREAD
from typing import Any

from proxy.cipher import RECORD, Cipher
from proxy.guard import where

_log = logging.getLogger("sallyport")

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET | select.EPOLLRDHUP
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_SWEEP = 0.5  # seconds between two looks for waits that have lasted too long
CHUNK = 65536  # bytes read at a time
_SENT = CHUNK + RECORD  # bytes enciphered at a time: a chunk with its size around it
LOOK, BATCH = 256, 16  # events taken from the kernel at a time; channels told of theirs before the next look
CORKED = 16384  # bytes that may wait for the end of a look: waking a peer that sleeps costs as much as all of a request
TURNS = 16  # reads and writes that need no wait before the others have theirs: some milliseconds of a fast transfer

_COUNT = array("i", [0])  # what FIONREAD answers in


@types.coroutine
def _park() -> Generator[None, None, None]:
    yield


def _call[T](callback: Callable[[T], None], argument: T) -> None:
    """An exception of one connection's callback must not reach the others whose events come after it."""
    try:
        callback(argument)
    except Exception as error:
        _log.error("a connection's callback failed: %s", where(error))


_current: Strand | None = None  # who runs; in no class: to set its attribute costs the interpreter what it knows of it


class Strand:
    """One running coroutine. `on_end` is told of the exception it ended with, or None."""

    __slots__ = ("_coroutine", "_on_end", "turns")

    def __init__(
        self, coroutine: Coroutine[None, None, None], on_end: Callable[[BaseException | None], None] = lambda _: None
    ) -> None:
        self._coroutine = coroutine
        self._on_end = on_end
        self.turns = 0  # reads and writes since it last waited

    def step(self, error: BaseException | None = None) -> None:
        """Run until it waits again."""
        global _current
        before, _current = _current, self
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
            _current = before

    async def rest(self) -> None:
        """Go on behind the others: a peer that is always ready must not starve them."""
        asyncio.get_running_loop().call_soon(self.step)
        await _park()

    @staticmethod
    async def finish[T](work: Coroutine[Any, Any, T]) -> T:
        """Await asyncio's kind of coroutine; what does not suspend costs no turn of the loop."""
        task: asyncio.Task[T] = asyncio.eager_task_factory(asyncio.get_running_loop(), work)
        if not task.done():
            strand = _current
            assert strand
            task.add_done_callback(lambda _: strand.step())
            await _park()
        return task.result()


def _closed() -> Any:
    raise ConnectionAbortedError


class Channel:
    """A connected socket, plain or TLS. At most one strand reads and one writes at a time."""

    __slots__ = (
        "_cipher",
        "_poller",
        "_recv",
        "_stirred",
        "_unsent",
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
        self.sock = sock
        self._recv: Callable[[], bytes] = partial(sock.recv, CHUNK)
        self._cipher: Cipher | None = None
        self.fd = sock.fileno()
        self._stirred = True  # something may have arrived since it was last found empty
        self.on_event: Callable[[bool], None] | None = None  # the peer acted while nobody reads; whether it hung up
        self.owner = ""  # for whom it works: owners take turns
        self.due = 0  # events it was not told of yet
        self._unsent = b""  # what is sent when all events of a look were told, or when the kernel takes it
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
        waiting = self._waiting
        if events & WRITE and (self._unsent or ((cipher := self._cipher) and cipher.unsent)):
            self.uncork()
        if events & READ:
            self._stirred = True
            if self.on_event and READ not in [event for event, _ in waiting.values()]:
                _call(self.on_event, self.hung_up)
        for strand, (event, _) in tuple(waiting.items()):
            if event & events and strand in waiting:  # else what woke another strand has woken this one too
                del waiting[strand]
                strand.step()

    def _fail(self, strand: Strand, error: BaseException) -> None:
        if self._waiting.pop(strand, None):
            strand.step(error)

    def late(self, now: float) -> None:
        """Fail the waits whose time is over."""
        for strand, (_, deadline) in list(self._waiting.items()):
            if deadline <= now:
                self._fail(strand, TimeoutError())

    async def wait(self, event: int, seconds: float) -> None:
        """Wait for the socket. Raises TimeoutError, and ConnectionError when it is closed meanwhile."""
        if self.fd < 0:
            raise ConnectionAbortedError
        strand = _current
        assert strand
        self._waiting[strand] = event, self._poller.now() + seconds
        await _park()

    async def recv(self, seconds: float) -> bytes:
        """What has arrived; empty at the end. Raises OSError, TimeoutError."""
        strand = _current
        if strand:
            strand.turns += 1
            if strand.turns > TURNS:
                await strand.rest()
            if not self.hung_up and self.fd >= 0 and not (self._stirred and self.unread()):
                self._waiting[strand] = READ, self._poller.now() + seconds  # as `wait` does
                await _park()
        while True:
            cipher = self._cipher
            try:
                data = self._recv()
                if cipher is None:
                    self._stirred = len(data) == CHUNK  # as `Cipher.has_more`
                    return data
                self._stirred = cipher.has_more
                if not cipher.outward.pending:
                    return data
            except BlockingIOError:
                data = None
                self._stirred = False
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return b""  # with or without close_notify: framing tells whether something is missing
            if cipher and cipher.outward.pending:
                await self._flush(cipher, seconds)
            elif data is None:
                await self.wait(READ, seconds)
            if data is not None:
                return data

    @property
    def is_still(self) -> bool:
        """Whether nothing has arrived, as far as the kernel has told."""
        return not (self._stirred or self.due or self.hung_up)

    def unread(self) -> int:
        """Bytes that have arrived and were not read. To ask costs a tenth of a read that fails."""
        if not self._stirred:
            return 0
        ioctl(self.fd, FIONREAD, _COUNT)
        return _COUNT[0] or self.deciphered()

    def deciphered(self) -> int:
        """Bytes that TLS has read already and nobody else. Only to be asked where the kernel has none: then what has
        arrived is known again."""
        count = self._cipher.held if self._cipher else 0
        self._stirred = count > 0
        return count

    def absorbs(self) -> bool:
        """Whether all that has arrived is of TLS itself, such as a session ticket: it is taken. Raises OSError."""
        if self._cipher is None:
            return False
        with contextlib.suppress(BlockingIOError):
            self._cipher.read()
            return False
        return True

    async def peek(self, size: int, seconds: float, known: int = 0) -> bytes:
        """What has arrived of a plain socket, more than the `known` bytes seen before, left where it is. Empty where
        no more will come."""
        if not known and not self.hung_up and not self.unread():
            await self.wait(READ, seconds)
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

    async def send_soon(self, data: bytes, seconds: float) -> None:
        """As `send`; but what is little may wait until all events of a look were told, so that peers that sleep are
        woken once for all that is sent to them. It takes a later `send`, if only of nothing, to know that it has gone.
        """
        corked, cipher = self._poller.corked, self._cipher
        if (
            corked is None
            or self.fd < 0
            or len(data) + len(self._unsent) > CORKED
            or (cipher is not None and cipher.unsent)
        ):
            await self.send(data, seconds)
            return
        corked.append(self)
        self._unsent += data

    async def send(self, data: bytes, seconds: float) -> None:
        """Send all of it, behind what `send_soon` left. Raises OSError, TimeoutError."""
        if strand := _current:
            strand.turns += 1
            if strand.turns > TURNS:
                await strand.rest()
        if self.fd < 0:
            raise ConnectionAbortedError
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        if cipher := self._cipher:
            if len(data) <= _SENT:
                if not cipher.send(data):
                    await self._flush(cipher, seconds)
                return
            view = memoryview(data)
            for at in range(0, len(view), _SENT):
                if not cipher.send(view[at : at + _SENT]):
                    await self._flush(cipher, seconds)
            return
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                await self.wait(WRITE, seconds)

    async def _flush(self, cipher: Cipher, seconds: float) -> None:
        while True:
            try:
                return cipher.flush()
            except BlockingIOError:
                await self.wait(WRITE, seconds)

    def uncork(self) -> None:
        """Send what waits. What the kernel does not take yet goes when it does, or before what is sent next."""
        data, self._unsent = self._unsent, b""
        try:
            if self.fd < 0:
                return
            if cipher := self._cipher:
                if data:
                    cipher.send(data)
                else:
                    cipher.flush()
            elif data:
                self._unsent = data
                self._unsent = data[self.sock.send(data) :]
        except BlockingIOError:
            pass
        except OSError:
            self.hung_up = True  # who reads next is told why

    async def start_tls(
        self,
        context: ssl.SSLContext,
        seconds: float,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """A TLS handshake on the socket, `seconds` in all. Raises OSError (ssl.SSLError), TimeoutError."""
        if context.check_hostname and not server_hostname:
            raise ValueError("no name to check the certificate for")
        self.uncork()
        deadline = self._poller.now() + seconds
        options = {"server_side": server_side, "server_hostname": server_hostname, "session": session}
        cipher = Cipher(context, self.sock, options)
        while not cipher.shake():
            await self._flush(cipher, deadline - self._poller.now())
            while True:
                try:
                    cipher.fill()
                    break
                except BlockingIOError:
                    await self.wait(READ, deadline - self._poller.now())
        await self._flush(cipher, deadline - self._poller.now())
        self._cipher, self._recv = cipher, cipher.read

    @property
    def tls(self) -> ssl.SSLObject | None:
        """What tells of the TLS, where there is one."""
        return self._cipher.tls if self._cipher else None

    def say_goodbye(self) -> None:
        """Tell a TLS peer that nothing more comes: without close_notify it must take the end for a cut. What it still
        sends can only be dropped, below TLS: OpenSSL may read no more once it met data after its own close_notify."""
        self.uncork()
        if self._cipher and not self.closed:
            self._cipher.say_goodbye()
            self._cipher, self._recv = None, partial(self.sock.recv, CHUNK)

    def detach(self) -> socket.socket:
        """The plain socket, for somebody else; the channel is over."""
        self.uncork()
        self._poller.remove(self)
        self.fd = -1
        return self.sock

    def close(self) -> None:
        """Hang up. Who waits gets ConnectionError."""
        self.uncork()
        if self.fd < 0:
            return
        self._poller.remove(self)
        self.fd = -1
        self.on_event = self._cipher = None
        self._recv = _closed
        self.sock.close()
        for strand in list(self._waiting):
            self._fail(strand, ConnectionAbortedError())


class Selector(selectors.EpollSelector):
    """asyncio's epoll, with channels on it as well: these are told of what happened before asyncio is."""

    def __init__(self) -> None:
        super().__init__()
        self.poller: Poller | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As of `selectors.BaseSelector`."""
        return super().select(timeout) if self.poller is None else self.poller.look(timeout)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, for a poller to be made in."""

    def __init__(self) -> None:
        self.selector = Selector()
        super().__init__(self.selector)


def run[T](main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, where a poller can be made."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main)


class Poller:
    """The channels of the running event loop, which must be a `Loop`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._loop = loop
        self.now = time.monotonic  # which is the loop's
        self._selector = loop.selector
        self._epoll = select.epoll.fromfd(os.dup(self._selector.fileno()))
        self._channels: dict[int, Channel] = {}
        self._due: OrderedDict[str, deque[Channel]] = OrderedDict()  # by owner: what happened, and nobody was told yet
        self.corked: list[Channel] | None = None  # who has something to send when all events of a look were told
        self._timer = self._loop.call_later(_SWEEP, self._sweep)
        self._selector.poller = self

    def add(self, channel: Channel) -> None:
        """Watch a channel until it is removed. Raises ConnectionAbortedError when the poller is closed."""
        if self._epoll.closed:
            channel.sock.close()
            raise ConnectionAbortedError
        self._epoll.register(channel.fd, _EVENTS)
        self._channels[channel.fd] = channel

    def remove(self, channel: Channel) -> None:
        """Watch it no more."""
        if self._channels.get(channel.fd) is channel:
            del self._channels[channel.fd]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(channel.fd)

    def look(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for something to happen, at most `timeout` seconds; tell channels what happened to them, at most `BATCH`
        of them, and the caller what happened to other descriptors."""
        found = self._epoll.poll(0 if self._due else timeout, LOOK)
        channels = self._channels
        ready = [(channel, events) for fd, events in found if (channel := channels.get(fd))]
        corked: list[Channel] = []
        if len(ready) > 1 or self._due:
            self.corked = corked
        try:
            if self._due or len(ready) > BATCH or len({channel.owner for channel, _ in ready}) > 1:
                for channel, events in ready:
                    if not channel.due:
                        self._due.setdefault(channel.owner, deque()).append(channel)
                    channel.due |= events
                self._take_turns()
            else:  # nobody waits for a turn
                for channel, events in ready:
                    if channel.fd >= 0:
                        channel.ready(events)
        finally:
            self.corked = None
            for channel in corked:
                channel.uncork()
        return self._others(found) if len(found) > len(ready) else []

    def _others(self, found: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        keys, told = self._selector.get_map(), []
        for fd, events in found:
            if key := keys.get(fd):
                readable = selectors.EVENT_READ if events & ~WRITE else 0
                writable = selectors.EVENT_WRITE if events & ~READ else 0
                told.append((key, (readable | writable) & key.events))
        return told

    def _take_turns(self) -> None:
        """Owners in turn, one channel of each: who has many ready must not make others wait for all of them. What the
        last one of an owner sends does not wait for others either."""
        due, corked = self._due, self.corked
        for _ in range(BATCH):
            if not due:
                return
            owner, waiting = due.popitem(last=False)
            channel = waiting.popleft()
            if waiting:
                due[owner] = waiting
            self.corked = corked if waiting else None
            events, channel.due = channel.due, 0
            if not channel.closed:
                channel.ready(events)

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
        self._selector.poller = None
        self._epoll.close()
        while self._channels:
            next(iter(self._channels.values())).close()
