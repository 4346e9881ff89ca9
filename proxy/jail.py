"""`sallyport exec`: a command in a jail whose only way out is the running proxy. Linux.

Loads nothing that is slow: settings are read as far as is needed to find the proxy, and that does the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from proxy import handover, jaildns, jailnet
from proxy.jailfs import BIN, Mount, Sight, bwrap_arguments
from proxy.problem import Problems, UserError
from proxy.proxies import Proxies

type Arguments = argparse.Namespace

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
KEPT = ("PATH", "LANG", "LANGUAGE", "TERM", "COLORTERM", "NO_COLOR", "TZ", "USER", "LOGNAME", "SHELL")
LOOK = 0.25  # seconds between two looks for processes that serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `exec`."""
    parser.add_argument("--agent", required=True, metavar="ID", help="who the command is")
    parser.add_argument("--ttl", metavar="1h", help="register the agent if it is not; removed when the command ends")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="SRC[:DST][:ro]", help="a file or folder that is in the jail"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable to pass on")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="[--] CMD...")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """`sallyport exec` without the rest of `sallyport`; the exit status."""
    parser = argparse.ArgumentParser(prog="sallyport exec", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="settings file (default: sallyport.yaml if it is there)")
    parser.add_argument("--state", metavar="DIR", help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except (UserError, Problems) as error:
        _say(str(error) if isinstance(error, Problems) else f"sallyport: {error}")
        return 1


def run(arguments: Arguments) -> int:
    """Run the command; its exit status, or 128 + N where signal N ended it.

    Raises UserError, and Problems for broken settings.
    """
    command = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not command:
        raise UserError("no command: sallyport exec --agent ID -- CMD")
    bwrap = shutil.which("bwrap")
    if bwrap is None or not sys.platform.startswith("linux"):
        raise UserError("exec needs Linux and bubblewrap: install the package bubblewrap (command bwrap)")
    _keep_descriptors()
    cwd = Path.cwd()
    config, state = find_state(arguments, os.environ, cwd)
    proxies = Proxies(state, {"agent": arguments.agent, "ttl": arguments.ttl})
    given = proxies.first()
    for note in given["notes"]:
        _say(f"note: {note}")
    hidden = [*map(Path, given["hidden"]), state.resolve(), *([config.resolve()] if config else [])]
    home = Path(os.environ.get("HOME", "/")).resolve()
    home = home if home != Path("/") else Path("/tmp")  # noqa: S108  # the jail's own
    mounts = [Mount.parse(text, cwd) for text in arguments.mount]
    sight = Sight(cwd, home, mounts, hidden, [Path(path) for path in given["files"]])
    if not sight.workable:
        _say(f"note: {cwd} is not writable in the jail: run it from the agent's own folder for that")
    environment = {**environment_of(os.environ, arguments.env), **given["environment"]}
    environment |= {"HOME": str(sight.home), "PWD": str(sight.start)}
    return Jail.start([bwrap, *bwrap_arguments(sight)], command, environment, proxies).wait()


def _keep_descriptors() -> None:
    """What the shell has open beyond the first three is not for the jail: a folder's descriptor leads out of it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def environment_of(outer: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """What a jail gets of our variables: nothing that was not asked for by name, because many hold secrets."""
    kept = {name: outer[name] for name in outer if name in KEPT or name.startswith("LC_")}
    for text in asked:
        name, equals, value = text.partition("=")
        if equals:
            kept[name] = value
        elif name in outer:
            kept[name] = outer[name]
    kept["PATH"] = f"{kept.get('PATH', os.defpath)}:{BIN}"
    return kept


