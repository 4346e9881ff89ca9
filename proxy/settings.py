"""The operator's settings: flags over SALLYPORT_* variables over sallyport.yaml over defaults, parsed once.

Nothing here opens a socket, a store or a key; whoever takes a Settings never checks it again.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from proxy.address import Host
from proxy.agent import parse_agent_id
from proxy.problem import Problem, Problems
from proxy.validation import did_you_mean, validate
from proxy.yamltree import Step, Tree, kind_of, load

DEFAULT_FILE = "sallyport.yaml"
PREFIX = "SALLYPORT_"
_NOT_SETTINGS = {"SALLYPORT_CONFIG", "SALLYPORT_MASTER_KEY", "SALLYPORT_MASTER_KEY_FILE"}
# What Kubernetes adds to every container beside a service called sallyport, or sallyport-admin.
_SERVICE_LINK = re.compile(
    r"SALLYPORT_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\w+)?)=.*"
    r"|SALLYPORT_\w+_(?:SERVICE_HOST=.*|SERVICE_PORT(?:_\w+)?=\d+|PORT(?:_\w+)?=(?:tcp|udp|sctp)://.*|PORT_\d+_\w+=.*)",
    re.DOTALL,
)
_STORES = ("redis", "rediss", "redis+sentinel", "redis+cluster")
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)}
_BYTES: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_LATER = "not available in this version"


def parse_duration(text: object) -> float:
    """Seconds from `500ms`, `60s`, `5m`, `8h` or `2d`.

    Raises ValueError(message, hint).
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|s|m|h|d)", text) if isinstance(text, str) else None
    if not match:
        shown = f'"{text}"' if isinstance(text, str) else kind_of(text)
        raise ValueError(f"expected a duration, got {shown}", 'write a number and a unit: "500ms", "60s", "5m", "8h"')
    return float(Fraction(match[1]) * _SECONDS[match[2]])


def parse_size(text: object) -> int:
    """Bytes from `64KiB`, `10MB` or a whole number of bytes.

    Raises ValueError(message, hint).
    """
    spelled = str(text) if isinstance(text, str | int) and not isinstance(text, bool) else ""
    match = re.fullmatch(r"([0-9]{1,15}) ?([A-Za-z]*)", spelled)
    if not match or match[2] not in _BYTES:
        shown = f'"{spelled}"' if spelled else kind_of(text)
        raise ValueError(f"expected a size, got {shown}", 'write "64KiB", "1MiB", "10MB" or a number of bytes')
    return int(match[1]) * _BYTES[match[2]]


class Endpoint(NamedTuple):
    """A host and a port, 0 only where the kernel shall choose one; equal to the plain pair."""

    host: Host
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class StoreUrl:
    """Where the store is; its text hides the password, only `reveal()` tells it."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def embedded(self) -> bool:
        """Whether the proxy starts a store of its own."""
        return self._url == "embedded"

    def reveal(self) -> str:
        """The URL with its password, for the store's client only."""
        return self._url

    def __str__(self) -> str:
        if self.embedded:
            return self._url
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def __repr__(self) -> str:
        return f"StoreUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreUrl) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)


@dataclass(frozen=True, slots=True)
class Listener:
    """One way in; `address` is as the operator wrote it, `agent` the one agent it belongs to, or None for any."""

    address: str
    host: str
    port: int
    agent: str | None = None
    scheme: Literal["regular", "transparent", "unix", "tls"] = "regular"


def _text(value: object, what: str = "text") -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what}, got {kind_of(value)}")
    return value


def _split(value: object, least_port: int = 1) -> Endpoint:
    text = _text(value, "host:port")
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or not least_port <= int(port) < 65536:
        raise ValueError(f'"{text}" is not host:port', f"the port is a number from {least_port} to 65535")
    if not host:
        raise ValueError(f'"{text}" has no host', f'write "127.0.0.1:{port}", or "0.0.0.0:{port}" for every interface')
    if ":" in host and not host.startswith("["):
        raise ValueError(f'"{text}": an IPv6 address needs brackets', 'write "[::1]:8080"')
    try:
        return Endpoint(Host.parse(host), int(port))
    except ValueError:
        raise ValueError(f'"{host}" is not a host', "write a host name or an IP address") from None


def _bind(value: object) -> Endpoint:
    return _split(value, least_port=0)


def _nameserver(value: object) -> Endpoint:
    endpoint = _split(value)
    if endpoint.host.ip is None:
        raise ValueError(f'"{value}" is not ip:port', "a nameserver is given by its IP address")
    return endpoint


