"""What a sandbox must have and must not have: the proxy, its CA and an identity; and no way round. Standard library.

The host that is asked for cannot exist (RFC 6761 section 6.4), so whoever answers for it is the proxy. Its answer, a
refusal as a rule, has a `sallyport-decision` header, which no upstream's answer has.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

HOST = "doctor.sallyport.invalid"
PATIENCE = 3.0  # seconds
_REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
_LONGEST = 64 * 1024
_ENV = 'eval "$(sallyport agent env ID)", or run it by `sallyport exec`'
_CLOSE = "take the route away: an internal network, a firewall, or `sallyport exec`"
_JAIL = ("198.18.", "198.19.")  # where names lead in a jail of `sallyport exec`

DIRECT = (("1.1.1.1", 443), ("8.8.8.8", 443), ("1.1.1.1", 80), ("9.9.9.9", 53), ("1.1.1.1", 22))
IPV6 = (("2606:4700:4700::1111", 443), ("2001:4860:4860::8888", 53))
METADATA = (("169.254.169.254", 80), ("100.100.100.200", 80), ("169.254.170.2", 80), ("fd00:ec2::254", 80))
_NTP = b"\x1b" + bytes(47)  # a client's packet, version 3 (RFC 5905)
SOCKETS = ("/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock")
NAMES = ("example.com", "one.one.one.one")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `ok` None: it could not be tried."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def through_the_proxy(environment: Mapping[str, str], agent: str | None) -> list[Check]:
    """Step by step, as a client with the variables does it: proxy, identity, CA. The first that fails is the last."""
    url = urlsplit(environment.get("HTTPS_PROXY") or environment.get("https_proxy") or "")
    if not url.hostname:
        return [_transparent(agent)]
    place = f"{url.hostname}:{url.port or 80}"
    try:
        sock = socket.create_connection((url.hostname, url.port or 80), PATIENCE)
    except OSError as error:
        fix = "start the proxy, or let the sandbox reach it: agent env --proxy HOST:PORT"
        return [Check("proxy", False, f"{place}: {_words(error)}", fix)]
    with sock:
        found = [Check("proxy", True, f"{place} answers")]
        try:
            status = _connect(sock, unquote(url.username or ""), unquote(url.password or ""))
        except (OSError, ValueError) as error:
            return [*found, Check("identity", False, _words(error), f"HTTPS_PROXY must be this proxy: {_ENV}")]
        if status != 200:
            return [*found, Check("identity", False, f"answered {status} to CONNECT", f"a valid token: {_ENV}")]
        return [*found, *_inside(sock, agent)]


def _transparent(agent: str | None) -> Check:
    fix = f"set the variables: {_ENV}"
    try:
        with socket.create_connection((HOST, 443), PATIENCE) as sock:
            return next((found for found in _inside(sock, agent) if not found.ok), Check("proxy", True, "transparent"))
    except OSError as error:
        return Check("proxy", False, f"HTTPS_PROXY is not set, and no transparent proxy: {_words(error)}", fix)


def _connect(sock: socket.socket, user: str, password: str) -> int:
    proof = base64.b64encode(f"{user}:{password}".encode()).decode()
    line = f"Proxy-Authorization: Basic {proof}\r\n" if password else ""
    sock.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n{line}\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < _LONGEST:  # byte by byte: what follows is TLS
        byte = sock.recv(1)
        if not byte:
            break
        head += byte
    return int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.") else _no_proxy()


def _no_proxy() -> int:
    raise ValueError("what answers is no HTTP proxy")


def _inside(sock: socket.socket, agent: str | None) -> list[Check]:
    """TLS to the host that cannot exist, and who the proxy says we are."""
    try:
        with ssl.create_default_context().wrap_socket(sock, server_hostname=HOST) as tls:
            decision, speaks = _decision(tls)
    except ssl.SSLCertVerificationError as error:
        fix = f"SSL_CERT_FILE must be a bundle with the proxy's CA: {_ENV}"
        return [Check("CA", False, error.verify_message, fix)]
    except OSError as error:
        return [Check("CA", False, f"no TLS: {_words(error)}", "look at what the proxy logs")]
    if not decision:
        return [Check("CA", False, "somebody else answers for the host", "nothing but Sallyport may intercept")]
    checks = [Check("CA", True, "trusted")]
    if "no_identity" in decision or "bad_identity" in decision or "identity_conflict" in decision:
        return [*checks, Check("identity", False, decision, f"a valid token: {_ENV}")]
    if agent and speaks and speaks != agent:
        return [*checks, Check("identity", False, f"speaks as {speaks}", f"the variables of {agent}: {_ENV}")]
    return [*checks, Check("identity", True, f"speaks as {speaks}" if speaks else "known")]


def _decision(sock: socket.socket) -> tuple[str, str]:
    """What the proxy decided about the request, and the agent it took us for; both empty for anybody else."""
    sock.sendall(_REQUEST)
    data = b""
    while len(data) < _LONGEST and (more := sock.recv(4096)):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    decision = next((value.strip() for name, _, value in lines if name.lower() == "sallyport-decision"), "")
    try:
        return decision, str(json.loads(body)["error"]["agent"] or "") if decision else ""
    except (ValueError, KeyError, TypeError):
        return decision, ""


# Ways round


def ways_round() -> list[Check]:
    """Every way out that is not the proxy, tried all at once."""
    ways: list[tuple[str, Callable[[], str]]] = [
        ("direct TCP", lambda: _first(_tcp, DIRECT)),
        ("direct IPv6", lambda: _first(_tcp, IPV6)),
        ("UDP", lambda: _first(_ntp, (("162.159.200.1", 123), ("216.239.35.0", 123)))),
        ("direct DNS", lambda: _first(_dns, (("1.1.1.1", 53), ("8.8.8.8", 53)))),
        ("DNS", _names),
        ("metadata", lambda: _first(_tcp, METADATA)),
        ("control sockets", _sockets),
    ]
    with ThreadPoolExecutor(len(ways)) as pool:
        found = list(pool.map(lambda way: way[1](), ways))
    return [
        Check(name, not detail, detail or "no way out", _CLOSE if detail else "")
        for (name, _), detail in zip(ways, found, strict=True)
    ]


def _first(attempt: Callable[[str, int], str], places: tuple[tuple[str, int], ...]) -> str:
    """What got out; places are tried at once, because a firewall that drops lets each wait."""
    with ThreadPoolExecutor(len(places)) as pool:
        return next(filter(None, pool.map(lambda place: attempt(*place), places)), "")


def _tcp(host: str, port: int) -> str:
    """Empty where nobody is reached, or the proxy alone, which a connection may be redirected to."""
    try:
        with socket.create_connection((host, port), PATIENCE) as sock:
            return "" if _is_the_proxy(sock, port) else f"{host} port {port} is connected"
    except OSError:
        return ""


def _is_the_proxy(sock: socket.socket, port: int) -> bool:
    """Whoever it is, it is asked for a host that cannot exist; its certificate is no matter here."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if port != 443:
            return bool(_decision(sock)[0])
        with context.wrap_socket(sock, server_hostname=HOST) as tls:
            return bool(_decision(tls)[0])
    except OSError:
        return False


def _ntp(host: str, port: int) -> str:
    return f"{host} port {port} answers" if _ask(host, port, _NTP) else ""


def _dns(host: str, port: int) -> str:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in NAMES[0].split("."))
    query = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    answer = _ask(host, port, query)
    return "" if not answer or socket.inet_ntoa(answer[-4:]).startswith(_JAIL) else f"{host} answers queries"


def _ask(host: str, port: int, data: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        try:
            sock.connect((host, port))
            sock.send(data)
            return sock.recv(2048)
        except OSError:
            return b""


def _names() -> str:
    """Names that everybody can resolve; in a jail they all have an address of the range that leads to the proxy."""
    for name in NAMES:
        try:
            address = socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)[0][4][0]
        except OSError:
            continue
        if not str(address).startswith(_JAIL):
            return f"{name} is {address}: names that are asked for carry data out"
    return ""


def _sockets() -> str:
    """Whoever may speak to a container engine has its host."""
    for path in SOCKETS:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(path)
            except OSError:
                continue
            return f"{os.path.realpath(path)} can be used"
    return ""


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).lower()
