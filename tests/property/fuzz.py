"""Guided fuzzing of whatever reads bytes of a peer, by atheris (libFuzzer): `scripts/fuzz TARGET [SECONDS]`.

The checks are those of the properties beside this file; atheris finds its way to the rare branches by what it covers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["proxy"]):
    from proxy.coding import Undecodable, decoder
    from proxy.leak import Detector, Finding, spellings
    from tests.property import test_clienthello, test_framing, test_http1, test_readers, test_rulefile, test_yamltree
    from tests.property.test_leak import ENCODERS, cut, sent

SECRET = b"a-secret-of-the-vault"
DETECTOR = Detector(dict.fromkeys(spellings(SECRET), Finding("credential", "a")))


def body(data: bytes) -> None:
    """A secret between these bytes, coded and cut as they say, does not leave."""
    choice, places, rest = data[:1] or b"\0", data[1:9], data[9:]
    coding = list(ENCODERS)[choice[0] % len(ENCODERS)]
    at = choice[0] * len(rest) // 256
    coded = ENCODERS[coding](rest[:at] + SECRET + rest[at:])
    assert not sent(DETECTOR, coding, cut(coded, places))[1]


def coded(data: bytes) -> None:
    """A decoder raises one exception only."""
    undo = decoder(["gzip", "deflate", "br", "zstd"][data[0] % 4] if data else "gzip")
    assert undo
    try:
        for start in range(1, len(data), 7):
            list(undo.decode(data[start : start + 7]))
        undo.finish()
    except Undecodable:
        pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request": test_http1.assert_request,
    "response": lambda data: test_http1.assert_response(data, b"GET"),
    "framing": test_framing.agree,
    "lanes": test_readers.assert_alike,
    "clienthello": test_clienthello.agree,
    "yaml": test_yamltree._survives,
    "rules": test_rulefile.survives,
    "coding": coded,
    "body": body,
}
SEEDS = {
    "request": b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\n\r\n",
    "response": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "framing": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5",
    "clienthello": next(iter(test_clienthello.REAL.values())),
    "rules": test_rulefile.FULL.encode(),
    "yaml": b"limits: {idle: 60s}\nlisten: ['127.0.0.1:0']\n",
}
SEEDS["lanes"] = SEEDS["request"]


def main() -> None:
    """Fuzz the target that is named, for ever or as long as the second word says; a finding ends it with its input."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: scripts/fuzz TARGET [SECONDS]; a target is one of {', '.join(TARGETS)}")
    target, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    folder = Path(".fuzz") / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seed").write_bytes(SEEDS.get(target, b"\0"))
    options = [f"-max_total_time={seconds}", "-max_len=2048", f"-artifact_prefix={folder}-"]
    atheris.Setup([sys.argv[0], *options, str(folder)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
