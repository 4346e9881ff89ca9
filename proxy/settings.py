"""The operator's settings: flags over SALLYPORT_* variables over sallyport.yaml over defaults, parsed once.

Nothing here opens a socket, a store or a key; whoever takes a Settings never checks it again.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from proxy.parent import Parent, parse_parent
from proxy.problem import Problem, Problems
from proxy.proof import AgentPattern
from proxy.quantity import parse_duration, parse_rate, parse_size
from proxy.settingvalue import (
    Endpoint,
    Listener,
    StoreUrl,
    distinct,
    parse_agent,
    parse_bind,
    parse_endpoint,
    parse_file,
    parse_jwks,
    parse_listener,
    parse_nameserver,
    parse_network,
    parse_path,
    parse_pattern,
    parse_store,
    parse_uid,
    parse_workers,
)
from proxy.validation import did_you_mean, validate
from proxy.yamltree import Step, Tree, load

DEFAULT_FILE = "sallyport.yaml"
PREFIX = "SALLYPORT_"
_NOT_SETTINGS = {"SALLYPORT_CONFIG", "SALLYPORT_MASTER_KEY", "SALLYPORT_MASTER_KEY_FILE"}
# What Kubernetes adds to every container beside a service called sallyport, or sallyport-admin.
_SERVICE_LINK = re.compile(
    r"SALLYPORT_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\w+)?)=.*"
    r"|SALLYPORT_\w+_(?:SERVICE_HOST=.*|SERVICE_PORT(?:_\w+)?=\d+|PORT(?:_\w+)?=(?:tcp|udp|sctp)://.*|PORT_\d+_\w+=.*)",
    re.DOTALL,
)


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
# Only algorithms whose key is public: with a shared one, whoever can verify could sign (RFC 8725 section 3.1).
_Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=str | int)]
_Path = Annotated[Path, _from(parse_path)]
_Network = Annotated[IPv4Network | IPv6Network, _from(parse_network)]
_Endpoint = Annotated[Endpoint, _from(parse_endpoint)]


class BoundListener(BaseModel):
    """How a listener with an agent is written, for the schema only."""

    model_config = ConfigDict(extra="forbid", title="Listener")
    address: str
    agent: str | None = None
    mode: Literal["0600", "0660", "0666"] = "0600"
    group: str = ""
    client_certificate: Literal["optional", "required"] = "optional"


_Listener = Annotated[Listener, BeforeValidator(parse_listener, json_schema_input_type=str | BoundListener)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Jwt(_Section):
    """Tokens of an identity provider. `agent` is the form of the claim that names the agent; `labels` are label: claim;
    claims are names, or JSON pointers into the token. `ca` and `token_file` are for fetching the keys."""

    jwks: Annotated[Path | str, _from(parse_jwks)]
    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    agent_claim: Annotated[str, Field(min_length=1)] = "sub"
    agent: Annotated[AgentPattern | None, _from(parse_pattern, str | None)] = None
    labels: dict[str, str] = Field(default_factory=dict)
    on_behalf_of: str | None = None
    algorithms: Annotated[tuple[_Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256", "EdDSA")
    skew: _Duration = _spelt("30s")
    refresh: Annotated[_Duration, AfterValidator(_positive)] = _spelt("5m")
    ca: Annotated[Path, _from(parse_file)] | None = None
    token_file: Annotated[Path, _from(parse_file)] | None = None


class Mtls(_Section):
    """Client certificates on `tls://` listeners: chains end in a CA of `ca`; `uri` is the form of a SPIFFE ID."""

    ca: Annotated[Path, _from(parse_file)]
    agent: Literal["san-uri", "cn"] = "san-uri"
    uri: Annotated[AgentPattern | None, _from(parse_pattern, str | None)] = None


class Identity(_Section):
    """Which proofs of identity are accepted. In `networks` the most specific one wins."""

    token: bool = True
    gateways: bool = True
    networks: Annotated[
        dict[_Network, Annotated[str, _from(parse_agent)]],
        BeforeValidator(distinct(parse_network), json_schema_input_type=dict[str, str]),
    ] = _spelt({})
    uids: Annotated[
        dict[Annotated[int, _from(parse_uid)], Annotated[str, _from(parse_agent)]],
        BeforeValidator(distinct(parse_uid), json_schema_input_type=dict[str, str]),
    ] = _spelt({})
    jwt: Jwt | None = None
    mtls: Mtls | None = None


class Upstream(_Section):
    """How upstreams are found and trusted. An address in `connect_to` is the operator's word and need not be public."""

    trust: tuple[Annotated[Path, _from(parse_file)], ...] = ()
    connect_to: Annotated[
        dict[_Endpoint, _Endpoint],
        BeforeValidator(distinct(parse_endpoint), json_schema_input_type=dict[str, str]),
    ] = _spelt({})
    nameservers: tuple[Annotated[Endpoint, _from(parse_nameserver)], ...] = ()
    allow_addresses: tuple[_Network, ...] = ()
    via: Annotated[Parent | None, _from(parse_parent, str | None)] = None


