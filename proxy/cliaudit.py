"""`sallyport tail` and `sallyport audit verify`: the audit log as it is written, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from proxy.auditchain import BEGIN, Chain
from proxy.clitools import OK, PROBLEMS, print_json, settings_of
from proxy.problem import UserError

type Arguments = argparse.Namespace

STEP = 0.1  # seconds between two looks for more
SHOWN = 20  # wrong lines that are told one by one


def _log_file(arguments: Arguments) -> Path:
    file = settings_of(arguments).audit.file
    if file is None:
        raise UserError("there is no audit log: set audit.file")
    return file


def _tail(arguments: Arguments) -> int:
    for line in _follow(_log_file(arguments)):
        record = _record(line)
        if record is None or (arguments.agent and record.get("agent") != arguments.agent):
            continue
        if arguments.blocked and record.get("verdict") != "block":
            continue
        print(line.decode("ascii", "replace").rstrip("\n") if arguments.json else _shown(record), flush=True)
    return OK


def _follow(path: Path) -> Iterator[bytes]:
    """Whole lines that are written from now on; a renamed file is read to its end, then the new one."""
    file = _opened(path, end=True)
    partial = b""
    while True:
        moved = file is None or not _is_at(path, file)
        while file and (data := file.readline()):
            partial += data
            if partial.endswith(b"\n"):
                yield partial
                partial = b""
        if file and os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)  # it was emptied
        if moved and (new := _opened(path, end=False)):
            if file:
                file.close()
            file, partial = new, b""
            continue
        time.sleep(STEP)


def _opened(path: Path, *, end: bool) -> IO[bytes] | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if end:
        file.seek(0, os.SEEK_END)
    return file


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _shown(record: dict[str, Any]) -> str:
    """One line for people. What a sandbox wrote is escaped: it could hold what a terminal obeys."""
    where = f"{record.get('scheme')}://{record.get('host')}:{record.get('port')}{record.get('path')}"
    why = record.get("rule") if record.get("verdict") == "allow" else record.get("reason")
    injected = ",".join(str(one.get("credential")) for one in record.get("injected") or ())
    words = (
        str(record.get("time"))[11:23],
        str(record.get("agent") or "-"),
        str(record.get("verdict")),
        str(why or record.get("reason")),
        str(record.get("status") or "-"),
        f"{record.get('duration_ms')}ms",
        f"{record.get('method')} {where}",
        *([f"+{injected}"] if injected else []),
    )
    return json.dumps("  ".join(words))[1:-1]


def _verify(arguments: Arguments) -> int:
    chain, wrong = Chain(), list[str]()
    for path in [Path(name) for name in arguments.files] or [_log_file(arguments)]:
        try:
            with path.open("rb") as lines:
                wrong += [f"{path}:{number}: {what}" for number, what in chain.verify(lines, arguments.expect or "")]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if arguments.expect and not chain.expected:
        wrong.append(f"no line has the hash {arguments.expect}: the log was cut off, or made anew")
    if arguments.json:
        print_json(
            {
                "ok": not wrong,
                "lines": chain.lines,
                "torn": chain.torn,
                "after": chain.after,
                "last": chain.last,
                "wrong": wrong,
            }
        )
        return PROBLEMS if wrong else OK
    for line in wrong[:SHOWN]:
        print(line, file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} of {chain.lines} lines are wrong: the audit log was changed", file=sys.stderr)
        return PROBLEMS
    more = f", {chain.unlinked} from before the chain" if chain.unlinked else ""
    more += f", the first after one with the hash {chain.after}" if chain.after != BEGIN else ""
    more += f", {chain.torn} that a killed proxy did not finish" if chain.torn else ""
    print(f"{chain.lines} lines, none changed{more}; the last has the hash {chain.last}")
    return OK


def audit_parser(verbs: Any, audit: Any, verb: Any) -> None:
    """Add `tail` and `audit verify`."""
    tail = verb(verbs, "tail", _tail, "show decisions as they are made", data=True)
    tail.add_argument("--agent", metavar="ID", help="of this agent alone")
    tail.add_argument("--blocked", action="store_true", help="only what was refused")
    verify = verb(audit, "verify", _verify, "check that no line of the audit log was changed", data=True)
    verify.add_argument("files", nargs="*", metavar="FILE", help="oldest first (default: that of the settings)")
    verify.add_argument("--expect", metavar="HASH", help="a hash kept elsewhere, which must be in the log")
