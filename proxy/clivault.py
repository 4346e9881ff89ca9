"""`sallyport vault`: credentials sealed, listed and rotated, never shown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from proxy.clitools import (
    OK,
    Arguments,
    pairs,
    parse_expires,
    print_data,
    print_json,
    print_table,
    settings_of,
    shown_time,
    with_store,
)
from proxy.credential import clean_secret
from proxy.grant import Grant
from proxy.masterkey import load_master_key
from proxy.outbound import placeholder_of
from proxy.problem import UserError
from proxy.store import Store
from proxy.vault import Entry, Vault


def _vault[T](arguments: Arguments, work: Callable[[Vault], Awaitable[T]]) -> T:
    settings = settings_of(arguments)

    async def run(store: Store) -> T:
        master = await load_master_key(settings.state, os.environ, store)
        return await work(Vault(store, master, settings.state, settings.vault.lease))

    return with_store(settings, run)


def _vault_put(arguments: Arguments) -> int:
    try:
        grant = Grant.parse(
            hosts=arguments.host,
            methods=arguments.method,
            paths=arguments.path,
            agents=arguments.agent,
            expires=parse_expires(arguments.expires),
        )
    except ValueError as error:
        raise UserError("; ".join(str(word) for word in error.args if word)) from None
    fields = pairs(arguments.field, "--field")
    secret, notes = clean_secret(_read_secret(arguments), arguments.kind)
    version = _vault(arguments, lambda vault: vault.put(arguments.name, arguments.kind, fields, secret, grant))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.kind == "placeholder" and not arguments.json:
        print(
            f"the agent writes {placeholder_of(arguments.name, fields)} where the secret shall stand", file=sys.stderr
        )
    return _print_version(arguments, version, "sealed")


def _vault_rotate(arguments: Arguments) -> int:
    data = _read_secret(arguments)

    async def rotate(vault: Vault) -> int:
        entry = await vault.show(arguments.name)
        secret, notes = clean_secret(data, entry.kind)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return await vault.rotate(arguments.name, secret)

    return _print_version(arguments, _vault(arguments, rotate), "rotated")


def _print_version(arguments: Arguments, version: int, done: str) -> int:
    if arguments.json:
        print_json({"credential": arguments.name, "version": version})
    else:
        print(f"{done} {arguments.name} version {version}", file=sys.stderr)
    return OK


def _vault_list(arguments: Arguments) -> int:
    entries = _vault(arguments, lambda vault: vault.list())
    if arguments.json:
        print_json([_entry_data(entry) for entry in entries])
    elif not entries:
        print("the vault is empty: sallyport vault put NAME --host HOST < secret-file", file=sys.stderr)
    else:
        rows = [
            (entry.name, str(entry.version), entry.kind, ", ".join(entry.grant.hosts) if entry.grant else entry.problem)
            for entry in entries
        ]
        print_table(("CREDENTIAL", "VERSION", "KIND", "HOSTS"), rows)
    return OK


def _vault_show(arguments: Arguments) -> int:
    data = _entry_data(_vault(arguments, lambda vault: vault.show(arguments.name)))
    print_data(arguments, data, 12)
    return OK


def _entry_data(entry: Entry) -> dict[str, object]:
    if entry.problem:
        return {"credential": entry.name, "problem": entry.problem}
    data: dict[str, object] = {
        "credential": entry.name,
        "version": entry.version,
        "kind": entry.kind,
        "fields": dict(entry.fields),
        "created": shown_time(entry.created),
        "rotated": shown_time(entry.rotated) if entry.rotated else None,
    }
    if entry.grant:
        data |= entry.grant.canonical() | {"expires": shown_time(entry.grant.expires)}
    if entry.kind == "placeholder":
        data["placeholder"] = placeholder_of(entry.name, entry.fields)
    return data


def _vault_remove(arguments: Arguments) -> int:
    _vault(arguments, lambda vault: vault.remove(arguments.name))
    print(f"removed credential {arguments.name}", file=sys.stderr)
    return OK


def _read_secret(arguments: Arguments) -> bytes:
    if arguments.from_env:
        if arguments.from_env not in os.environ:
            raise UserError(f"--from-env: there is no variable {arguments.from_env}")
        return os.fsencode(os.environ[arguments.from_env])
    if arguments.from_file:
        try:
            return Path(arguments.from_file).read_bytes()
        except OSError as error:
            raise UserError(f"--from-file {arguments.from_file}: {(error.strerror or '').lower()}") from None
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("secret (not shown): ").encode()
    return sys.stdin.buffer.read()


def vault_parser(vault: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The arguments of `sallyport vault`."""
    put = verb(vault, "put", _vault_put, "seal a credential; the secret comes from standard input", data=True)
    put.add_argument("name", metavar="NAME")
    put.add_argument(
        "--kind", default="static", metavar="K", help="static (default), bearer, basic, header, query, ..."
    )
    put.add_argument("--field", action="append", default=[], metavar="K=V")
    put.add_argument("--host", action="append", default=[], metavar="HOST", help="where it may be sent (at least one)")
    put.add_argument("--method", action="append", default=[], metavar="M")
    put.add_argument("--path", action="append", default=[], metavar="P")
    put.add_argument("--agent", action="append", default=[], metavar="A")
    put.add_argument("--expires", metavar="T", help='"90d" or "2027-01-31"')
    rotate = verb(vault, "rotate", _vault_rotate, "seal a new secret under an old name and grant", data=True)
    rotate.add_argument("name", metavar="NAME")
    for command in (put, rotate):
        source = command.add_mutually_exclusive_group()
        source.add_argument("--from-env", metavar="VAR")
        source.add_argument("--from-file", metavar="FILE")
    verb(vault, "list", _vault_list, "list the credentials, never a secret", data=True)
    verb(vault, "show", _vault_show, "show one credential, never its secret", data=True).add_argument("name")
    verb(vault, "remove", _vault_remove, "remove a credential", data=True).add_argument("name", metavar="NAME")
