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
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy import __version__
from proxy.cliagent import agent_parser
from proxy.cliaudit import audit_parser
from proxy.clicanary import canary_parser
from proxy.cligateway import gateway_parser
from proxy.clirekey import rekey_parser
from proxy.clitools import (
    OK,
    PROBLEMS,
    SETTING_FLAGS,
    Arguments,
    Command,
    settings_of,
)
from proxy.clivault import vault_parser
from proxy.doctor import add_arguments as add_doctor_arguments
from proxy.doctor import run as run_doctor
from proxy.jail import add_arguments as add_exec_arguments
from proxy.jail import run as run_jail
from proxy.problem import Problems, UserError
from proxy.quantity import parse_duration
from proxy.rotation import begin, finish, load_authority, shown
from proxy.running import Running, fetch_status
from proxy.sandboxenv import ca_bundle, refresh_bundle
from proxy.settings import Settings, settings_schema

if TYPE_CHECKING:
    from proxy.admin import Status


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
        from proxy.poller import run
        from proxy.server import serve  # mitmproxy takes half a second to import

        run(serve(settings, os.environ, ready))
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


# Arguments


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="settings file (default: sallyport.yaml if it is there)")
    for name in SETTING_FLAGS:
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

    agent_parser(group("agent", "register, show and stop agents"), verb)
    audit_parser(verbs, group("audit", "the audit log"), verb)
    gateway_parser(group("gateway", "register who may mint tokens for agents"), verb)
    vault = group("vault", "seal, list and rotate credentials")
    vault_parser(vault, verb)
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