def find_state(arguments: Arguments, environment: Mapping[str, str], cwd: Path) -> tuple[Path | None, Path]:
    """The settings file, if there is one, and the state directory, as `load_settings` would find them.

    Raises Problems.
    """
    named = getattr(arguments, "config", None) or environment.get("SALLYPORT_CONFIG")
    config = cwd / named if named else cwd / "sallyport.yaml"
    there = config if config.is_file() else None
    flag = getattr(arguments, "state", None) or environment.get("SALLYPORT_STATE", "").strip()
    if flag:
        return there, cwd / flag
    if there is None and not named:
        return None, cwd / ".sallyport"
    from proxy.settings import load_settings  # slow: only where a file says it

    return there, load_settings(config, environment, {}, cwd).state


@dataclass(slots=True)
class Jail:
    """A jail that runs."""

    bwrap: int  # process
    info: int  # descriptor on which bubblewrap tells its child
    dns: socket.socket
    proxies: Proxies
    init: int = 0

    @staticmethod
    def start(words: Sequence[str], command: Sequence[str], environment: Mapping[str, str], proxies: Proxies) -> Jail:
        """Make the namespaces, give the proxy its listeners in them, and let the command begin.

        Raises UserError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        told, tell = os.pipe()
        process = os.fork()
        if process == 0:
            ours.close()
            _become(theirs, [*words, "--info-fd", str(tell), "--", *command], environment, tell)
        theirs.close()
        os.close(tell)
        with ours:
            message = handover.receive(ours)
            if message is None or "error" in message.data:
                os.waitpid(process, 0)
                raise UserError(message.data["error"] if message else "the jail could not be made")
            dns, *listening = [socket.socket(fileno=descriptor) for descriptor in message.descriptors]
            jail = Jail(process, told, dns, proxies)
            for number in FORWARDED:
                signal.signal(number, jail.forward)
            proxies.hand_over(listening)
            handover.send(ours, {})
        return jail

    def forward(self, number: int, _: object) -> None:
        """Send a signal on to the command; before there is one, the jail ends."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._command() or self.bwrap, number)

    def _command(self) -> int:
        if not self.init:
            with contextlib.suppress(BlockingIOError, ValueError, KeyError):
                os.set_blocking(self.info, False)
                self.init = int(json.loads(os.read(self.info, 4096))["child-pid"])
        try:
            return int(Path(f"/proc/{self.init}/task/{self.init}/children").read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def wait(self) -> int:
        """Answer DNS and look after the proxy until the command has ended; its exit status."""
        ending = os.pidfd_open(self.bwrap)
        with selectors.DefaultSelector() as selector:
            selector.register(ending, selectors.EVENT_READ)
            selector.register(self.dns, selectors.EVENT_READ)
            looked = time.monotonic()
            while ending not in (ready := {key.fd for key, _ in selector.select(LOOK)}):
                if self.dns.fileno() in ready:
                    self._answer()
                if time.monotonic() - looked > LOOK:
                    self.proxies.look()
                    looked = time.monotonic()
        self.proxies.leave()
        status = os.waitstatus_to_exitcode(os.waitpid(self.bwrap, 0)[1])
        return status if status >= 0 else 128 - status

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            query, source = self.dns.recvfrom(512, socket.MSG_DONTWAIT)
            if response := jaildns.answer(query):
                self.dns.sendto(response, source)


def _become(parent: socket.socket, words: Sequence[str], environment: Mapping[str, str], inherited: int) -> NoReturn:
    """The process that turns into the jail: in its namespaces from here on, and in no process group of ours, so that
    a terminal's signals reach the command once, by `forward`."""
    try:
        os.setpgid(0, 0)
        jailnet.enter_namespace()
        made = jailnet.listeners()
        handover.send(parent, {}, [sock.fileno() for sock in made])
        if handover.receive(parent) is None:  # our parent is gone
            os._exit(1)
        os.set_inheritable(inherited, True)
        os.execve(words[0], list(words), environment)  # noqa: S606  # which is the point
    except UserError as error:
        handover.send(parent, {"error": str(error)})
    except OSError as error:
        handover.send(parent, {"error": f"the jail could not be made: {error.strerror}"})
    os._exit(1)
