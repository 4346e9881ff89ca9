"""A CA for each agent (`ca: per-agent`), limited to the hosts that its rules name, and deleted when the agent is killed
or removed. One file each, `certs/agents/ID.pem`, with key and certificate."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from proxy.address import HostPattern, ip_literal
from proxy.agent import NEVER, Agent, parse_agent_id
from proxy.ca import Authority
from proxy.certificate import CA_LIFETIME, Clock, PrivateKey, key_pem, make_ca, new_key, pem, utc_now
from proxy.files import own_dir, read_private, write_private
from proxy.policy import Policy
from proxy.problem import UserError

FOLDER = "agents"
MAX_AUTHORITIES = 256  # kept in memory; others are read again
NEW = 60.0  # seconds in which a file may be of an agent that was added while the list of agents was read

type _Network = IPv4Network | IPv6Network

_EVERY_ADDRESS = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


def hosts_of(policy: Policy, agent: Agent) -> tuple[HostPattern, ...] | None:
    """The hosts that the rules allow an agent; None where one of them is for every host."""
    found: list[HostPattern] = []
    for rule in policy.rules:
        if rule.may_allow(agent) and not rule.passthrough:
            if not rule.match.hosts or any(not pattern.name for pattern in rule.match.hosts):
                return None
            found += rule.match.hosts
    return tuple(dict.fromkeys(found))


def constraints_for(hosts: Iterable[HostPattern]) -> x509.NameConstraints:
    """What a CA for these hosts may vouch for (RFC 5280 section 4.2.1.10): a name covers what is below it."""
    hosts = tuple(hosts)
    names = sorted({pattern.name for pattern in hosts if not ip_literal(pattern.name)})
    addresses: list[_Network] = [ip_network(pattern.name) for pattern in hosts if ip_literal(pattern.name)]
    permitted: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    permitted += [x509.IPAddress(network) for network in addresses]
    # A kind of name that is not mentioned is not limited.
    excluded: list[x509.GeneralName] = [] if addresses else [x509.IPAddress(network) for network in _EVERY_ADDRESS]
    excluded += [] if names else [x509.DNSName("")]
    return x509.NameConstraints(permitted or None, excluded or None)


def issue(
    folder: Path, agent: Agent, constraints: x509.NameConstraints | None = None, clock: Clock = utc_now
) -> Authority:
    """The CA of an agent, made if there is none. Its key stays; its certificate is made anew where the hosts or the
    agent's expiry are others than it says.

    Raises UserError.
    """
    path = _path(folder, agent.id)
    found = _read(path)
    key = found[1] if found else new_key()
    until = _until(agent, clock())
    if found and _constraints(found[0]) == constraints and _ends(found[0], until, agent):
        return Authority(*found, clock)
    certificate = make_ca(_name(agent.id, key), key, clock(), until=until, constraints=constraints)
    try:
        _store(path, certificate, key, replace=found is not None)
    except FileExistsError:  # another process was faster
        return issue(folder, agent, constraints, clock)
    return Authority(certificate, key, clock)


def forget(folder: Path, agent_id: str | None) -> None:
    """Delete the CA of an agent, or of all (None). Raises UserError."""
    paths = [_path(folder, agent_id)] if agent_id else list((folder / FOLDER).glob("*.pem"))
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; delete it, or the agent's CA lives on") from None


class AgentAuthorities:
    """The CAs of agents in a running proxy."""

    def __init__(self, folder: Path, on_mint: Callable[[], None], clock: Clock = utc_now) -> None:
        self._folder = folder
        self._on_mint = on_mint
        self._clock = clock
        self._kept: OrderedDict[str, tuple[tuple[int, int], Authority]] = OrderedDict()

    def of(self, agent: Agent) -> Authority:
        """The CA of an agent as its file says now. Raises UserError."""
        path = _path(self._folder, agent.id)
        kept = self._kept.get(agent.id)
        if kept is None or kept[0] != _look(path):
            found = _read(path)
            authority = Authority(*found, self._clock) if found else issue(self._folder, agent, clock=self._clock)
            authority.on_mint = self._on_mint
            kept = self._kept[agent.id] = (_look(path), authority)
            if len(self._kept) > MAX_AUTHORITIES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(agent.id)
        return kept[1]

    def end(self, names: set[str] | None, lives: Callable[[str], bool]) -> None:
        """Delete the CAs of those in `names` (None: of all there are) who are no more. Raises UserError."""
        for path in (self._folder / FOLDER).glob("*.pem"):
            concerned = path.stem in names if names is not None else not self._is_new(path)
            if concerned and not lives(path.stem):
                self._kept.pop(path.stem, None)
                forget(self._folder, path.stem)

    def _is_new(self, path: Path) -> bool:
        """A file made just now may be of an agent that was added while the list of agents was read."""
        try:
            return self._clock().timestamp() - path.stat().st_mtime < NEW
        except OSError:
            return True


def _path(folder: Path, agent_id: str) -> Path:
    try:
        return folder / FOLDER / f"{parse_agent_id(agent_id)}.pem"
    except ValueError as error:
        raise UserError(str(error)) from None


def _read(path: Path) -> tuple[x509.Certificate, PrivateKey] | None:
    try:
        data = read_private(path)
        key = serialization.load_pem_private_key(data, None)
        certificate = x509.load_pem_x509_certificate(data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; delete it, and the agent gets a new CA") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise UserError(f"{path} holds another key than its certificate's; delete it, and the agent gets a new CA")
    return certificate, key


def _store(path: Path, certificate: x509.Certificate, key: PrivateKey, *, replace: bool) -> None:
    own_dir(path.parent)
    try:
        write_private(path, key_pem(key) + pem(certificate), replace=replace)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make the certs folder writable") from None


def _look(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_ino)


def _name(agent_id: str, key: PrivateKey) -> str:
    """The key is in the name: a client that trusts two CAs of one name may take the wrong one."""
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    return f"Sallyport {digest[:3].hex()} {agent_id}"


def _until(agent: Agent, now: datetime.datetime) -> datetime.datetime:
    latest = now + CA_LIFETIME
    if agent.expires >= latest.timestamp():
        return latest
    return max(datetime.datetime.fromtimestamp(agent.expires, datetime.UTC), now)


def _ends(certificate: x509.Certificate, until: datetime.datetime, agent: Agent) -> bool:
    """Whether a certificate ends when its agent does; without an end, it has to be renewed only once it is old."""
    left = until - certificate.not_valid_after_utc
    return abs(left) < datetime.timedelta(seconds=2) or (agent.expires == NEVER and left < CA_LIFETIME / 2)


def _constraints(certificate: x509.Certificate) -> x509.NameConstraints | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None
