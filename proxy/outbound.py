"""The request as it will be sent: a rule's rewrites and injected credentials, applied to a view. The only place that
reveals a secret. Pure; what is allowed was decided before."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote, unquote_plus, unquote_to_bytes

from proxy.credential import is_aws_key
from proxy.exchange import Injected
from proxy.policy import Edit, Injection, Rewrite
from proxy.request import DEFAULT_PORTS, Ambiguous, Field, RequestView, fold, is_own_header, strip_headers
from proxy.secret import Secret
from proxy.sigv4 import (
    OBJECT_STORES,
    Scope,
    authorization,
    canonical_request,
    is_of_signature,
    sent_path,
    sent_query,
    signature,
    signed_headers,
)

HEADER_KINDS = frozenset({"bearer", "basic", "header", "cookie"})  # what they add depends on headers alone
_NO_HEADER_BYTE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 section 5.5


class InjectionError(ValueError):
    """A credential that cannot be added in the way the rule asks for; the text names no secret."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What injecting needs of a credential that is open."""

    name: str
    version: int
    kind: str
    fields: Mapping[str, str]
    secret: Secret


@dataclass(frozen=True, slots=True)
class Outbound:
    """The view to forward, and what a streamed body must have replaced in it (placeholder -> secret)."""

    view: RequestView = field(repr=False)
    injected: tuple[Injected, ...] = ()
    # Credential -> each form in which its secret was sent.
    sent: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    body: tuple[tuple[bytes, Opened], ...] = ()  # placeholder -> what replaces it while the body streams by
    signing: Signing | None = None  # what is left to do when the head is written and the body known


@dataclass(frozen=True, slots=True)
class Signing:
    """An AWS signature to be added; `declared` is what the agent said of its body."""

    opened: Opened
    service: str
    region: str
    declared: str


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
    return view.retargeted(host, port, target)._replace(headers=tuple(headers))


def edit_headers(headers: Iterable[Field], edit: Edit) -> list[Field]:
    """`headers` with every spelling of the names in `edit` removed, then those to set added once."""
    kept = strip_headers(headers, (name.encode("latin-1") for name in (*edit.set, *edit.remove)))
    return kept + [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in edit.set.items()]


def _edit_query(query: str, edit: Edit) -> str:
    """`query` without the names in `edit`, then those to set; what is neither stays as it was, byte for byte."""
    names = {*edit.set, *edit.remove}
    kept = []
    for pair in query.split("&") if query else ():
        # Some origins also separate by ";": a name they would read there goes too.
        parts = [part for part in pair.split(";") if _parameter_name(part) not in names]
        if _parameter_name(pair) not in names and parts:
            kept.append(";".join(parts))
    added = [f"{quote(key, safe='')}={_quoted(value)}" for key, value in edit.set.items()]
    return "&".join(kept + added)


def _parameter_name(pair: str) -> str:
    return unquote_plus(pair.partition("=")[0])


def _quoted(value: str) -> str:
    return quote(value, safe="", errors="surrogateescape")


def inject(outbound: Outbound, injection: Injection, opened: Opened) -> Outbound:
    """`outbound` with one credential added: every spelling of its place is stripped, then it is set once.

    Raises InjectionError.
    """
    kind = injection.kind or opened.kind
    options = {**opened.fields, **injection.options}
    secret = opened.secret.reveal()
    if kind == "placeholder":
        return _replace_placeholder(outbound, injection, opened, options)
    if kind in HEADER_KINDS:
        _check_header(secret)
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
        query = _edit_query(view.query, Edit(set={options["name"]: secret.decode(errors="surrogateescape")}))
        return _with(outbound, view._replace(query=query), opened, f"query:{options['name']}", secret)
    if kind == "sigv4":
        return _prepare_signing(outbound, opened, options)
    if kind == "cookie":
        if b";" in secret:
            raise InjectionError("the secret holds a semicolon, where a cookie ends")
        name = options["name"]
        cookie = b"; ".join([*_cookies(view, name), name.encode("latin-1") + b"=" + secret])
        headers = (*strip_headers(view.headers, [b"cookie"]), (b"Cookie", cookie))
        return _with(outbound, view._replace(headers=headers), opened, f"cookie:{name}", secret)
    raise InjectionError("the rule does not say how to add the credential, and neither does its kind")


def _prepare_signing(outbound: Outbound, opened: Opened, options: Mapping[str, str]) -> Outbound:
    """The agent's own signature taken out, path and query spelt as they are signed."""
    view = outbound.view
    declared = b",".join(value for name, value in view.headers if fold(name) == b"x-amz-content-sha256")
    headers = tuple(field for field in view.headers if not is_of_signature(field[0]))
    signing = Signing(opened, options["service"], options["region"], declared.decode("latin-1"))
    _, secret_key, token = _aws_key(opened)
    view = view._replace(headers=headers, path=sent_path(view.path), query=sent_query(view.query))
    outbound = _with(outbound, view, opened, "sigv4", *filter(None, (secret_key, token)))
    return replace(outbound, signing=signing)


def _aws_key(opened: Opened) -> tuple[bytes, bytes, bytes]:
    """Access key id, secret access key, session token (which may be empty)."""
    secret = opened.secret.reveal()
    if not is_aws_key(secret):
        raise InjectionError("the secret is not ACCESS_KEY_ID:SECRET_ACCESS_KEY")
    access_key, secret_key, *token = secret.split(b":", 2)
    return access_key, secret_key, token[0] if token else b""


