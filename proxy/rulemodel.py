"""How a rule is written: its fields, and their JSON Schema for editors. Values are parsed by `rulefield`.

What one field means for another lives in `rulefile`. Nothing may be null: a condition that was left empty by mistake
would match everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import re2
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag
from pydantic import GetCoreSchemaHandler as CoreHandler
from pydantic import GetJsonSchemaHandler as JsonHandler
from pydantic_core import CoreSchema, core_schema

from proxy.address import Host, HostPattern
from proxy.bodymatch import parse_pointer
from proxy.pattern import Glob, text_glob
from proxy.quantity import parse_rate, parse_size
from proxy.rulefield import (
    INJECT_KINDS,
    parse_agent_glob,
    parse_credential,
    parse_header_name,
    parse_header_value,
    parse_host_pattern,
    parse_inject_kind,
    parse_matched_header,
    parse_method,
    parse_one_host,
    parse_path,
    parse_path_to,
    parse_regex,
    parse_rule_name,
    parse_some_text,
    parse_text,
    parse_version,
)


def _from(parse: Callable[[Any], object], written: Any = str) -> PlainValidator:
    return PlainValidator(parse, json_schema_input_type=written)


def _distinct(value: object) -> object:
    """Refuses two spellings of one header: only one of them would be sent."""
    seen: dict[str, str] = {}
    for key in value if isinstance(value, dict) else ():
        if seen.setdefault(key.lower(), key) != key:
            raise ValueError(f'"{key}" is the same header as "{seen[key.lower()]}"', "remove one of them")
    return value


class _Many:
    """Makes a list of anything written alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: CoreHandler) -> CoreSchema:
        def listed(value: object) -> tuple[object, ...]:
            return tuple(value) if isinstance(value, list) else (value,)

        return core_schema.no_info_before_validator_function(listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: JsonHandler) -> dict[str, Any]:
        array = handler(schema)
        return {"anyOf": [array["items"], array]}


_MANY = _Many()
_SOME = Field(min_length=1)  # an empty list is no condition, and would match everything
_SCALAR = str | int | float | bool

type _Globs = Annotated[tuple[Annotated[Glob, _from(lambda v: text_glob(parse_text(v)), _SCALAR)], ...], _SOME, _MANY]
type _Header = Annotated[str, _from(parse_header_name)]
type _HeaderValues = Annotated[
    dict[_Header, Annotated[str, _from(parse_header_value, _SCALAR)]],
    BeforeValidator(_distinct, json_schema_input_type=dict[str, _SCALAR]),
]
type _Name = Annotated[str, _from(parse_some_text)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=False)


class AgentLabels(_Model):
    """Agents that have every one of these labels."""

    labels: Annotated[dict[str, _Globs], _SOME]


_AgentItem = Annotated[
    Annotated[Glob, _from(parse_agent_glob), Tag("id")] | Annotated[AgentLabels, Tag("labels")],
    Discriminator(lambda value: "labels" if isinstance(value, dict) else "id"),
]


class BodyFields(_Model):
    """Conditions on the body."""

    json_: Annotated[dict[Annotated[tuple[str, ...], _from(parse_pointer)], _Globs], _SOME] = Field(alias="json")
    """JSON pointer (RFC 6901) -> value: what stands there must match, `*` is any text."""


class MatchFields(_Model):
    """The conditions; all must be met."""

    host: Annotated[tuple[Annotated[HostPattern, _from(parse_host_pattern)], ...], _SOME, _MANY] = ()
    """`api.example.com`, `*.example.com` (one label) or `**.example.com` (any depth, never the apex)."""
    port: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], _SOME, _MANY] = ()
    """Default of an allow rule: the scheme's own."""
    scheme: Annotated[tuple[Literal["https", "http"], ...], _SOME, _MANY] = ()
    """Default of an allow rule: https."""
    method: Annotated[tuple[Annotated[str, _from(parse_method)], ...], _SOME, _MANY] = ()
    """GET includes HEAD. Default: any."""
    websocket: bool = False
    """Without it an upgrade to WebSocket is refused."""
    path: Annotated[tuple[Annotated[Glob, _from(parse_path)], ...], _SOME, _MANY] = ()
    """`*` inside a segment, `**` across."""
    path_regex: Annotated[re2._Regexp | None, _from(parse_regex)] = None
    """RE2, found anywhere in the path unless anchored by ^ and $."""
    query: dict[_Name, _Globs] = {}
    """Parameter -> value: every value it has must match, `*` is any text."""
    headers: Annotated[
        dict[Annotated[str, _from(parse_matched_header)], _Globs],
        BeforeValidator(_distinct, json_schema_input_type=dict[str, _SCALAR | list[_SCALAR]]),
    ] = {}
    """Header -> value: every value it has must match, `*` is any text."""
    body: BodyFields = Field(default=None)  # type: ignore[assignment]  # null is refused where it is written
    """What the body must hold. A request for such a rule is held until its body is here."""


