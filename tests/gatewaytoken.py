"""What a gateway does: a token for one agent, minted with a library that is not ours."""

from __future__ import annotations

import time
from typing import Any

import jwt


def mint(key: str, agent: str, gateway: str = "one", life: float = 60.0, **claims: Any) -> str:
    """A token as docs/identity.md describes it."""
    return jwt.encode({"sub": agent, "exp": int(time.time() + life), **claims}, key, "HS256", headers={"kid": gateway})
