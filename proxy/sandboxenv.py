"""What a sandbox must export so that its clients use the proxy and trust its CA. Renders text; runs nothing."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization.pkcs12 import PKCS12Certificate, serialize_java_truststore

from proxy.ca import write_whole
from proxy.problem import UserError

SYSTEM_ROOTS = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Ubuntu, Alpine, Arch
    Path("/etc/pki/tls/certs/ca-bundle.crt"),  # Fedora, RHEL
    Path("/etc/ssl/cert.pem"),  # macOS, BSD
)

# Each replaces its client's store of roots, so each gets the merged bundle.
CA_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, Python ssl and httpx, Go, uv
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "npm_config_cafile",
    "DENO_CERT",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "HTTPLIB2_CA_CERTS",
    "BUNDLE_SSL_CA_CERT",
    "COMPOSER_CAFILE",
    "NIX_SSL_CERT_FILE",
    "ELECTRON_EXTRA_CA_CERTS",
    "HEX_CACERTS_PATH",
)
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_JAVA_STORE = "changeit"  # the password of Java's own roots, too: no secret, but Java reads no store without one
_LOOPBACK = "localhost,127.0.0.1,::1"


@dataclass(frozen=True, slots=True)
class Bundle:
    """Where the merged roots lie, and the files for clients that no variable tells of them ("": there is none)."""

    pem: str
    wgetrc: str = ""
    apt: str = ""
    java: str = ""


def variables(agent: str, token: str, proxy: str, bundle: Bundle) -> dict[str, str]:
    """The variables for `agent`; `proxy` is host:port, the paths of `bundle` are those in the sandbox. Without a token
    the proxy knows it by other means."""
    url = f"http://{agent}:{token}@{proxy}" if token else f"http://{proxy}"
    files = {"WGETRC": bundle.wgetrc, "APT_CONFIG": bundle.apt}
    return (
        dict.fromkeys(_PROXY_VARIABLES, url)
        | {"NO_PROXY": _LOOPBACK, "no_proxy": _LOOPBACK, "NODE_USE_ENV_PROXY": "1"}
        | dict.fromkeys(CA_VARIABLES, bundle.pem)
        | {name: path for name, path in files.items() if path}
        | {"JAVA_TOOL_OPTIONS": _java(proxy, bundle.java)}
    )


def _java(proxy: str, store: str) -> str:
    """Java heeds no other variable, and never sends credentials: know it by its network or listener."""
    host, _, port = proxy.rpartition(":")
    options = [f"-D{scheme}.proxy{name}" for scheme in ("http", "https") for name in (f"Host={host}", f"Port={port}")]
    if store:
        options += [f"-Djavax.net.ssl.trustStore={store}", f"-Djavax.net.ssl.trustStorePassword={_JAVA_STORE}"]
    # The JVM splits at blanks, and takes what stands in quotes as one (JDK-4971166).
    return " ".join(f'"{option}"' if " " in option else option for option in options)


def ca_bundle(own: bytes) -> bytes:
    """The system's roots (else Mozilla's, from certifi) with our CA certificate behind them."""
    roots = next((path for path in SYSTEM_ROOTS if path.is_file()), Path(certifi.where()))
    return roots.read_bytes().rstrip() + b"\n" + own


def _sh(values: Mapping[str, str]) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def _dotenv(values: Mapping[str, str]) -> str:
    quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in values.items()}  # ' is literal
    return "\n".join(f"{name}={value}" for name, value in quoted.items())


def _docker(values: Mapping[str, str]) -> str:
    return "\n".join(f"{name}={value}" for name, value in values.items())  # --env-file knows no quotes


def _k8s(values: Mapping[str, str]) -> str:
    return "\n".join(f"- name: {name}\n  value: {json.dumps(value)}" for name, value in values.items())


FORMATS: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "sh": _sh,
    "dotenv": _dotenv,
    "docker": _docker,
    "k8s": _k8s,
}


def write_bundle(folder: Path, own: bytes) -> Bundle:
    """The merged bundle in `folder`, and what names it to wget and apt and holds it for Java.

    Raises UserError.
    """
    paths = Bundle(*(str(folder / name) for name in ("ca-bundle.pem", "wgetrc", "apt.conf", "ca-bundle.p12")))
    merged = ca_bundle(own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (_holds(paths.pem, merged) and Path(paths.java).is_file()):  # its salt makes it another each time
            write_whole(Path(paths.java), _java_store(merged), 0o644)
        for path, content in (
            (paths.wgetrc, f"ca_certificate = {paths.pem}\n".encode()),
            (paths.apt, f'Acquire::https::CAInfo "{paths.pem}";\n'.encode()),
            (paths.pem, merged),  # last: what it holds says whether the others are right
        ):
            if not _holds(path, content):
                write_whole(Path(path), content, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make the certs folder writable") from None
    return paths


def refresh_bundle(folder: Path, own: bytes) -> None:
    """Write the bundle anew where there is one. Raises UserError."""
    if (folder / "ca-bundle.pem").is_file():
        write_bundle(folder, own)


def _holds(path: str, content: bytes) -> bool:
    return Path(path).is_file() and Path(path).read_bytes() == content


def _java_store(merged: bytes) -> bytes:
    """The bundle as PKCS #12, marked as Java wants roots to be; names tell the certificates apart."""
    found = {certificate.fingerprint(hashes.SHA256()): certificate for certificate in _certificates(merged)}
    entries = [PKCS12Certificate(certificate, digest.hex().encode()) for digest, certificate in found.items()]
    return serialize_java_truststore(entries, serialization.BestAvailableEncryption(_JAVA_STORE.encode()))


def _certificates(bundle: bytes) -> Iterator[x509.Certificate]:
    with warnings.catch_warnings(action="ignore"):  # some old roots bend RFC 5280, and every client takes them
        for block in _BLOCK.findall(bundle):
            with contextlib.suppress(ValueError):
                yield x509.load_pem_x509_certificate(block)