class Vault(_Section):
    """`lease`: seconds an opened credential may be used without asking the store again."""

    lease: _Duration = _spelt("60s")


class Audit(_Section):
    """Where the audit log goes, `file` null for none, and what happens where it cannot be written."""

    file: _Path | None = _spelt("{state}/audit.jsonl")
    stdout: bool = False
    on_full: Literal["refuse", "drop"] = "refuse"


class Limits(_Section):
    """Bytes and seconds. `buffer`: most of a body held for a rule that must see it; `headers`: of a message's head."""

    buffer: Annotated[_Size, AfterValidator(_positive)] = _spelt("1MiB")
    headers: Annotated[_Size, AfterValidator(_positive)] = _spelt("64KiB")
    connections_per_agent: int = Field(default=256, ge=1)
    unidentified_per_source: int = Field(default=512, ge=1)
    new_hosts_per_agent: Annotated[tuple[int, float], _from(parse_rate)] = _spelt("1200/m")
    idle: Annotated[_Duration, AfterValidator(_positive)] = _spelt("300s")


class Settings(_Section):
    """All settings, every path absolute."""

    model_config = ConfigDict(title="Sallyport settings")

    listen: Annotated[tuple[_Listener, ...], Field(min_length=1)] = _spelt(("127.0.0.1:8080",))
    admin: Annotated[Endpoint, _from(parse_bind)] = _spelt("127.0.0.1:9090")
    rules: _Path = _spelt("rules/")
    certs: _Path = _spelt("certs/")
    ca: Literal["shared", "per-agent"] = "shared"
    state: _Path = _spelt(".sallyport/")
    store: Annotated[StoreUrl, _from(parse_store)] = _spelt("embedded")
    workers: Annotated[int, _from(parse_workers, int | Literal["auto"])] = 1
    identity: Identity = Field(default_factory=Identity)
    upstream: Upstream = Field(default_factory=Upstream)
    lane: Literal["mitmproxy", "fast"] = "fast"
    vault: Vault = Field(default_factory=Vault)
    audit: Audit = Field(default_factory=Audit)
    limits: Limits = Field(default_factory=Limits)


# A setting's default shows how a variable or flag spells it: text as it is, a list by commas, the rest as YAML.
_PATHS = {("rules",), ("certs",), ("state",), ("upstream", "trust"), ("audit", "file")}
_INNER_PATHS = {
    *(("identity", "mtls", "ca"), ("identity", "jwt", "jwks"), ("identity", "jwt", "ca")),
    ("identity", "jwt", "token_file"),
}  # within a value that is null by default


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
            node[path[-1]] = _based(path, value, base)
            self._origins[path] = origin

    def settle(self, base: Path) -> None:
        """Make the file's own paths and the defaults absolute."""
        for path in _PATHS:
            value = self.get(path)
            self.put(path, _DEFAULTS[path] if value is _ABSENT else value, base)
        for path in _INNER_PATHS:
            if (value := self.get(path)) is not _ABSENT:
                self.put(path, value, base)

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


def _based(path: tuple[str, ...], value: Any, base: Path) -> Any:
    """A value with the paths in it made absolute."""
    if path in _PATHS or path in _INNER_PATHS:
        return _absolute(value, base)
    if isinstance(value, dict):
        return {key: _based((*path, key), inner, base) for key, inner in value.items()}
    return value


def _absolute(value: Any, base: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_absolute(item, base) for item in value]
    if not isinstance(value, str) or not value or value.startswith("{state}") or "://" in value:
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


def _contradictions(settings: Settings, tree: Tree) -> list[Problem]:
    """Values that are right alone and not together."""
    if settings.identity.mtls:
        return []
    asking = [index for index, listener in enumerate(settings.listen) if listener.client_certificate == "required"]
    message, hint = "client certificates are required, and none are trusted", "set identity.mtls: {ca: FILE}"
    return [tree.problem(("listen", index), message, hint) for index in asking]


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
    wrong += _contradictions(settings, layers) if settings else []
    if settings is None or problems or wrong:
        raise Problems(problems + wrong)
    return settings
