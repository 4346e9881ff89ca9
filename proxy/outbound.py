"""The request as it will be sent: a rule's rewrites and injected credentials, applied to a view. The only place that
reveals a secret. Pure; what is allowed was decided before."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote_plus

from proxy.exchange import Injected
from proxy.policy import Edit, Injection, Rewrite
from proxy.request import DEFAULT_PORTS, Field, RequestView, strip_headers
from proxy.secret import Secret

# Connection-specific fields (RFC 9110 section 7.6.1), identity, and what reverse proxies in front of us add.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
        b"http2-settings",
    }
)
IDENTITY = frozenset({b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"forwarded"})
_INTERNAL = (b"x-envoy-", b"sallyport-")


class InjectionError(ValueError):
    """A credential that cannot be added in the way the rule asks for; the text names no secret."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What injecting needs of a leased credential."""

    name: str
    version: int
    kind: str
    fields: Mapping[str, str]
    secret: Secret


@dataclass(frozen=True, slots=True)
class Outbound:
    """The view to forward, and what a streamed body must have replaced in it (placeholder -> secret)."""

    view: RequestView
    injected: tuple[Injected, ...] = ()
    sent: tuple[tuple[str, bytes], ...] = ()  # credential -> each form in which its secret was sent
    body: tuple[tuple[bytes, Opened], ...] = ()  # placeholder -> what replaces it while the body streams by


def forwarded_headers(headers: Iterable[Field], *, websocket: bool) -> list[Field]:
    """`headers` without those of one hop, those named by Connection, and identity that only we may state."""
    headers = list(headers)
    drop = HOP_BY_HOP | IDENTITY
    for name, value in headers:
        if name.lower() == b"connection":
            listed = {token.strip().lower() for token in value.split(b",")}
            drop |= listed - {b"host", b"content-length", b"transfer-encoding", b"authorization"}
    kept = [field for field in strip_headers(headers, drop) if not field[0].lower().startswith(_INTERNAL)]
    if websocket:
        kept += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return kept


def rewrite(view: RequestView, change: Rewrite) -> RequestView:
    """`view` with a rule's rewrite applied and normalised anew.

    Raises Ambiguous where the rewritten path is none that may be sent.
    """
    path, query = view.path, view.query
    if change.path_regex is not None:
        path = change.path_regex.sub(change.path_to, path)
    if change.query:
        query = _edit_query(query, change.query)
    host = change.host or view.host
    port = change.port or (DEFAULT_PORTS[view.scheme] if change.host else view.port)
    headers = edit_headers(view.headers, change.headers)
    target = f"{path}?{query}" if query else path
    return RequestView.parse(view.method, view.scheme, host, port, target, headers)


def edit_headers(headers: Iterable[Field], edit: Edit) -> list[Field]:
    """`headers` with every spelling of the names in `edit` removed, then those to set added once."""
    names = {name.lower().encode("latin-1") for name in (*edit.set, *edit.remove)}
    kept = strip_headers(headers, frozenset(names))
    return kept + [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in edit.set.items()]


def _edit_query(query: str, edit: Edit) -> str:
    names = {*edit.set, *edit.remove}
    kept = [pair for pair in query.split("&") if pair and unquote_plus(pair.partition("=")[0]) not in names]
    return "&".join(kept + [f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in edit.set.items()])


