"""`sallyport vault rekey`: what it prints, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxy.clitools import OK, print_json, settings_of, with_store
from proxy.files import own_dir
from proxy.masterkey import KEY, KEY_FILE, NEXT
from proxy.problem import UserError
from proxy.rekey import Rekeyed, announce, rekey
from proxy.settings import Settings

type Arguments = argparse.Namespace


def _rekey(arguments: Arguments) -> int:
    settings, new = settings_of(arguments), _new_key(arguments.new_key_file)
    if arguments.prepare:
        return _prepare(settings, new)
    done = with_store(settings, lambda store: rekey(settings.state, os.environ, store, new))
    for name in done.broken:
        print(f"note: {ascii(name)[1:-1]} did not open before either, and was left as it is", file=sys.stderr)
    if arguments.json:
        print_json({"key": done.key, "resealed": done.resealed, "finished": done.finished})
        return OK
    records = f"{done.resealed} record{'' if done.resealed == 1 else 's'}"
    print(f"everything is sealed under master key {done.key} ({records} now)", file=sys.stderr)
    _next_step(settings, done)
    return OK


def _next_step(settings: Settings, done: Rekeyed) -> None:
    if done.finished:
        print(f"the old key is no longer in {settings.state}; copies of it elsewhere are yours", file=sys.stderr)
        return
    name = KEY if KEY in os.environ else KEY_FILE
    print(
        f"now put the new key into {name}, for this shell and for the proxy's next start; until then both go on by "
        f"{settings.state / NEXT}. Then `sallyport vault rekey` takes that copy away",
        file=sys.stderr,
    )


def _prepare(settings: Settings, new: bytes | None) -> int:
    if new is None:
        raise UserError("--prepare makes a key known that is to be the same everywhere: give --new-key-file FILE")
    announce(own_dir(settings.state), os.environ, None, new, os.urandom)
    print(
        "the proxies of this state directory know the new key; when all hosts do, run `sallyport vault rekey "
        "--new-key-file FILE` on one, then `sallyport vault rekey` on the others",
        file=sys.stderr,
    )
    return OK


def _new_key(name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--new-key-file {name}: {(error.strerror or '').lower()}") from None


def rekey_parser(vault: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The arguments of `sallyport vault rekey`."""
    command = verb(vault, "rekey", _rekey, "change the master key while the proxy runs", data=True)
    command.add_argument("--new-key-file", metavar="FILE", help="the new key (default: one is made)")
    command.add_argument("--prepare", action="store_true", help="only make it known here, for stores of several hosts")
