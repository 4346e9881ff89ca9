"""Several workers as one proxy: keeps as many as the settings say, and owns what there is one of: the listening
sockets, the claim on the state directory, the embedded store, the CA, the audit file and the admin endpoint.

Decides nothing and sees no request. Whatever can be forgotten with a worker is in the worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxy import __version__
from proxy.admin import Admin, Status
from proxy.audit import AuditFile
from proxy.auditlink import AuditDesk
from proxy.embedded import Embedded
from proxy.killswitch import KillSwitch
from proxy.listening import addresses, bind, close
from proxy.metrics import Metrics
from proxy.problem import Problems, UserError
from proxy.rotation import load_authority
from proxy.running import Running, claimed
from proxy.settings import Settings
from proxy.workerprocess import WorkerProcess, ended

STARTING = 60.0  # seconds until a worker must be ready; a loaded machine takes several
DRAIN = 10.0  # seconds streams may take to finish after SIGTERM
ENDING = 5.0  # seconds a worker may take to end beyond that
RETRY, RETRY_MOST = 0.2, 5.0  # seconds before a dead worker is replaced, doubled while its successors die too
STEADY = 30.0  # seconds a worker must have lived for the first of these waits to be enough again
FIXED = ("listen", "admin", "certs", "state", "store", "workers", "audit")  # settings a reload cannot change

_log = logging.getLogger("sallyport")


class Supervisor:
    """Made for settings of more than one worker; `load` reads them again for a reload, and raises Problems."""

    def __init__(self, settings: Settings, load: Callable[[], Settings]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.own: list[tuple[str, int]] = []  # addresses beside the listeners that must never be an upstream
        self._stopping = False
        self._load = load
        self._switch = KillSwitch(settings.state, lambda _: None)
        self._started = time.monotonic()
        self._listening = [bind(listener) for listener in settings.listen]
        file = settings.audit.file or Path(os.devnull)
        self._audit = AuditDesk(AuditFile(file, settings.audit.stdout))
        self._places: dict[int, WorkerProcess] = {}  # who is ready, by number
        self._all: dict[WorkerProcess, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self._changing = asyncio.Lock()  # of who has a place
        self._waits = dict.fromkeys(range(1, settings.workers + 1), RETRY)
        self._reloads, self._reload_problem, self._waiting = 0, "", list[str]()
        self.metrics.expect_workers(self._waits)
        self.metrics.watch(lambda: self.status().agents, lambda: self.status().store_up)
        self.metrics.watch_processes(self._processes)

    async def start(self) -> None:
        """Start every worker; all are ready then.

        Raises UserError.
        """
        self._places = dict(zip(self._waits, await asyncio.gather(*map(self._bring_up, self._waits)), strict=True))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the listeners are bound."""
        return addresses(self.settings.listen, self._listening)

    def problems(self) -> list[str]:
        """What the first worker found wrong with the rules when it started."""
        return self._places[1].ready.result()

    async def _bring_up(self, number: int) -> WorkerProcess:
        """A worker that is ready. Raises UserError."""
        stopped = self._switch.pulled
        worker = await WorkerProcess.start(
            number, self.settings, self._listening, self.own, self._audit.serve, stopped=stopped
        )
        self._all[worker] = asyncio.create_task(self._watch(worker))
        if self._switch.pulled and not stopped:  # meanwhile
            worker.tell("kill")
        try:
            async with asyncio.timeout(STARTING):
                await asyncio.shield(worker.ready)
        except TimeoutError:
            worker.kill()
            raise UserError(f"worker {number} was not ready within {STARTING:.0f} s") from None
        return worker

    async def _watch(self, worker: WorkerProcess) -> None:
        """Follow a worker to its end, and give its place to another unless it was to end."""
        status = await worker.follow(self._reported, self._share_connections)
        del self._all[worker]
        self._show()
        self._share_connections()
        number = worker.number
        if self._places.get(number) is not worker:
            if worker.leaving:
                _log.info("worker %d (process %d) has ended", number, worker.process.pid)
            return
        del self._places[number]
        if self._stopping:
            return
        self.metrics.worker_restarted(number)
        _log.error("worker %d (process %d) %s; starting another", number, worker.process.pid, ended(status))
        if time.monotonic() - worker.since > STEADY:
            self._waits[number] = RETRY
        self._spawn(self._fill(number))

    async def _fill(self, number: int) -> None:
        """Put a worker into an empty place, however often that fails."""
        while not self._stopping:
            await asyncio.sleep(self._waits[number])
            self._waits[number] = min(self._waits[number] * 2, RETRY_MOST)
            try:
                async with self._changing:
                    if number not in self._places:
                        self._places[number] = await self._bring_up(number)
                return
            except UserError as error:
                _log.error("worker %d does not start: %s", number, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)

    # Orders

    def tell(self, order: str) -> None:
        """Send every worker an order: `rules` to read them now, `kill` to stop every agent of this host."""
        for worker in self._all:
            worker.tell(order)

    def pull(self) -> None:
        """Stop every agent of this host, also in workers that start later."""
        self.tell("kill")
        self._switch.pull()

    def reload(self) -> None:
        """Replace the workers one by one, under the settings as they are now."""
        self._spawn(self._reload())

    async def _reload(self) -> None:
        async with self._changing:
            try:
                self.settings = self._changed_settings()
                for number in self._waits:
                    await self._replace(number)
            except (Problems, UserError) as error:
                self._reload_problem = str(error)
                _log.error("the workers could not be replaced, those that are there go on:\n%s", error)
            else:
                self._reload_problem = ""
                _log.info("all workers were replaced")
            self._reloads += 1

    def _changed_settings(self) -> Settings:
        new = self._load()
        fixed = {name: getattr(self.settings, name) for name in FIXED}
        if waiting := [name for name, value in fixed.items() if getattr(new, name) != value]:
            _log.warning("settings that wait for a restart of the proxy: %s", ", ".join(waiting))
        self._waiting = waiting
        return new.model_copy(update=fixed)

    async def _replace(self, number: int) -> None:
        """The new one accepts before the old one stops, from the same sockets: no connection meets a closed door."""
        new, old = await self._bring_up(number), self._places.get(number)
        self._places[number] = new
        if old:
            old.leave(None)

    async def stop(self, hurry: asyncio.Event) -> None:
        """Accept nothing more; let what is under way finish until `hurry`, for at most `DRAIN` seconds; cut it."""
        self._stopping = True
        self._stop_listening()
        for worker in self._all:
            worker.leave(DRAIN)
        hurrying = asyncio.create_task(self._hurry(hurry))
        if self._all:
            await asyncio.wait(self._all.values(), timeout=DRAIN + ENDING)
        hurrying.cancel()

    async def _hurry(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        for worker in self._all:
            worker.tell("hurry")

    async def close(self) -> None:
        """End what is left, and give everything back."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        for worker in self._all:
            worker.kill()
        await asyncio.gather(*self._all.values(), *self._tasks, return_exceptions=True)
        self._stop_listening()
        await asyncio.to_thread(self._audit.close)

    def _stop_listening(self) -> None:
        for listener, sockets in zip(self.settings.listen, self._listening, strict=True):
            close(listener, sockets)

    # Reports

    def _reported(self, worker: WorkerProcess) -> None:
        counted = worker.counted
        assert counted
        if worker.number != 1:
            del counted["counters"]["rules_reloads_total"]  # each loads the same rules; they count once
        self.metrics.add(counted)
        self._show()

    def _share_connections(self) -> None:
        """Tell each worker what the others have, since `limits.connections_per_agent` is for all of them together."""
        for worker in self._all:
            others = sum((Counter(other.connections) for other in self._all if other is not worker), Counter[str]())
            worker.tell("elsewhere", others)

    def _show(self) -> None:
        self.metrics.show([worker.counted for worker in self._all if worker.counted])

    def _processes(self) -> dict[str, int]:
        leaving = {f"{worker.number}-leaving": worker.process.pid for worker in self._all if worker.leaving}
        there = {str(number): worker.process.pid for number, worker in sorted(self._places.items())}
        return {**there, **leaving, "supervisor": os.getpid()}

    def status(self) -> Status:
        """What `/readyz` and `/api/status` say: as good as the worst of the workers."""
        there = [worker.status for _, worker in sorted(self._places.items())] or [Status(version=__version__)]
        return replace(
            there[0],
            uptime=time.monotonic() - self._started,
            policy=there[0].policy if all(status.policy for status in there) else "",
            store_up=all(status.store_up for status in there),
            reload_problems=next((status.reload_problems for status in there if status.reload_problems), ()),
            audit_problem=next((status.audit_problem for status in there if status.audit_problem), ""),
            workers=[worker.as_json() for worker in sorted(self._all, key=lambda worker: worker.since)],
            reloads=self._reloads,
            reload_problem=self._reload_problem,
            awaiting_restart=self._waiting,
        )


async def supervise(
    settings: Settings, load: Callable[[], Settings], ready: Callable[[Status, Sequence[str], Running], None]
) -> None:
    """Run a proxy of several workers until SIGTERM or SIGINT; `ready` is told when it takes requests, and where.

    Raises UserError.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as ending:
        ending.enter_context(claimed(settings.state))
        load_authority(settings.certs)  # made once, before the workers look for it
        if settings.store.embedded:
            embedded = Embedded(settings.state)
            await asyncio.to_thread(embedded.open)
            ending.push_async_callback(asyncio.to_thread, embedded.close)
        supervisor = Supervisor(settings, load)
        ending.push_async_callback(supervisor.close)
        host, port = settings.admin
        admin = await Admin.start(host.name, port, supervisor.metrics, supervisor.status)
        ending.push_async_callback(admin.stop)
        supervisor.own.append((host.name, admin.port))
        await supervisor.start()
        loop.add_signal_handler(signal.SIGHUP, supervisor.tell, "rules")
        loop.add_signal_handler(signal.SIGUSR1, supervisor.pull)
        loop.add_signal_handler(signal.SIGUSR2, supervisor.reload)
        running = Running(supervisor.addresses, f"{host}:{admin.port}", os.getpid())
        running.write(settings.state)
        ending.callback(Running.forget, settings.state)
        ready(supervisor.status(), supervisor.problems(), running)
        await stop.wait()
        stop.clear()
        await supervisor.stop(hurry=stop)  # a second signal does not wait
