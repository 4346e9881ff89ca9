"""The shared memory of all processes: a few hashes behind the Redis protocol, and a feed of what changed in them.

Every change is one script, atomic with its entry in the feed. Nothing here knows what the records mean or holds a
secret. No error text carries a password: texts of the client library and of the server are never passed on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException
from redis.exceptions import TimeoutError as RedisTimeout

from proxy.embedded import Embedded
from proxy.problem import UserError

PREFIX = "{sallyport}:"  # a hash tag: in a cluster all keys lie in one slot, so a script may touch several
FEED = 10_000  # names kept in the change feed; whoever is further behind loads everything

_TIMEOUT = 1.0  # seconds, to connect and to read
_WHOLE = 3.0  # seconds for one operation with all its steps (sentinels, redirections)
_ATTEMPTS = 20  # of a change that others keep overtaking
_REVISION, _CHANGES = PREFIX + "revision", PREFIX + "changes"
# Strict about the login, so that no part of a password can be taken for a host and shown.
_URL = re.compile(
    r"(rediss?|redis\+sentinel|redis\+cluster)://(?:([^@/?#\s]*)@)?([\w.,:\[\]-]+)(/[\w./-]*)?(?:\?[^@#\s]*)?", re.ASCII
)

_CHANGE = """
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[3] then return 0 end
if ARGV[4] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[4]) end
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - tonumber(ARGV[5]))
return 1
"""
# A restarted or promoted server may have lost or gained changes, so its run id is part of every revision.
_SINCE = """
local now = tonumber(redis.call('GET', KEYS[1]) or '0')
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
local since = tonumber(ARGV[2])
local oldest = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
local lost = redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[3]) and since + 1 < tonumber(oldest)
if run ~= ARGV[1] or since < 0 or since > now or lost then return {run, now} end
return {run, now, redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[2], '+inf')}
"""


class StoreUnavailable(UserError):
    """The store did not answer, or not as a store does."""


@dataclass(frozen=True, slots=True)
class Revision:
    """A point in the change feed of one run of one server; the zero value is before everything."""

    run: str = ""
    number: int = -1


class Store:
    """Named tables of text records. Every method raises StoreUnavailable within a few seconds if it cannot work."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        where: str,
        written: Iterable[tuple[str, int]] = (),
        embedded: Embedded | None = None,
    ) -> None:
        self._client: Any = client  # the two clients share no typed interface
        self._embedded = embedded
        self._servers = set(written)
        self.where = where  # which store, in words, for messages: never with a password

    @classmethod
    async def open(cls, url: str, state_dir: Path, *, wait: bool = True) -> Self:
        """A store; `url` is `embedded` or redis://, rediss://, redis+sentinel://, redis+cluster://.

        Raises UserError for a bad URL, and StoreUnavailable where it does not answer (a remote one only if `wait`).
        """
        if url == "embedded":
            embedded = await asyncio.to_thread(Embedded, state_dir)
            await asyncio.to_thread(embedded.open)
            store = cls(Redis(unix_socket_path=embedded.socket_path, **_OPTIONS), "the embedded store", (), embedded)
        else:
            store = cls(*_connect(url))
        if wait or store._embedded:
            try:
                await store.ping()
            except BaseException:
                await store.close()
                raise
        return store

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Gives the connections back, and stops an embedded server that nobody else uses."""
        try:
            await self._client.aclose()
            manager = getattr(getattr(self._client, "connection_pool", None), "sentinel_manager", None)
            for sentinel in manager.sentinels if manager else ():
                await sentinel.aclose()  # the client leaves these open
        finally:
            if self._embedded:
                await asyncio.to_thread(self._embedded.close)

    def servers(self) -> set[tuple[str, int]]:
        """The hosts and ports this store was ever met at: those that were written, the master that a sentinel named,
        the nodes of a cluster."""
        master = getattr(getattr(self._client, "connection_pool", None), "master_address", None)
        if master:
            self._servers.add(tuple(master))
        if isinstance(self._client, RedisCluster):
            self._servers.update((str(node.host), int(node.port)) for node in self._client.get_nodes())
        return self._servers

    async def ping(self) -> None:
        """Returns if the store answers."""
        await self._ask(self._client.ping())

    async def ensure(self) -> None:
        """Starts an embedded server that died again; for other stores this is `ping`."""
        if self._embedded:
            try:
                await asyncio.to_thread(self._embedded.ensure)
            except UserError as error:
                raise StoreUnavailable(str(error)) from None
        await self.ping()

    async def get(self, table: str, name: str) -> str | None:
        """One record, or None."""
        return _text(await self._ask(self._client.hget(PREFIX + table, name)))

    async def get_all(self, table: str, names: Iterable[str] | None = None) -> dict[str, str]:
        """The records of `names` that exist, or of all names."""
        if names is None:
            found = await self._ask(self._client.hgetall(PREFIX + table))
            return {_text(name) or "": _text(value) or "" for name, value in found.items()}
        wanted = list(names)
        values = await self._ask(self._client.hmget(PREFIX + table, wanted)) if wanted else []
        return {name: text for name, text in zip(wanted, map(_text, values), strict=True) if text is not None}

    async def change(self, table: str, name: str, change: Callable[[str | None], str | None]) -> None:
        """Puts `change(record)` where the record was; None is no record. `change` runs again when overtaken."""
        keys = (PREFIX + table, _REVISION, _CHANGES)
        for _ in range(_ATTEMPTS):
            old = await self.get(table, name)
            new = change(old)
            arguments = (name, f"{table}/{name}", old or "", new or "", FEED)
            if await self._ask(self._client.eval(_CHANGE, len(keys), *keys, *arguments)):
                return
        raise UserError(f"others keep changing {name} at the same time: try again")

    async def set_once(self, key: str, value: str) -> str:
        """Sets `key` unless it is set; the value it has then."""
        await self._ask(self._client.set(PREFIX + key, value, nx=True))
        return await self.get_key(key) or ""

    async def get_key(self, key: str) -> str | None:
        """A value that `set_once` set, or None."""
        return _text(await self._ask(self._client.get(PREFIX + key)))

    async def run(self, script: str, key: str, *arguments: str | float) -> Any:
        """What a Lua script says that touches this one key."""
        return await self._ask(self._client.eval(script, 1, PREFIX + key, *arguments))

    async def changes_since(self, since: Revision) -> tuple[Revision, set[str] | None]:
        """The present revision and the `table/name`s changed after `since`; None means that anything may have."""
        arguments = (since.run, since.number, FEED)
        run, number, *names = await self._ask(self._client.eval(_SINCE, 2, _REVISION, _CHANGES, *arguments))
        revision = Revision(_text(run) or "", int(number))
        return revision, {_text(name) or "" for name in names[0]} if names else None

    async def _ask(self, command: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(_WHOLE):
                return await command
        except Exception as error:  # whatever a client library throws at odd answers
            raise StoreUnavailable(f"{self.where} {_failure(error)}") from None


_OPTIONS: dict[str, Any] = {
    "socket_timeout": _TIMEOUT,
    "socket_connect_timeout": _TIMEOUT,
    "protocol": 2,
    "encoding_errors": "surrogateescape",
    "retry": Retry(NoBackoff(), 0),  # a retry would hide a restart, and costs time that callers do not have
}


def _connect(url: str) -> tuple[Redis | RedisCluster, str, list[tuple[str, int]]]:
    """A client that has not connected yet, which store that is, for messages, and where. Raises UserError."""
    parts = _URL.fullmatch(url)
    if not parts:
        raise UserError(
            "the store must be `embedded`, redis://USER:PASSWORD@HOST:PORT/DB, rediss://..., "
            "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB or redis+cluster://HOST:PORT,..., "
            "with everything odd in the password percent-encoded"
        )
    scheme, login, hosts, path = parts[1], parts[2] or "", parts[3], parts[4] or ""
    where = f"the store at {scheme}://{hosts}{path}"
    try:
        servers = [_host_port(text, 26379 if scheme == "redis+sentinel" else 6379) for text in hosts.split(",")]
        if scheme in ("redis", "rediss"):
            return Redis.from_url(url, **_OPTIONS), where, servers
        username, _, password = (unquote(part) or None for part in login.partition(":"))
        options = {**_OPTIONS, "username": username, "password": password}
        if scheme == "redis+cluster":
            nodes = [ClusterNode(*server) for server in servers]
            return RedisCluster(startup_nodes=nodes, **options), where, servers
        service, _, db = path.strip("/").partition("/")
        # The login is the data servers' own, not the sentinels'.
        watch = Sentinel(servers, sentinel_kwargs=_OPTIONS, **options)  # type: ignore[no-untyped-call]
        return watch.master_for(service, db=int(db or 0)), where, servers
    except (ValueError, TypeError, RedisClusterException):
        raise UserError(f"{where} cannot be: check its port, service name and options") from None


def _host_port(text: str, default: int) -> tuple[str, int]:
    host, colon, port = ("", "", "") if text.endswith("]") else text.rpartition(":")
    return (host.strip("[]"), int(port)) if colon else (text.strip("[]"), default)


def _text(value: bytes | None) -> str | None:
    """What the server sent. Odd bytes survive, so that a damaged record can still be compared and replaced."""
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _failure(error: Exception) -> str:
    if isinstance(error, AuthenticationError | NoPermissionError):
        return "refused the login: check user and password in the `store` setting, and that user's rights"
    if isinstance(error, TimeoutError | RedisTimeout):
        return "did not answer in time: check that it runs and that nothing stands in between"
    cause = getattr(error.__context__, "strerror", None) or type(error).__name__
    return f"cannot be used ({cause}): check that it runs and that the `store` setting is right"
