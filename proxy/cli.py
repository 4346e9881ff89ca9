"""The `sallyport` command: reads arguments, calls a room, prints. Errors are one line with the next step."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy import __version__, killswitch
from proxy.agent import NEVER, Agent, AgentState
from proxy.agentca import forget
from proxy.credential import clean_secret
from proxy.doctor import add_arguments as add_doctor_arguments
from proxy.doctor import run as run_doctor
from proxy.grant import Grant
from proxy.jail import add_arguments as add_exec_arguments
from proxy.jail import run as run_jail
from proxy.masterkey import load_master_key
from proxy.outbound import placeholder_of
from proxy.problem import Problems, UserError
from proxy.quantity import parse_duration
from proxy.registry import Registry
from proxy.rotation import begin, finish, load_authority, shown
from proxy.running import Running, fetch_status
from proxy.sandboxca import bundle_for
from proxy.sandboxenv import FORMATS, Bundle, ca_bundle, refresh_bundle, variables
from proxy.settings import Settings, load_settings, settings_schema
from proxy.store import Store, StoreUnavailable
from proxy.vault import Entry, Vault

if TYPE_CHECKING:
    from proxy.admin import Status

type Arguments = argparse.Namespace
type Command = Callable[[Arguments], int]

OK, PROBLEMS, USAGE = 0, 1, 2
_SETTING_FLAGS = ("listen", "admin", "rules", "certs", "state", "store", "lane")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments)
    except Problems as error:
        print(error, file=sys.stderr)
        return PROBLEMS
    except UserError as error:
        print(f"sallyport: {error}", file=sys.stderr)
        return PROBLEMS
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sallyport ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PROBLEMS


def settings_of(arguments: Arguments) -> Settings:
    """The settings as flags, environment and file give them.

    Raises Problems.
    """
    flags = {name: value for name in _SETTING_FLAGS if (value := getattr(arguments, name, None)) is not None}
    config = getattr(arguments, "config", None) or os.environ.get("SALLYPORT_CONFIG")
    return load_settings(Path(config) if config else None, os.environ, flags, Path.cwd())


def print_json(data: object) -> None:
    """Data as one line of JSON."""
    print(json.dumps(data, ensure_ascii=False))


def with_store[T](settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` makes of the store of these settings."""

    async def run() -> T:
        async with await Store.open(settings.store.reveal(), settings.state) as store:
            return await work(store)

    return asyncio.run(run())


# run, demo


def _run(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)

    def ready(status: Status, problems: Sequence[str], running: Running) -> None:
        for problem in problems:
            print(problem, file=sys.stderr)
        _print_ready(settings, status, running)

    if settings.workers > 1:
        from proxy.supervisor import supervise

        asyncio.run(supervise(settings, lambda: settings_of(arguments), ready))
    else:
        from proxy.server import serve  # mitmproxy takes half a second to import

        asyncio.run(serve(settings, os.environ, ready))
    return OK


def _print_ready(settings: Settings, status: Status, running: Running) -> None:
    broken = f"none: {settings.rules} is broken (see above)"
    rules = f"{status.rules} from {settings.rules}" if status.policy else broken
    listeners = ", ".join(
        address if address.startswith(("unix:", "tls:", "transparent@")) else f"http://{address}"
        for address in running.listen
    )
    workers = f"\n  workers  {settings.workers}" if settings.workers > 1 else ""
    print(
        f"""Sallyport {__version__}
  proxy    {listeners}
  admin    http://{running.admin}/metrics  /healthz  /readyz  /api/status
  CA       {settings.certs / "ca.pem"}
  rules    {rules}
  store    {settings.store}{workers}

Next, in another shell:
  sallyport agent add coder-1                  register a sandbox
  eval "$(sallyport agent env coder-1)"        point this shell's clients at the proxy
  curl https://api.github.com/zen              goes out if a rule allows it""",
        flush=True,
    )


def _reload(arguments: Arguments) -> int:
    running = Running.read(settings_of(arguments))  # what is wrong with the settings is told here, with its place
    if running is None:
        raise UserError("no proxy runs here with these settings: sallyport run")
    before = fetch_status(running.reachable_admin)
    if not before["workers"]:
        raise UserError(
            "this proxy is one process, which cannot be replaced while it serves: set workers: 2 and restart it "
            "(rules, agents and credentials need no reload)"
        )
    os.kill(running.process, signal.SIGUSR2)
    while (status := fetch_status(running.reachable_admin))["reloads"] == before["reloads"]:
        time.sleep(0.1)
    if status["reload_problem"]:
        raise UserError(f"the old workers go on: {status['reload_problem']}")
    for name in status["awaiting_restart"]:
        print(f"note: {name}: waits for a restart of the proxy", file=sys.stderr)
    there = [worker for worker in status["workers"] if not worker["leaving"]]
    print(f"{len(there)} workers are new; the old ones end with their last connection", file=sys.stderr)
    return OK


