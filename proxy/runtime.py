"""One proxy process put together from its settings: every room that a request passes, without a wire."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from proxy import __version__
from proxy.address import Host
from proxy.admin import Admin, Status
from proxy.agent import AgentState
from proxy.agentca import AgentAuthorities
from proxy.audit import Audit, Sink
from proxy.ca import Authority, Leaf
from proxy.canary import TABLE as CANARIES
from proxy.canary import Canaries
from proxy.exchange import Exchange
from proxy.flow import FlowState
from proxy.follow import Follower
from proxy.gateway import Gateway
from proxy.gatewaykeys import GatewayKeys
from proxy.identity import Identity, Issuer
from proxy.jwks import KeySet
from proxy.jwtidentity import JwtIssuer
from proxy.killswitch import KillSwitch
from proxy.leakguard import LeakGuard
from proxy.limiter import Limiter
from proxy.masterkey import load_master_key
from proxy.metrics import Metrics
from proxy.problem import UserError
from proxy.records import TABLE as CREDENTIALS
from proxy.registry import EVERYBODY, Registry
from proxy.registry import TABLE as AGENTS
from proxy.rotation import follow as follow_ca
from proxy.rotation import load_authority
from proxy.running import claimed
from proxy.settings import Settings
from proxy.settled import Replay
from proxy.snapshot import Rules
from proxy.store import Store, StoreUnavailable
from proxy.tls import ClientTls, UpstreamTls
from proxy.upstream import Upstream
from proxy.vault import Lease, Vault

RETRY = 1.0  # seconds between attempts to open the vault while the store is down

_log = logging.getLogger("sallyport")


class Runtime:
    """Made by `start`, ended by `stop`. `own` are the addresses of this proxy, which must never be an
    upstream; nor may those of the store."""

    def __init__(
        self, settings: Settings, store: Store, environment: Mapping[str, str], sink: Sink | None = None
    ) -> None:
        self.settings = settings
        self.clock: Callable[[], float] = time.time
        self.own: set[tuple[str, int]] = set()
        self.vault: Vault | None = None
        self.on_leases: Callable[[], None] = lambda: None  # told when other credentials are open than before
        self.started = time.monotonic()
        self._store = store
        self._environment = environment
        self._tasks: list[asyncio.Task[None]] = []
        self._held = AsyncExitStack()
        self.metrics = Metrics()
        self.authority = load_authority(settings.certs)
        self.authority.on_mint = self.metrics.certificate_minted
        self.agent_authorities = (
            AgentAuthorities(settings.certs, self.metrics.certificate_minted) if settings.ca == "per-agent" else None
        )
        self.client_tls = ClientTls()
        self.upstream_tls = UpstreamTls(settings.upstream.trust)
        self.registry = Registry(store)
        self.registry.on_kill = self._drop_leases
        self.kill_switch = KillSwitch(settings.state, self.registry.stop_here)
        self.follower = Follower(store)
        self.follower.subscribe(AGENTS, self.registry.apply_changes)
        self.leaks = LeakGuard(lambda token: self.registry.by_token(token) is not None)
        if self.agent_authorities:
            self.follower.subscribe(AGENTS, self._end_authorities)
        self.rules = Rules(settings.rules, self.metrics.reloaded)
        self.gateway = Gateway(lambda: self.rules.policy, self.clock)
        self.limiter = self.gateway.limiter = Limiter(store, lambda: self.follower.up, time.monotonic)
        self.issuers: list[Issuer] = []
        self._keys = KeySet(settings.identity.jwt) if settings.identity.jwt else None
        if settings.identity.jwt and self._keys:
            self.issuers.append(JwtIssuer(settings.identity.jwt, self._keys))
        self.identity = Identity(
            self.registry,
            token=settings.identity.token,
            networks=settings.identity.networks,
            issuers=self.issuers,
        )
        self.upstream = Upstream(
            connect_to=settings.upstream.connect_to,
            nameservers=settings.upstream.nameservers,
            allow_addresses=settings.upstream.allow_addresses,
            own=lambda: self.own | store.servers(),
            via=settings.upstream.via,
        )
        file, refuse = settings.audit.file or Path(os.devnull), settings.audit.on_full == "refuse"
        self.audit = Audit(file, settings.audit.stdout, self.metrics.audit_dropped, sink, refuse=refuse)
        self.gateway.audit = self.audit
        self.metrics.watch(self.registry.counts, lambda: self.follower.up)

    @classmethod
    async def start(cls, settings: Settings, environment: Mapping[str, str], sink: Sink | None = None) -> Runtime:
        """A runtime with its rules, agents and vault loaded, as far as store and rules allow. A worker's audit lines go
        to `sink`, and its supervisor has claimed the state directory.

        Raises UserError.
        """
        async with AsyncExitStack() as held:
            if sink is None:
                held.enter_context(claimed(settings.state))
            store = await Store.open(settings.store.reveal(), settings.state, wait=False)
            held.push_async_callback(store.close)
            runtime = cls(settings, store, environment, sink)
            await runtime._load()
            runtime._held = held.pop_all()
        return runtime

    async def _load(self) -> None:
        self.kill_switch.look()
        self._spawn(self.kill_switch.run())
        self._spawn(self.limiter.run())
        try:
            await self._open_vault()
        except StoreUnavailable as error:
            _log.error("%s; requests are refused until it answers", error)
            self._spawn(self._retry_vault())
        if self._keys:
            await self._keys.load()
            self._spawn(self._keys.run())
        await self.follower.poll()
        await self.rules.load()
        self._spawn(self.follower.run())
        self._spawn(self.rules.follow())
        self._spawn(follow_ca(self.authority, self.settings.certs))

    async def _open_vault(self) -> None:
        settings = self.settings
        master = await load_master_key(settings.state, self._environment, self._store)
        self.vault = Vault(
            self._store,
            master,
            settings.state,
            settings.vault.lease,
            on_operation=self.metrics.vault_operation,
        )
        self.vault.on_change = self.leaks.credentials
        self.vault.on_leases = lambda: self.on_leases()
        self.gateway.vault = self.vault
        self.follower.subscribe(CREDENTIALS, self.vault.apply_changes)
        canaries = Canaries(self._store, master)

        async def follow_canaries(names: set[str] | None) -> None:
            await self.leaks.canaries(names, await canaries.tokens(names))

        self.follower.subscribe(CANARIES, follow_canaries)
        if settings.identity.gateways:
            gateways = GatewayKeys(self._store, master, settings.state, clock=self.clock)
            self.issuers.append(gateways)
            self.follower.subscribe(CREDENTIALS, gateways.apply_changes)

    async def _retry_vault(self) -> None:
        while self.vault is None:
            await asyncio.sleep(RETRY)
            try:
                await self._open_vault()
            except StoreUnavailable:
                continue
            except UserError as error:
                _log.error("the vault stays closed: %s", error)
                return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def record(self, exchange: Exchange) -> None:
        """Put one ended exchange on record."""
        exchange.ended = True
        if exchange.held:
            self.limiter.release(exchange)
        self.metrics.record(exchange)
        self.audit.record(exchange)

    def repeat(self, replay: Replay) -> None:
        """Put on record one that was decided before, when it has ended."""
        duration = max(0.0, self.clock() - replay.time)
        self.metrics.repeat(
            replay.settled.decision.tally,
            replay.request_bytes,
            replay.response_bytes,
            duration,
            replay.decision_duration,
            replay.upstream_duration,
        )
        self.audit.record(replay.line(duration))

    def finish(self, state: FlowState) -> None:
        """Put an exchange on record that has ended, unless it is there."""
        exchange = state.exchange
        if exchange is None or state.recorded:
            return
        state.recorded = True
        duration = self.clock() - exchange.time
        exchange.duration = duration if duration > 0 else 0.0
        if state.response_body:
            exchange.count_redacted(state.response_body.found, "body")
        self.record(exchange)

    def _drop_leases(self) -> None:
        if self.vault:
            self.vault.keep_for(self.registry.living())

    def leaf(self, agent_id: str, host: Host) -> Leaf:
        """The certificate for `host` that the sandbox of an agent trusts."""
        return self._authority_of(agent_id).leaf(host)

    def has_leaf(self, agent_id: str, host: Host) -> bool:
        """Whether that certificate is there already."""
        return self._authority_of(agent_id).has(host)

    def _authority_of(self, agent_id: str) -> Authority:
        if not self.agent_authorities or not agent_id:  # none: a client that will only be refused
            return self.authority
        agent = self.registry.by_id(agent_id)
        if agent is None:
            raise LookupError("the agent is gone, and its CA with it")
        return self.agent_authorities.of(agent)

    async def _end_authorities(self, names: set[str] | None) -> None:
        assert self.agent_authorities
        now = self.clock()

        def lives(agent_id: str) -> bool:
            agent = self.registry.by_id(agent_id)
            return agent is not None and agent.state is AgentState.ACTIVE and not agent.expired(now)

        some = None if names is None or EVERYBODY in names else names
        await asyncio.to_thread(self.agent_authorities.end, some, lives)

    def leased(self) -> Mapping[str, Lease]:
        """The credentials that are open, or were until lately: another object after each change."""
        return self.vault.leased() if self.vault else {}

    def status(self) -> Status:
        """What `/readyz` and `/api/status` say."""
        policy = self.rules.policy
        return Status(
            version=__version__,
            uptime=time.monotonic() - self.started,
            policy=policy.digest if policy else "",
            rules=len(policy.rules) if policy else 0,
            agents=self.registry.counts(),
            store_up=self.follower.up,
            reload_problems=[str(problem) for problem in self.rules.problems],
            audit_problem=self.audit.problem,
        )

    async def admin(self) -> Admin:
        """Serve `/metrics` and its companions.

        Raises UserError.
        """
        host, port = self.settings.admin
        admin = await Admin.start(host.name, port, self.metrics, self.status)
        self.own.add((host.name, admin.port))
        return admin

    async def stop(self) -> None:
        """Write what is still to be written, and give everything back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.upstream.close()
        await asyncio.to_thread(self.audit.close)
        await self._held.aclose()
