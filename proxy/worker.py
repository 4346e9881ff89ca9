"""One worker of a supervisor: serves what all of them share the sockets of, and reports. Started by `supervisor`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import signal
import socket
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from proxy.addon import Addon
from proxy.auditlink import AuditPipe
from proxy.link import Link
from proxy.poller import run
from proxy.problem import UserError
from proxy.runtime import Runtime
from proxy.server import DRAIN, Server, harden
from proxy.workerprocess import Task

REPORT = 0.25  # seconds between two reports
GRACE = 2.0  # seconds an idle connection is kept when the worker is replaced: others go on, so there is no hurry
ORPHANED = 3.0  # seconds to end in order when the supervisor is gone


@dataclass(slots=True)
class _Orders:
    """What the supervisor wants now."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    patience: float = DRAIN
    stopped: bool = False
    elsewhere: dict[str, int] = field(default_factory=dict)  # connections by agent, of the other workers


async def work(task: Task) -> int:
    """Serve until told to stop, or until the supervisor is gone; the exit status."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    harden()
    link, orders = await Link.over(socket.socket(fileno=task.link)), _Orders()
    loop.add_signal_handler(signal.SIGTERM, orders.stop.set)
    runtimes: list[Runtime] = []
    follower = asyncio.ensure_future(_follow(link, orders, runtimes))
    try:
        await _serve(task, link, orders, runtimes)
    except UserError as error:
        link.send("failed", str(error))
        return 1
    finally:
        for runtime in runtimes:
            link.send("report", _report(runtime))
        follower.cancel()
        await link.close()
    return 0


async def _serve(task: Task, link: Link, orders: _Orders, runtimes: list[Runtime]) -> None:
    async with AsyncExitStack() as ending:
        sink = AuditPipe(socket.socket(fileno=task.audit))
        runtime = await Runtime.start(task.settings, os.environ, sink)
        runtimes.append(runtime)
        if task.stopped or orders.stopped:
            runtime.kill_switch.pull()
        ending.push_async_callback(runtime.stop)
        runtime.own.update(task.own)
        server = Server(runtime)
        server.addon.elsewhere = orders.elsewhere
        ending.callback(server.close)
        sockets = [[socket.socket(fileno=fd) for fd in fds] for fds in task.listening]
        await server.start(sockets, follow_agents=task.number == 1)
        link.send("report", _report(runtime))
        problems = [str(problem) for problem in (*runtime.rules.problems, *runtime.rules.warnings)]
        link.send("ready", problems)
        reporter = asyncio.ensure_future(_report_often(link, runtime, server.addon))
        ending.callback(reporter.cancel)
        await orders.stop.wait()
        await server.drain(orders.hurry, orders.patience, 0.0 if math.isfinite(orders.patience) else GRACE)


def _report(runtime: Runtime) -> dict[str, object]:
    return {"counted": runtime.metrics.take(), "status": runtime.status().as_json()}


async def _report_often(link: Link, runtime: Runtime, addon: Addon) -> None:
    told: dict[str, int] = {}
    while True:
        await asyncio.sleep(REPORT)
        if link.stalled:
            continue
        link.send("report", _report(runtime))
        connections = {agent: len(clients) for agent, clients in addon.by_agent.items()}
        if connections != told:
            link.send("connections", connections)
            told = connections


async def _follow(link: Link, orders: _Orders, runtimes: list[Runtime]) -> None:
    """Do as the supervisor says; without one no exchange could be put on record, so there is none any more."""
    loop = asyncio.get_running_loop()
    async for kind, data in link.messages():
        match kind:
            case "drain" if orders.stop.is_set():  # on the way out already, but now by a time
                loop.call_later(data, orders.hurry.set)
            case "drain":
                orders.patience = math.inf if data is None else data
                orders.stop.set()
            case "hurry":
                orders.stop.set()
                orders.hurry.set()
            case "elsewhere":
                orders.elsewhere.clear()
                orders.elsewhere.update(data)
            case "kill":
                orders.stopped = True
                for runtime in runtimes:
                    runtime.kill_switch.pull()
            case "rules":
                await asyncio.gather(*(runtime.rules.reload() for runtime in runtimes))
    orders.stop.set()
    orders.hurry.set()
    loop.call_later(ORPHANED, os._exit, 1)


def main() -> int:
    """Run the task on standard input, which the supervisor pickled."""
    task: Task = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our parent process, who started us
    form = f"%(asctime)s %(levelname)s worker {task.number}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    return run(work(task))


if __name__ == "__main__":
    sys.exit(main())
