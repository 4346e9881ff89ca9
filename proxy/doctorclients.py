"""The clients a sandbox may have, each really run against a host that cannot exist. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from proxy.doctorways import HOST, Check

URL = f"https://{HOST}"
PATIENCE = 60.0  # seconds; npm and java are slow to start
_ANSWERED = re.compile(r"sallyport-decision|\b40[13]\b|\b502\b|E403|Forbidden")
_UNPROVED = re.compile(r"\b407\b|Proxy Authentication Required", re.IGNORECASE)
_UNTRUSTED = re.compile(
    r"certificate|self.signed|SSL routines|PKIX|x509|unable to get local issuer|CERT_|tls.*(unknown ca|verify)",
    re.IGNORECASE,
)
_PYTHON = f"""
import urllib.request, urllib.error
try:
    urllib.request.urlopen("{URL}/", timeout=20)
except urllib.error.HTTPError as error:
    print(error.code, error.headers)
"""
_NODE = f"""
fetch("{URL}/").then(a => console.log(a.status, a.headers.get("sallyport-decision")), e => console.log(e.cause || e))
"""
_JAVA = f"""
import java.net.*;
class Doctor {{
    public static void main(String[] words) throws Exception {{
        var connection = (HttpURLConnection) new URL("{URL}/").openConnection();
        System.out.println(connection.getResponseCode() + " " + connection.getHeaderField("sallyport-decision"));
    }}
}}
"""
_APT = ("Dir::Etc::sourceparts=-", "Dir::Etc::sourcelist={folder}/sources.list", "Dir::State={folder}")
_APT_MORE = ("Dir::Cache={folder}", "APT::Sandbox::User=", "Acquire::Retries=0", "Acquire::AllowInsecureRepositories=1")


@dataclass(frozen=True, slots=True)
class Client:
    """How one is run, with `{folder}` for an empty one; what its user does where it ignores the proxy or the CA."""

    name: str
    words: Sequence[str]
    proxy: str
    ca: str
    files: Mapping[str, str] | None = None
    variables: Mapping[str, str] | None = None
    untried: str = ""  # what it says where it cannot be tried


_ENV = "as `sallyport agent env` prints it"
_UNAWARE = "run it by `sallyport exec` or behind a transparent listener"
_VARIABLES = f"HTTPS_PROXY {_ENV}"
CLIENTS = (
    Client("curl", ("curl", "-sS", "-m", "20", "-D", "-", f"{URL}/"), _VARIABLES, f"CURL_CA_BUNDLE {_ENV}"),
    Client("wget", ("wget", "-S", "-O", "-", "-t", "1", f"{URL}/"), _VARIABLES, f"WGETRC {_ENV}"),
    Client(
        *("git", ("git", "ls-remote", f"{URL}/x"), _VARIABLES, f"GIT_SSL_CAINFO {_ENV}"),
        variables={"GIT_TERMINAL_PROMPT": "0"},
    ),
    Client("python", ("python3", "-c", _PYTHON), _VARIABLES, f"SSL_CERT_FILE {_ENV}"),
    Client(
        "pip",
        (
            *("python3", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--retries", "0"),
            *("--disable-pip-version-check", "-d", "{folder}", f"{URL}/doctor-1-py3-none-any.whl"),
        ),
        *(_VARIABLES, f"PIP_CERT {_ENV}"),
        untried="No module named pip",
    ),
    Client(
        "node", ("node", "-e", _NODE), f"NODE_USE_ENV_PROXY=1 with node 24; {_UNAWARE}", f"NODE_EXTRA_CA_CERTS {_ENV}"
    ),
    Client(
        "npm",
        ("npm", "view", "sallyport-doctor", "--registry", f"{URL}/", "--fetch-retries=0", "--cache={folder}"),
        *(_VARIABLES, f"npm_config_cafile {_ENV}"),
    ),
    Client(
        "java",
        ("java", "Doctor.java"),
        f"JAVA_TOOL_OPTIONS {_ENV}; it sends no token, so {_UNAWARE}",
        f"JAVA_TOOL_OPTIONS with a trust store, {_ENV}",
        files={"Doctor.java": _JAVA},
        untried="jdk.compiler",
    ),
    Client(
        "go",
        ("go", "list", "-m", "sallyport.invalid/doctor@latest"),
        *(_VARIABLES, f"SSL_CERT_FILE {_ENV}"),
        files={"go.mod": "module doctor\n"},
        variables={"GOPROXY": URL, "GO111MODULE": "on", "GOFLAGS": "", "GONOSUMDB": "*", "GOPATH": "{folder}/go"},
    ),
    Client(
        "cargo",
        ("cargo", "search", "--index", f"{URL}/index", "doctor"),
        *(_VARIABLES, f"CARGO_HTTP_CAINFO {_ENV}"),
        variables={"CARGO_NET_RETRY": "0"},
        untried="rustup",
    ),
    Client(
        "apt",
        ("apt-get", *(word for option in (*_APT, *_APT_MORE) for word in ("-o", option)), "update"),
        *(_VARIABLES, f"APT_CONFIG {_ENV}"),
        files={"sources.list": f"deb {URL}/ stable main\n", "lists/partial/.keep": "", "archives/partial/.keep": ""},
    ),
)


def try_clients(environment: Mapping[str, str], clients: Sequence[Client] = CLIENTS) -> list[Check]:
    """What becomes of each that is installed."""
    there = [client for client in clients if shutil.which(client.words[0], path=environment.get("PATH"))]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda client: judge(client, _run(client, environment)), there))


def judge(client: Client, said: str) -> Check:
    """What its words mean; the host cannot exist, so an answer is the proxy's."""
    if client.untried and client.untried in said:
        return Check(client.name, None, "cannot be tried here")
    if _UNPROVED.search(said):
        return Check(client.name, False, "proxy yes, token no (407)", f"HTTPS_PROXY with its token, {_ENV}; {_UNAWARE}")
    if _ANSWERED.search(said):
        return Check(client.name, True, "proxy, CA and token")
    if _UNTRUSTED.search(said):
        return Check(client.name, False, "does not trust the CA", client.ca)
    return Check(client.name, False, f"does not reach the proxy: {_gist(said)}", client.proxy)


def _gist(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["silence"]
    telling = (line for line in lines if re.search(r"error|exception|could not|unable|fail", line, re.IGNORECASE))
    return next(telling, lines[-1])[:100]


def _run(client: Client, environment: Mapping[str, str]) -> str:
    with tempfile.TemporaryDirectory(prefix="doctor") as name:
        folder = Path(name)
        for path, text in (client.files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        own = {key: value.replace("{folder}", name) for key, value in (client.variables or {}).items()}
        try:
            result = subprocess.run(
                [word.replace("{folder}", name) for word in client.words],
                cwd=folder,
                env={**environment, **own, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "no answer in a minute"
        except OSError as error:
            return os.strerror(error.errno or 0)
        return result.stdout.decode("utf-8", "replace")