def sign(view: RequestView, signing: Signing, payload: str, stamp: str) -> list[Field]:
    """The headers that sign `view` with a body of hash `payload` at `stamp` (UTC, `20150830T123600Z`).

    Raises InjectionError.
    """
    access_key, secret_key, token = _aws_key(signing.opened)
    scope = Scope(signing.service, signing.region, stamp)
    added: list[Field] = [(b"X-Amz-Date", stamp.encode()), (b"X-Amz-Content-Sha256", payload.encode())]
    if token:
        added.append((b"X-Amz-Security-Token", token))
    headers = signed_headers([(b"host", view.authority.encode()), *view.headers, *added])
    again = signing.service not in OBJECT_STORES
    canonical = canonical_request(view.method, view.path, view.query, headers, payload, encode_again=again)
    value = authorization(access_key.decode("latin-1"), scope, headers, signature(canonical, scope, secret_key))
    return [*added, (b"Authorization", value.encode("latin-1"))]


def _check_header(secret: bytes) -> None:
    if _NO_HEADER_BYTE.search(secret):
        raise InjectionError("the secret holds a line break or control character, which no header may")


def _cookies(view: RequestView, without: str) -> Iterator[bytes]:
    """The cookies of a request as they are spelt, but for those some origin would take for `without`."""
    for header, value in view.headers:
        if fold(header) == b"cookie":
            for part in filter(None, map(bytes.strip, value.split(b";"))):
                names = (piece.partition(b"=")[0].strip() for piece in part.split(b","))  # RFC 2965: a comma separates
                if all(unquote(name.decode("latin-1")) != without for name in names):
                    yield part


def _with(outbound: Outbound, view: RequestView, opened: Opened, location: str, *forms: bytes) -> Outbound:
    return Outbound(
        view,
        (*outbound.injected, Injected(opened.name, opened.version, location)),
        (*outbound.sent, *[(opened.name, form) for form in forms]),
        outbound.body,
    )


def _set_header(outbound: Outbound, opened: Opened, name: str, value: bytes, *forms: bytes) -> Outbound:
    spelling = name.encode("latin-1")
    if is_own_header(spelling):
        raise InjectionError("the header is the proxy's own")
    headers = (*strip_headers(outbound.view.headers, (spelling,)), (spelling, value))
    return _with(outbound, outbound.view.with_headers(headers), opened, f"header:{name.lower()}", *forms)


def placeholder_of(opened_name: str, options: Mapping[str, str]) -> str:
    """The text an agent writes where the secret shall stand."""
    return options.get("placeholder") or f"slp_placeholder_{opened_name}"


def _replace_placeholder(
    outbound: Outbound, injection: Injection, opened: Opened, options: Mapping[str, str]
) -> Outbound:
    places = injection.places or ("header",)
    mark, secret = placeholder_of(opened.name, options).encode(), opened.secret.reveal()
    escaped = quote(secret, safe="").encode()
    for place, put in _PLACES.items():
        view = put(outbound.view, mark, secret) if place in places else outbound.view
        if view is not outbound.view:
            outbound = _with(outbound, view, opened, f"placeholder:{place}", secret, escaped)
    if "body" in places:
        outbound = replace(outbound, body=(*outbound.body, (mark, opened)))
    return outbound


def _in_headers(view: RequestView, mark: bytes, secret: bytes) -> RequestView:
    headers = tuple((name, _in_header(value, mark, secret)) for name, value in view.headers)
    if headers == view.headers:
        return view
    _check_header(secret)
    return view._replace(headers=headers)


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


def _in_query(view: RequestView, mark: bytes, secret: bytes) -> RequestView:
    def put(part: re.Match[str]) -> str:
        octets = unquote_to_bytes(part[0].replace("+", " "))
        return quote(octets.replace(mark, secret), safe="") if mark in octets else part[0]

    query = re.sub("[^&=]+", put, view.query)
    return view if query == view.query else view._replace(query=query)


def _in_path(view: RequestView, mark: bytes, secret: bytes) -> RequestView:
    spelling = quote(mark, safe="~!$&'()*,=:@")  # as it stands in the normal form
    path = view.path.replace(spelling, quote(secret, safe=""))
    if path == view.path:
        return view
    if not {".", ".."}.isdisjoint(path.split("/")):
        raise InjectionError("the secret would change the path")
    try:
        return view.retargeted(view.host, view.port, f"{path}?{view.query}" if view.query else path)
    except Ambiguous:
        raise InjectionError("the secret cannot stand in a path") from None


_PLACES: Mapping[str, Callable[[RequestView, bytes, bytes], RequestView]] = {
    "header": _in_headers,
    "query": _in_query,
    "path": _in_path,
}


def secrets_sent(outbound: Outbound) -> tuple[tuple[str, bytes], ...]:
    """Credential -> each form in which its secret is sent, in a body too: none of them may come back."""
    return outbound.sent + tuple((opened.name, opened.secret.reveal()) for _, opened in outbound.body)


def secrets_known(opened: Iterable[tuple[str, Secret]]) -> tuple[tuple[str, bytes], ...]:
    """The same for credentials that were not sent now."""
    return tuple((name, secret.reveal()) for name, secret in opened)


def body_placeholders(outbound: Outbound) -> dict[bytes, tuple[bytes, str]]:
    """Placeholder -> the secret that replaces it while the body streams by, and its credential."""
    return {mark: (opened.secret.reveal(), opened.name) for mark, opened in outbound.body}
