"""The public keys of an identity provider (JWK Set, RFC 7517), from a file or a URL, kept and renewed."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifi
import jwt

from proxy.settings import Jwt

SPACING = 10.0  # seconds between two fetches at least, however many tokens name a key that is not there
LOOK = 2.0  # seconds between two looks at a file
STALE = 3600.0  # seconds after the last good fetch in which keys are still believed
_TIMEOUT = 5.0  # seconds
_MOST = 1 << 20  # bytes
_log = logging.getLogger("sallyport")


class KeySet:
    """The keys, by what tokens call them. `on_change` is told when they are others than before."""

    def __init__(self, settings: Jwt, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._settings = settings
        self._clock = clock
        self._sets: list[dict[str, Any]] = []
        self._made: dict[tuple[str | None, str], jwt.PyJWK | None] = {}
        self._good = -STALE
        self._asked = asyncio.Event()
        self._told = ""
        self._stamp: tuple[int, int] = (0, 0)

    def key(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key of that name for an algorithm; a name that is not there makes the keys be fetched again soon."""
        if self._clock() >= self._good + STALE:
            return None
        if (kid, algorithm) not in self._made:
            found = [one for one in self._sets if kid is None or one.get("kid") == kid]
            if len(found) != 1:  # none; or more than one, and nothing says which
                self._asked.set()
                return None
            self._made[kid, algorithm] = _made(found[0], algorithm)
        return self._made[kid, algorithm]

    async def run(self) -> None:
        """Keep the keys new, until cancelled."""
        while True:
            local = isinstance(self._settings.jwks, Path)
            try:
                async with asyncio.timeout(LOOK if local else self._settings.refresh):
                    await self._asked.wait()
                    await asyncio.sleep(SPACING)
            except TimeoutError:
                pass
            self._asked.clear()
            await self.load()

    async def load(self) -> None:
        """Read the keys; what fails is logged once, and those before stay until they are stale."""
        try:
            text = await asyncio.to_thread(self._read)
            if text is None:
                self._good = self._clock()
                return
            keys = json.loads(text)["keys"]
            sets = [dict(key) for key in keys if key.get("kty") != "oct" and key.get("use", "sig") == "sig"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            words = f"the keys at {self._settings.jwks} cannot be read: {type(error).__name__}"
            if words != self._told:
                _log.error("%s; those before are used for an hour", words)
            self._told = words
            return
        self._told, self._good = "", self._clock()
        if sets != self._sets:
            self._sets, self._made = sets, {}
            self.on_change()

    def _read(self) -> bytes | None:
        """The set as text; None for a file that has not changed."""
        place = self._settings.jwks
        if isinstance(place, Path):
            status = place.stat()
            stamp = status.st_mtime_ns, status.st_ino
            if stamp == self._stamp:
                return None
            text = place.read_bytes()
            self._stamp = stamp
            return text
        headers = {}
        if self._settings.token_file:  # read each time: Kubernetes replaces it
            headers["Authorization"] = f"Bearer {self._settings.token_file.read_text().strip()}"
        context = ssl.create_default_context(cafile=str(self._settings.ca or certifi.where()))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect
        )
        with opener.open(urllib.request.Request(place, headers=headers), timeout=_TIMEOUT) as answer:  # noqa: S310
            text = answer.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError("too large")
        return bytes(text)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The operator wrote where the keys are; whoever answers there does not send us elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error."""


def _made(key: dict[str, Any], algorithm: str) -> jwt.PyJWK | None:
    if key.get("alg", algorithm) != algorithm:
        return None
    try:
        return jwt.PyJWK(key, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None  # of another kind than the algorithm needs
