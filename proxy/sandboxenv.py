"""What a sandbox must export so that its clients use the proxy and trust its CA. Renders text; runs nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import certifi

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
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_LOOPBACK = "localhost,127.0.0.1,::1"


def variables(agent: str, token: str, proxy: str, bundle: str, wgetrc: str = "") -> dict[str, str]:
    """The variables for `agent`; `proxy` is host:port, `bundle` the path of the merged CA file in the sandbox.

    `wgetrc` is the path of a file that names the bundle to wget, which has no variable for it.
    """
    url = f"http://{agent}:{token}@{proxy}"
    return (
        dict.fromkeys(_PROXY_VARIABLES, url)
        | {"NO_PROXY": _LOOPBACK, "no_proxy": _LOOPBACK, "NODE_USE_ENV_PROXY": "1"}
        | dict.fromkeys(CA_VARIABLES, bundle)
        | ({"WGETRC": wgetrc} if wgetrc else {})
    )


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


def write_bundle(folder: Path, own: bytes) -> tuple[Path, Path]:
    """The merged bundle as a file beside the CA, and a wgetrc that names it.

    Raises UserError.
    """
    bundle, wgetrc = folder / "ca-bundle.pem", folder / "wgetrc"
    for path, content in ((bundle, ca_bundle(own)), (wgetrc, f"ca_certificate = {bundle}\n".encode())):
        try:
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make the certs folder writable") from None
    return bundle, wgetrc