def _listener(value: object) -> Listener:
    agent: str | None = None
    address = value
    if isinstance(value, dict):
        unknown = sorted(value.keys() - {"address", "agent"})
        if unknown or "address" not in value:
            message = f'unknown field "{unknown[0]}"' if unknown else 'missing field "address"'
            raise ValueError(message, 'write {address: "127.0.0.1:8081", agent: coder-1}')
        address = value["address"]
        agent = parse_agent_id(_text(value["agent"], "an agent id")) if value.get("agent") is not None else None
    text = _text(address, "an address such as 127.0.0.1:8080")
    for mark, scheme in (("transparent@", "transparent"), ("unix:", "unix"), ("tls://", "tls")):
        if text.startswith(mark):
            if scheme != "unix":
                _bind(text.removeprefix(mark))
            raise ValueError(f'"{text}": {scheme} listeners are {_LATER}', 'write "127.0.0.1:8080"')
    host, port = _bind(text)
    return Listener(text, host.name, port, agent)


def _path(value: object) -> Path:
    text = _text(value, "a path")
    if not text or "\0" in text:
        raise ValueError("expected a path, got empty text")
    return Path(text)


def _readable_file(value: object) -> Path:
    path = _path(value)
    if not path.is_file():
        raise ValueError(f"no such file: {path}", "give the path of a PEM file")
    return path


def _store(value: object) -> StoreUrl:
    text = _text(value)
    hint = "write embedded, or redis://:password@host:6379/0"
    if text == "embedded":
        return StoreUrl(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _STORES:
        raise ValueError(f"the store is embedded or a URL beginning with {', '.join(f'{s}://' for s in _STORES)}", hint)
    try:
        netloc = urlsplit(text).netloc if text.isprintable() and " " not in text else ""
        servers = [_split(server if _has_port(server) else f"{server}:6379") for server in _servers(netloc)]
    except ValueError:
        servers = []
    # A raw "/", "?" or "#" in a password ends the host part early, and the rest would be shown as path.
    if not servers or "@" in rest.removeprefix(netloc):
        raise ValueError("the store's URL is not well-formed", f'{hint}; percent-encode "/?#@" in the password')
    return StoreUrl(text)


def _servers(netloc: str) -> list[str]:
    return netloc.rpartition("@")[2].split(",")


def _has_port(server: str) -> bool:
    return ":" in server.rpartition("]")[2]


def _network(value: object) -> IPv4Network | IPv6Network:
    text = _text(value, "a network")
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        right = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'"{text}" is not a network', 'write it as "10.1.2.0/24"') from None
    raise ValueError(f'"{text}" has bits set outside its mask', f'write "{right}"')


def _agent(value: object) -> str:
    return parse_agent_id(_text(value, "an agent id"))


def _distinct(parse: typing.Callable[[object], object]) -> typing.Callable[[object], object]:
    """A validator that refuses two spellings of one key: the later would silently win."""

    def check(value: object) -> object:
        seen: dict[object, str] = {}
        for key in value if isinstance(value, dict) else ():
            try:
                first = seen.setdefault(parse(key), key)
            except ValueError:
                continue  # told at the key itself
            if first != key:
                raise ValueError(f'"{key}" is the same as "{first}"', "remove one of them")
        return value

    return check


def _not_yet(value: object) -> None:
    if value is not None:
        raise ValueError(_LATER, "remove it, or write null")


def _workers(value: object) -> int:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 1):
        raise ValueError(f"more than one worker is {_LATER}", "write 1")
    if value is True or value != 1 or isinstance(value, float):
        got = str(value) if isinstance(value, int) else kind_of(value)
        raise ValueError(f"expected a number of workers, or auto, got {got}", "write 1")
    return 1


def _positive[N: (int, float)](value: N) -> N:
    if value <= 0:
        raise ValueError("must be more than 0")
    return value


def _spelt(default: Any) -> Any:
    """A default as the file would spell it, so that the schema shows that."""
    return Field(default=default)


def _from(parse: typing.Callable[[object], object], written: Any = str) -> Any:
    return PlainValidator(parse, json_schema_input_type=written)


_Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=str)]
_Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=str | int)]
_Path = Annotated[Path, _from(_path)]
_Network = Annotated[IPv4Network | IPv6Network, _from(_network)]
_Endpoint = Annotated[Endpoint, _from(_split)]
_NotYet = Annotated[None, _from(_not_yet, None)]


class BoundListener(BaseModel):
    """How a listener with an agent is written, for the schema only."""

    model_config = ConfigDict(extra="forbid", title="Listener")
    address: str
    agent: str | None = None