class HeaderEdit(_Model):
    """Headers to set, in place of every one of that name, and to remove."""

    set: _HeaderValues = {}
    remove: Annotated[tuple[_Header, ...], _MANY] = ()


class QueryEdit(_Model):
    """Query parameters to set, in place of every one of that name, and to remove."""

    set: dict[_Name, Annotated[str, _from(parse_text, _SCALAR)]] = {}
    remove: Annotated[tuple[_Name, ...], _MANY] = ()


class PathRewrite(_Model):
    r"""What `regex` (RE2) finds in the path becomes `to`, in which \1 is its first group."""

    regex: Annotated[re2._Regexp, _from(parse_regex)]
    to: Annotated[str, _from(parse_path_to)]


class UrlRewrite(_Model):
    """Another destination is decided again as the new request."""

    host: Annotated[Host | None, _from(parse_one_host)] = None
    port: Annotated[int, Field(ge=1, le=65535)] = 0
    path: PathRewrite = Field(default=None)  # type: ignore[assignment]  # null is refused where it is written
    query: QueryEdit = QueryEdit()


class RewriteFields(_Model):
    """What is changed before the request is sent."""

    url: UrlRewrite = UrlRewrite()
    headers: HeaderEdit = HeaderEdit()


class InjectOptions(_Model):
    """What a kind takes: basic `username`; header `name`, `value`; query, cookie `name`; sigv4 `service`, `region`;
    placeholder the last two."""

    username: _Name = ""
    name: _Name = ""
    value: _Name = ""
    service: _Name = ""
    region: _Name = ""
    in_: Annotated[tuple[Literal["header", "query", "path", "body"], ...], _SOME, _MANY] = Field(default=(), alias="in")
    placeholder: _Name = ""


_Kind = Annotated[str, _from(parse_inject_kind, Literal[*INJECT_KINDS])]
_As = Annotated[
    Annotated[_Kind, Tag("kind")]
    | Annotated[dict[_Kind, InjectOptions], Field(min_length=1, max_length=1), Tag("more")],
    Discriminator(lambda value: "more" if isinstance(value, dict) else "kind"),
]


class InjectFields(InjectOptions):
    """One credential, by its name in the vault. `as: basic` with options beside it, or `as: {basic: {...}}`."""

    credential: Annotated[str, _from(parse_credential)]
    as_: _As = Field(default="", alias="as")
    """Default: as the credential's own kind says."""


class ResponseFields(_Model):
    """What is changed of the answer."""

    headers: HeaderEdit = HeaderEdit()


class RespondFields(_Model):
    """An answer given here; no upstream is asked."""

    status: Annotated[int, Field(ge=200, le=599)] = 200
    headers: _HeaderValues = {}
    body: str = ""


class LimitFields(_Model):
    """What the rule lets through at most."""

    rate: Annotated[tuple[int, float] | None, _from(parse_rate)] = None
    """Requests of one agent in a second, minute, hour or day: `60/m`."""
    concurrency: Annotated[int, Field(ge=1)] = 0
    """Requests at a time."""
    request_body: Annotated[int | None, _from(parse_size, str | int)] = None
    """Bytes of a request's body."""
    max_url: Annotated[int, Field(ge=1)] = 0
    """Bytes of the whole URL as it was asked for."""
    max_labels: Annotated[int, Field(ge=1)] = 0
    """How many labels of a host name a wildcard may stand for."""


class RuleFields(_Model):
    """One rule. A matching block rule always wins; otherwise the first allow rule that matches decides."""

    name: Annotated[str, _from(parse_rule_name)]
    """Unique over all files."""
    action: Literal["allow", "block"]
    agents: Annotated[tuple[_AgentItem, ...], _SOME, _MANY] = ()
    """Ids, globs or `{labels: {team: payments}}`. Default: every agent."""
    match: MatchFields = MatchFields()
    rewrite: RewriteFields = RewriteFields()
    inject: tuple[InjectFields, ...] = ()
    response: ResponseFields = ResponseFields()
    respond: RespondFields = RespondFields()
    tls: Literal["intercept", "passthrough"] = "intercept"
    """`passthrough`: connections to the hosts are not read, for clients that accept no CA but their own."""
    private: bool = False
    """The upstream's address must be a private one that the settings allow."""
    connections: Literal["shared", "per-agent"] = "shared"
    """`per-agent`: no connection to the upstream that carried a request of one agent carries one of another."""
    limits: LimitFields = LimitFields()
    scan: Annotated[tuple[Literal["secrets"], ...], _SOME, _MANY] = ()
    """`secrets`: a request that holds a key of a well-known form is refused."""


class FileHead(_Model):
    """A rule file whose rules are not looked into yet."""

    version: Annotated[int, _from(parse_version, Literal[1])]
    rules: list[Any] | None = Field(default=...)  # null: every rule below it is commented out


class RuleFile(_Model):
    """A file of rules."""

    version: Literal[1]
    rules: tuple[RuleFields, ...] | None


def rules_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a rule file, for editors."""
    schema = RuleFile.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Sallyport rules"}