def _demo(arguments: Arguments) -> int:
    from proxy.demo import run_demo

    return run_demo(Path(arguments.keep) if arguments.keep else None)


# agents


def _agent_add(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    ttl = parse_ttl(arguments.ttl)
    labels = pairs(arguments.label, "--label")

    async def add(store: Store) -> tuple[str, Agent]:
        registry = await _registry(settings, store)
        token = await registry.add(arguments.id, labels, ttl, arguments.on_behalf_of or "")
        return token, await registry.show(arguments.id)

    token, agent = with_store(settings, add)
    _print_token(arguments, agent, token)
    return OK


def _agent_token(arguments: Arguments) -> int:
    settings = settings_of(arguments)

    async def renew(store: Store) -> tuple[str, Agent]:
        registry = await _registry(settings, store)
        return await registry.token(arguments.id), await registry.show(arguments.id)

    token, agent = with_store(settings, renew)
    _print_token(arguments, agent, token)
    return OK


async def _registry(settings: Settings, store: Store) -> Registry:
    return Registry(store, await load_master_key(settings.state, os.environ, store))


def _print_token(arguments: Arguments, agent: Agent, token: str) -> None:
    if arguments.json:
        print_json({"agent": agent.id, "token": token, "expires": shown_time(agent.expires)})
        return
    print(token)
    print(
        f'agent {agent.id}: point a shell at the proxy with eval "$(sallyport agent env {agent.id})"', file=sys.stderr
    )


def _agent_list(arguments: Arguments) -> int:
    agents = with_store(settings_of(arguments), lambda store: Registry(store).list())
    if arguments.json:
        print_json([_agent_data(agent) for agent in agents])
    elif not agents:
        print("no agents yet: sallyport agent add ID", file=sys.stderr)
    else:
        rows = [
            (agent.id, _state(agent), shown_time(agent.expires) or "never", agent.on_behalf_of, _pairs(agent.labels))
            for agent in agents
        ]
        print_table(("AGENT", "STATE", "EXPIRES", "ON BEHALF OF", "LABELS"), rows)
    return OK


def _agent_show(arguments: Arguments) -> int:
    agent = with_store(settings_of(arguments), lambda store: Registry(store).show(arguments.id))
    data = _agent_data(agent)
    if arguments.json:
        print_json(data)
    else:
        print("\n".join(f"{key:13} {_plain(value)}" for key, value in data.items()))
    return OK


def _agent_data(agent: Agent) -> dict[str, object]:
    return {
        "agent": agent.id,
        "state": _state(agent),
        "labels": dict(agent.labels),
        "on_behalf_of": agent.on_behalf_of or None,
        "expires": shown_time(agent.expires),
        "kill_reason": agent.kill_reason or None,
    }


def _state(agent: Agent) -> str:
    return "expired" if agent.state == "active" and agent.expired(time.time()) else str(agent.state)


def _agent_remove(arguments: Arguments) -> int:
    settings = settings_of(arguments)
    with_store(settings, lambda store: Registry(store).remove(arguments.id))
    forget(settings.certs, arguments.id)
    print(f"removed agent {arguments.id}", file=sys.stderr)
    return OK


def _agent_kill(arguments: Arguments) -> int:
    settings, agent_id, reason = settings_of(arguments), _one_or_all(arguments), arguments.reason or ""
    who, undo = agent_id or "every agent", f"undo with: sallyport agent revive {agent_id or '--all'}"
    try:
        with_store(settings, lambda store: Registry(store).kill(agent_id, reason))
    except StoreUnavailable as error:
        killswitch.stop(settings.state, agent_id, reason)
        print(f"killed {who} on this host, by {settings.state / killswitch.FILE}; {undo}", file=sys.stderr)
        if not settings.store.embedded:
            raise UserError(f"other hosts were not told: {error}") from None
    else:
        print(f"killed {who}; {undo}", file=sys.stderr)
    finally:
        forget(settings.certs, agent_id)
    return OK


def _agent_revive(arguments: Arguments) -> int:
    settings, agent_id = settings_of(arguments), _one_or_all(arguments)
    who = agent_id or "every agent"

    async def revive(store: Store) -> bool:
        registry = Registry(store)
        await registry.revive(agent_id)
        return agent_id is not None and (await registry.show(agent_id)).state is AgentState.KILLED

    if killswitch.resume(settings.state, agent_id):
        print(f"{who} is no longer stopped by {settings.state / killswitch.FILE}", file=sys.stderr)
    still = with_store(settings, revive) or killswitch.read_stops(settings.state).everybody is not None
    print(f"revived {who}; connections that were cut stay so", file=sys.stderr)
    if agent_id and still:
        print("every agent is stopped still: sallyport agent revive --all", file=sys.stderr)
    return OK


def _one_or_all(arguments: Arguments) -> str | None:
    if bool(arguments.id) == arguments.all:
        raise UserError("name one agent, or give --all")
    agent_id: str | None = arguments.id
    return agent_id


def _agent_env(arguments: Arguments) -> int:
    settings = settings_of(arguments)

    async def token(store: Store) -> tuple[str, Agent]:
        registry = await _registry(settings, store)
        return await registry.reissue(arguments.id), await registry.show(arguments.id)

    issued, agent = with_store(settings, token)
    written, notes = bundle_for(settings, agent)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    bundle = Bundle(arguments.ca) if arguments.ca else written
    running = Running.read(settings)
    if not running and not arguments.proxy:
        print("note: no proxy runs here with these settings; the address is where it would listen", file=sys.stderr)
    proxy = arguments.proxy or (running or Running.expected(settings)).reachable
    values = variables(arguments.id, issued, proxy, bundle)
    if arguments.json:
        print_json(values)
    else:
        print(FORMATS[arguments.format](values))
    return OK


# vault


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
    if arguments.json:
        print_json(data)
    else:
        print("\n".join(f"{key:12} {_plain(value)}" for key, value in data.items()))
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


# ca, schema


def _ca_export(arguments: Arguments) -> int:
    pem = load_authority(settings_of(arguments).certs).pem
    sys.stdout.buffer.write(ca_bundle(pem) if arguments.bundle else pem)
    return OK


def _ca_rotate(arguments: Arguments) -> int:
    certs = settings_of(arguments).certs
    if arguments.finish:
        finish(certs)
        refresh_bundle(certs, load_authority(certs).pem)
        print("the new CA is the only one; sandboxes that trust the old one alone fail from now on", file=sys.stderr)
        return OK
    try:
        overlap = timedelta(seconds=parse_duration(arguments.overlap))
    except ValueError as error:
        raise UserError(f"--overlap {arguments.overlap!r}: {error.args[-1]}") from None
    rotation = begin(certs, overlap)
    refresh_bundle(certs, load_authority(certs).pem)
    until = shown(rotation.until)
    if rotation.cross:
        print(f"the new CA signs now, and until {until} it is vouched for by the old one", file=sys.stderr)
    else:
        print(f"the old CA may vouch for no other: it signs until {until}, then the new one does", file=sys.stderr)
    print(
        "hand out the bundle again before that (sallyport agent env, sallyport ca export --bundle): it holds both",
        file=sys.stderr,
    )
    return OK


def _schema(arguments: Arguments) -> int:
    from proxy.rulefile import rules_schema

    print(json.dumps(rules_schema() if arguments.what == "rules" else settings_schema(), indent=2))
    return OK


# check, test, explain


def _check(arguments: Arguments) -> int:
    from proxy.check import check

    return check(lambda: settings_of(arguments), [Path(path) for path in arguments.paths])


def _test(arguments: Arguments) -> int:
    from proxy.check import run_tests

    return run_tests(lambda: settings_of(arguments).rules, [Path(path) for path in arguments.paths])


def _explain(arguments: Arguments) -> int:
    from proxy.check import explain_request

    return explain_request(settings_of(arguments), arguments)


# Words


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`k=v` arguments as a mapping.

    Raises UserError.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f'{flag} {text!r}: write it as "key=value"')
        found[key] = value
    return found