_Listener = Annotated[Listener, BeforeValidator(_listener, json_schema_input_type=str | BoundListener)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Identity(_Section):
    """Which proofs of identity are accepted. In `networks` the most specific one wins."""

    token: bool = True
    networks: Annotated[
        dict[_Network, Annotated[str, _from(_agent)]],
        BeforeValidator(_distinct(_network), json_schema_input_type=dict[str, str]),
    ] = _spelt({})
    jwt: _NotYet = None
    mtls: _NotYet = None


class Upstream(_Section):
    """How upstreams are found and trusted. An address in `connect_to` is the operator's word and need not be public."""

    trust: tuple[Annotated[Path, _from(_readable_file)], ...] = ()
    connect_to: Annotated[
        dict[_Endpoint, _Endpoint],
        BeforeValidator(_distinct(_split), json_schema_input_type=dict[str, str]),
    ] = _spelt({})
    nameservers: tuple[Annotated[Endpoint, _from(_nameserver)], ...] = ()
    allow_addresses: tuple[_Network, ...] = ()
    via: _NotYet = None


class Vault(_Section):
    """`lease`: seconds an opened credential may be used without asking the store again."""

    lease: _Duration = _spelt("60s")


class Audit(_Section):
    """Where the audit log goes; `file` null for none."""

    file: _Path | None = _spelt("{state}/audit.jsonl")
    stdout: bool = False


class Limits(_Section):
    """Bytes and seconds. `buffer`: most of a body held for a rule that must see it; `headers`: of a message's head."""

    buffer: Annotated[_Size, AfterValidator(_positive)] = _spelt("1MiB")
    headers: Annotated[_Size, AfterValidator(_positive)] = _spelt("64KiB")
    connections_per_agent: int = Field(default=256, ge=1)
    idle: Annotated[_Duration, AfterValidator(_positive)] = _spelt("300s")


class Settings(_Section):
    """All settings, every path absolute."""

    model_config = ConfigDict(title="Sallyport settings")

    listen: Annotated[tuple[_Listener, ...], Field(min_length=1)] = _spelt(("127.0.0.1:8080",))
    admin: Annotated[Endpoint, _from(_bind)] = _spelt("127.0.0.1:9090")
    rules: _Path = _spelt("rules/")
    certs: _Path = _spelt("certs/")
    state: _Path = _spelt(".sallyport/")
    store: Annotated[StoreUrl, _from(_store)] = _spelt("embedded")
    workers: Annotated[int, _from(_workers, int | Literal["auto"])] = 1
    identity: Identity = Field(default_factory=Identity)
    upstream: Upstream = Field(default_factory=Upstream)
    lane: Literal["mitmproxy", "fast"] = "fast"
    vault: Vault = Field(default_factory=Vault)
    audit: Audit = Field(default_factory=Audit)
    limits: Limits = Field(default_factory=Limits)


# A setting's default shows how a variable or flag spells it: text as it is, a list by commas, the rest as YAML.
_PATHS = {("rules",), ("certs",), ("state",), ("upstream", "trust"), ("audit", "file")}


def _leaves() -> dict[tuple[str, ...], Any]:
    leaves: dict[tuple[str, ...], Any] = {}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            leaves |= {(name, leaf): inner.default for leaf, inner in section.model_fields.items()}
        else:
            leaves[(name,)] = field.default
    return leaves


_DEFAULTS = _leaves()
_VARIABLES = {PREFIX + "__".join(path).upper(): path for path in _DEFAULTS}
_FLAGS = {".".join(path): path for path in _DEFAULTS}


class _Layers(Tree):
    """The file's tree with variables and flags laid over it; a problem is placed where the value came from."""

    __slots__ = ("_file", "_origins")

    def __init__(self, file: Tree) -> None:
        data = {} if file.data is None else file.data
        if isinstance(data, dict):
            data = {key: self._section(key, value) for key, value in data.items()}
        super().__init__(file.file, data, {}, 0)
        self._file = file
        self._origins: dict[tuple[Step, ...], str] = {}

    @staticmethod
    def _section(key: str, value: Any) -> Any:
        if value is None and any(path[0] == key for path in _DEFAULTS if len(path) > 1):
            return {}  # `vault:` with every line below it commented out
        return dict(value) if isinstance(value, dict) else value

    def put(self, path: tuple[str, ...], value: Any, base: Path, origin: str = "") -> None:
        """Set the value at `path`, paths made absolute by `base`; what is wrong around it is left to be told."""
        node = self.data
        for step in path[:-1]:
            node = node.setdefault(step, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            node[path[-1]] = _absolute(value, base) if path in _PATHS else value
            self._origins[path] = origin

    def settle(self, base: Path) -> None:
        """Make the file's own paths and the defaults absolute."""
        for path in _PATHS:
            value = self.get(path)
            self.put(path, _DEFAULTS[path] if value is _ABSENT else value, base)

    def expand_state(self) -> None:
        """Fill in `{state}` in the audit file's path."""
        file, state = self.get(("audit", "file")), self.get(("state",))
        if isinstance(file, str) and isinstance(state, str):
            self.data["audit"]["file"] = file.replace("{state}", state)

    def get(self, path: tuple[str, ...]) -> Any:
        """The value at `path`, or _ABSENT."""
        node = self.data
        for step in path:
            node = node.get(step, _ABSENT) if isinstance(node, dict) else _ABSENT
        return node

    def problem(self, path: Sequence[Step], message: str, hint: str = "", *, key: bool = False) -> Problem:
        for length in range(len(path), 0, -1):
            if origin := self._origins.get(tuple(path[:length])):
                return Problem(origin, 0, 0, message, hint)
        return self._file.problem(path, message, hint, key=key)


_ABSENT = object()


def _absolute(value: Any, base: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_absolute(item, base) for item in value]
    if not isinstance(value, str) or not value or value.startswith("{state}"):
        return value
    return str(base / value)


def _file(config: Path | None, env: Mapping[str, str], cwd: Path) -> tuple[Tree, Path]:
    """The settings file's tree, and the folder its paths are relative to."""
    named = config or env.get("SALLYPORT_CONFIG")
    shown = str(named or DEFAULT_FILE)
    path = cwd / shown
    try:
        return load(path.read_bytes(), shown), path.parent
    except FileNotFoundError:
        if not named and not path.is_symlink():
            return load("", shown), cwd
        hint = "check --config" if config else "check SALLYPORT_CONFIG"
        raise Problems([Problem(shown, 0, 0, "no such settings file", hint if named else "")]) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise Problems([Problem(shown, 0, 0, f"cannot be read: {why or 'not a path'}")]) from None


type _Layer = tuple[tuple[str, ...], Any, str]


def _variables(env: Mapping[str, str], problems: list[Problem]) -> Iterator[_Layer]:
    for name, text in sorted(env.items()):
        if not name.startswith(PREFIX) or name in _NOT_SETTINGS or _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        origin = f"environment {name}"
        if name not in _VARIABLES:
            hint = did_you_mean(name, (*_VARIABLES, *_NOT_SETTINGS))
            problems.append(Problem(origin, 0, 0, "unknown setting", hint))
        elif text.strip():
            yield from _spelled(_VARIABLES[name], text.strip(), origin, problems)


def _flags(flags: Mapping[str, object], problems: list[Problem]) -> Iterator[_Layer]:
    for name, value in flags.items():
        origin = "--" + name.replace(".", "-").replace("_", "-")
        if isinstance(value, str):
            yield from _spelled(_FLAGS[name], value, origin, problems)
        elif isinstance(value, list | tuple):
            yield _FLAGS[name], [str(item) if isinstance(item, Path) else item for item in value], origin
        elif value is not None:
            yield _FLAGS[name], str(value) if isinstance(value, Path) else value, origin


def _spelled(path: tuple[str, ...], text: str, origin: str, problems: list[Problem]) -> Iterator[_Layer]:
    try:
        yield path, _read(_DEFAULTS[path], text, origin), origin
    except Problems as error:
        problems += [Problem(origin, 0, 0, problem.message, problem.hint) for problem in error.problems]


def _read(default: object, text: str, origin: str) -> Any:
    if isinstance(default, str):
        return None if text == "null" else text
    if isinstance(default, tuple):
        if text.startswith("{"):
            text = f"[{text}]"
        elif not (text.startswith("[") and text.endswith("]")):  # "[::1]:8080" is no YAML list
            return [item.strip() for item in text.split(",") if item.strip()]
    return load(text, origin).data


def settings_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of sallyport.yaml, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema(mode="validation")}


def load_settings(config: Path | None, env: Mapping[str, str], flags: Mapping[str, object], cwd: Path) -> Settings:
    """The settings in force. `flags` are by setting, dotted (`vault.lease`), None meaning not given; an empty variable
    counts as not set. Paths in the file are relative to its folder, as the defaults are; others to `cwd`.

    Raises Problems.
    """
    tree, base = _file(config, env, cwd)
    layers = _Layers(tree)
    problems: list[Problem] = []
    layers.settle(base)
    for path, value, origin in (*_variables(env, problems), *_flags(flags, problems)):
        layers.put(path, value, cwd, origin)
    layers.expand_state()
    settings, wrong = validate(Settings, layers)
    if settings is None or problems:
        raise Problems(problems + wrong)
    return settings