def inject(outbound: Outbound, injection: Injection, opened: Opened) -> Outbound:
    """`outbound` with one credential added: every spelling of its place is stripped, then it is set once.

    Raises InjectionError.
    """
    kind = injection.kind or opened.kind
    options = {**opened.fields, **injection.options}
    secret = opened.secret.reveal()
    if kind == "placeholder":
        return _replace_placeholder(outbound, injection, opened, options)
    if kind in ("bearer", "basic", "header", "cookie") and any(octet in secret for octet in b"\r\n\0"):
        raise InjectionError("the secret holds a line break, which no header may")
    if kind == "bearer":
        return _set_header(outbound, opened, "authorization", b"Bearer " + secret, secret)
    if kind == "basic":
        pair = options["username"].encode() + b":" + secret if "username" in options else secret
        encoded = base64.b64encode(pair if b":" in pair else b":" + pair)
        return _set_header(outbound, opened, "authorization", b"Basic " + encoded, secret, encoded)
    if kind == "header":
        template = options.get("value", "{secret}").encode()
        return _set_header(outbound, opened, options["name"], template.replace(b"{secret}", secret), secret)
    view = outbound.view
    if kind == "query":
        try:
            query = _edit_query(view.query, Edit(set={options["name"]: secret.decode()}))
        except UnicodeDecodeError:
            raise InjectionError("the secret is not text, which a query must be") from None
        return _with(outbound, replace(view, query=query), opened, f"query:{options['name']}", secret)
    if kind == "cookie":
        name = options["name"]
        kept = [part.strip() for value in view.header_values("cookie") for part in value.split(";")]
        kept = [part for part in kept if part and part.partition("=")[0].strip() != name]
        cookie = "; ".join([*kept, f"{name}="]).encode("latin-1") + secret
        headers = (*strip_headers(view.headers, frozenset({b"cookie"})), (b"Cookie", cookie))
        return _with(outbound, replace(view, headers=headers), opened, f"cookie:{name}", secret)
    raise InjectionError("the rule does not say how to add the credential, and neither does its kind")


def _with(outbound: Outbound, view: RequestView, opened: Opened, location: str, *forms: bytes) -> Outbound:
    return replace(
        outbound,
        view=view,
        injected=(*outbound.injected, Injected(opened.name, opened.version, location)),
        sent=(*outbound.sent, *((opened.name, form) for form in forms)),
    )


def _set_header(outbound: Outbound, opened: Opened, name: str, value: bytes, *forms: bytes) -> Outbound:
    key = name.lower().encode("latin-1")
    headers = (*strip_headers(outbound.view.headers, frozenset({key})), (name.encode("latin-1"), value))
    return _with(outbound, replace(outbound.view, headers=headers), opened, f"header:{name.lower()}", *forms)


def placeholder_of(opened_name: str, options: Mapping[str, str]) -> str:
    """The text an agent writes where the secret shall stand."""
    return options.get("placeholder") or f"slp_placeholder_{opened_name}"


def _replace_placeholder(
    outbound: Outbound, injection: Injection, opened: Opened, options: Mapping[str, str]
) -> Outbound:
    places = injection.places or ("header",)
    text = placeholder_of(opened.name, options)
    mark, secret = text.encode(), opened.secret.reveal()
    view, found = outbound.view, []
    if "header" in places and any(octet in secret for octet in b"\r\n\0"):
        raise InjectionError("the secret holds a line break, which no header may")
    if "header" in places:
        headers = tuple((name, _in_header(value, mark, secret)) for name, value in view.headers)
        if headers != view.headers:
            found.append("header")
            view = replace(view, headers=headers)
    escaped = quote(secret, safe="")
    if "query" in places and text in unquote_plus(view.query):
        pairs = parse_qsl(view.query, keep_blank_values=True)
        query = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in pairs)
        view = replace(view, query=query.replace(quote(text, safe=""), escaped))
        found.append("query")
    if "path" in places and text in view.path:
        if secret in (b".", b".."):
            raise InjectionError("the secret would change the path")
        view = RequestView.parse(
            view.method,
            view.scheme,
            view.host,
            view.port,
            view.path.replace(text, escaped) + (f"?{view.query}" if view.query else ""),
            view.headers,
        )
        found.append("path")
    for place in found:
        outbound = _with(outbound, view, opened, f"placeholder:{place}", secret, escaped.encode())
    if "body" in places:
        outbound = replace(outbound, body=(*outbound.body, (mark, opened)))
    return outbound


def _in_header(value: bytes, mark: bytes, secret: bytes) -> bytes:
    if mark in value:
        return value.replace(mark, secret)
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return value
    try:
        pair = base64.b64decode(encoded, validate=True)
    except ValueError:
        return value
    return scheme + b" " + base64.b64encode(pair.replace(mark, secret)) if mark in pair else value