def parse_ttl(text: str | None) -> float | None:
    """Seconds an agent lives from now on.

    Raises UserError.
    """
    return None if text is None else parse_span(text, "--ttl")


def parse_span(text: str, flag: str) -> float:
    """The seconds that a flag gives.

    Raises UserError.
    """
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error.args[-1]}") from None


def parse_expires(text: str | None) -> float:
    """Unix seconds from an RFC 3339 time, a date, or a duration from now.

    Raises UserError.
    """
    if text is None:
        return NEVER
    try:
        return time.time() + parse_duration(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f'--expires {text!r}: write "90d", "2027-01-31" or "2027-01-31T12:00:00Z"') from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def shown_time(seconds: float) -> str | None:
    """RFC 3339 in UTC; None for never."""
    if seconds == NEVER:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return _pairs(value) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "any"
    return "-" if value is None else str(value)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# Arguments


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="settings file (default: sallyport.yaml if it is there)")
    for name in _SETTING_FLAGS:
        common.add_argument(f"--{name}", metavar=name.upper(), help=argparse.SUPPRESS)
    json_flag = argparse.ArgumentParser(add_help=False)
    json_flag.add_argument("--json", action="store_true", help="print data as JSON")

    parser = argparse.ArgumentParser(
        prog="sallyport", description="The zero-trust egress proxy for AI-agent sandboxes.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"sallyport {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(parent: Any, name: str, command: Command, text: str, *, data: bool = False) -> argparse.ArgumentParser:
        parents = [common, json_flag] if data else [common]
        added: argparse.ArgumentParser = parent.add_parser(name, parents=parents, help=text, description=text)
        added.set_defaults(command=command)
        return added

    demo = verb(verbs, "demo", _demo, "tell the whole story in a minute, offline")
    demo.add_argument("--keep", metavar="DIR", help="keep the demo's files in DIR")
    verb(verbs, "run", _run, "start the proxy in the foreground")
    verb(verbs, "reload", _reload, "replace the workers of the running proxy, one by one")
    check = verb(verbs, "check", _check, "validate settings and rules")
    check.add_argument(
        "paths", nargs="*", metavar="PATH", help="rule files or folders (default: those of the settings)"
    )
    test = verb(verbs, "test", _test, "run the *.test.yaml files next to the rules")
    test.add_argument("paths", nargs="*", metavar="PATH")
    explain = verb(verbs, "explain", _explain, "show which rule decides a request, and why", data=True)
    explain.add_argument("--agent", required=True, metavar="ID")
    explain.add_argument("--label", action="append", default=[], metavar="K=V", help="labels of an unregistered agent")
    explain.add_argument("method", metavar="METHOD")
    explain.add_argument("url", metavar="URL")
    explain.add_argument("-H", "--header", action="append", default=[], metavar="'K: V'")
    explain.add_argument("--data", metavar="D|@FILE", help="the request's body")

    def group(name: str, text: str) -> Any:
        return verbs.add_parser(name, parents=[common], help=text).add_subparsers(required=True, metavar="COMMAND")

    from proxy.cliaudit import audit_parser  # which need this module
    from proxy.clicanary import canary_parser
    from proxy.cligateway import gateway_parser
    from proxy.clirekey import rekey_parser

    _agent_parser(group("agent", "register, show and stop agents"), verb)
    audit_parser(verbs, group("audit", "the audit log"), verb)
    gateway_parser(group("gateway", "register who may mint tokens for agents"), verb)
    vault = group("vault", "seal, list and rotate credentials")
    _vault_parser(vault, verb)
    rekey_parser(vault, verb)
    canary_parser(group("canary", "tokens that open nothing and may never leave"), verb)
    ca = group("ca", "the CA certificate")
    export = verb(ca, "export", _ca_export, "print the CA certificate")
    export.add_argument("--bundle", action="store_true", help="merged with the system's roots")
    rotate = verb(ca, "rotate", _ca_rotate, "make a new CA while sandboxes that trust the old one go on")
    rotate.add_argument("--overlap", metavar="7d", default="7d", help="how long both are trusted (default: 7d)")
    rotate.add_argument("--finish", action="store_true", help="end the overlap now")
    add_exec_arguments(verb(verbs, "exec", run_jail, "run a command in a jail whose only way out is the proxy"))
    add_doctor_arguments(verb(verbs, "doctor", run_doctor, "in a sandbox: do its clients work, is there a way round"))
    schema = verb(verbs, "schema", _schema, "print a JSON Schema for editors")
    schema.add_argument("what", choices=("rules", "settings"))
    return parser


def _agent_parser(agent: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    add = verb(agent, "add", _agent_add, "register an agent; prints its token once", data=True)
    add.add_argument("id", metavar="ID")
    add.add_argument("--label", action="append", default=[], metavar="K=V")
    add.add_argument("--ttl", metavar="8h", help="how long it may act")
    add.add_argument("--on-behalf-of", metavar="USER")
    verb(agent, "list", _agent_list, "list the agents", data=True)
    for name, command, text in (
        ("show", _agent_show, "show one agent"),
        ("token", _agent_token, "issue a new token and end the old one"),
        ("remove", _agent_remove, "forget an agent"),
    ):
        verb(agent, name, command, text, data=True).add_argument("id", metavar="ID")
    env = verb(agent, "env", _agent_env, "print everything a sandbox must export", data=True)
    env.add_argument("id", metavar="ID")
    env.add_argument("--format", choices=tuple(FORMATS), default="sh")
    env.add_argument("--proxy", metavar="HOST:PORT", help="where the sandbox reaches the proxy (default: the listener)")
    env.add_argument("--ca", metavar="PATH", help="where the CA bundle lies in the sandbox (default: its path here)")
    kill = verb(agent, "kill", _agent_kill, "refuse and cut an agent, or all, within a second")
    kill.add_argument("--reason", metavar="TEXT")
    revive = verb(agent, "revive", _agent_revive, "undo kill")
    for switch in (kill, revive):
        switch.add_argument("id", nargs="?", metavar="ID")
        switch.add_argument("--all", action="store_true")


def _vault_parser(vault: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
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
