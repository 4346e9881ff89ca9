"""What a sandbox exports survives each format, and every client finds the proxy and its CA."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from proxy.ca import load_pair
from proxy.problem import UserError
from proxy.sandboxenv import CA_VARIABLES, FORMATS, Bundle, ca_bundle, refresh_bundle, variables, write_bundle

ODD = "/a b/c'd$HOME`x`/ca.pem"
VALUES = variables("coder-1", "slp_x", "127.0.0.1:8080", Bundle(ODD, "/w", "/apt", "/a b/java"))


def test_every_known_client_is_told_of_the_proxy() -> None:
    url = "http://coder-1:slp_x@127.0.0.1:8080"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        assert VALUES[name] == url
    assert VALUES["NO_PROXY"] == VALUES["no_proxy"] == "localhost,127.0.0.1,::1"
    assert VALUES["NODE_USE_ENV_PROXY"] == "1"


def test_every_known_client_is_told_of_the_bundle() -> None:
    assert {VALUES[name] for name in CA_VARIABLES} == {ODD}
    known = {
        "SSL_CERT_FILE",
        "CURL_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "NODE_EXTRA_CA_CERTS",
        "GIT_SSL_CAINFO",
        "AWS_CA_BUNDLE",
    }
    assert known <= set(CA_VARIABLES)
    assert (VALUES["WGETRC"], VALUES["APT_CONFIG"]) == ("/w", "/apt")
    assert {"WGETRC", "APT_CONFIG"}.isdisjoint(variables("a", "t", "p:1", Bundle("/b")))


def test_java_is_told_of_the_proxy_and_the_store_and_of_no_token() -> None:
    """It heeds -D options alone, and splits them at blanks that are not quoted."""
    options = shlex.split(VALUES["JAVA_TOOL_OPTIONS"])
    assert {"-Dhttps.proxyHost=127.0.0.1", "-Dhttps.proxyPort=8080", "-Dhttp.proxyHost=127.0.0.1"} <= set(options)
    assert "-Djavax.net.ssl.trustStore=/a b/java" in options
    assert "slp_x" not in VALUES["JAVA_TOOL_OPTIONS"]
    assert "trustStore" not in variables("a", "t", "p:1", Bundle("/b"))["JAVA_TOOL_OPTIONS"]


def test_a_shell_reads_back_what_was_written() -> None:
    script = FORMATS["sh"](VALUES) + "\nenv -0"
    output = subprocess.run(["/bin/sh", "-c", script], env={}, capture_output=True, check=True, text=True).stdout
    assert dict(line.split("=", 1) for line in output.split("\0") if line).items() >= VALUES.items()


def test_docker_reads_back_what_was_written() -> None:
    """--env-file takes each line as it is."""
    assert dict(line.split("=", 1) for line in FORMATS["docker"](VALUES).splitlines()) == VALUES


def test_kubernetes_reads_back_what_was_written() -> None:
    entries = yaml.safe_load(FORMATS["k8s"](VALUES))
    assert {entry["name"]: entry["value"] for entry in entries} == VALUES


def test_dotenv_quotes_every_value() -> None:
    plain = variables("coder-1", "slp_x", "127.0.0.1:8080", Bundle("/a b/$c.pem"))
    lines = [re.fullmatch(r"(\w+)='([^']*)'", line) for line in FORMATS["dotenv"](plain).splitlines()]
    assert {match[1]: match[2] for match in lines if match} == plain


def certificates(bundle: bytes) -> set[bytes]:
    return set(re.findall(rb"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----\n", bundle, re.DOTALL))


def test_the_bundle_is_the_systems_roots_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_pair(tmp_path / "own").pem
    roots = load_pair(tmp_path / "roots").pem.rstrip()
    system = tmp_path / "system.pem"
    system.write_bytes(roots)
    monkeypatch.setattr("proxy.sandboxenv.SYSTEM_ROOTS", (tmp_path / "missing.pem", system))
    assert certificates(ca_bundle(own)) == certificates(own) | certificates(roots + b"\n")
    monkeypatch.setattr("proxy.sandboxenv.SYSTEM_ROOTS", ())
    assert len(certificates(ca_bundle(own))) > 50, "without a system's, Mozilla's"


def test_the_bundle_is_written_once(tmp_path: Path) -> None:
    own = load_pair(tmp_path).pem
    written = write_bundle(tmp_path, own)
    files = [Path(written.pem), Path(written.java)]
    assert files[0].read_bytes() == ca_bundle(own)
    assert written.pem in Path(written.wgetrc).read_text()
    assert f'Acquire::https::CAInfo "{written.pem}";' in Path(written.apt).read_text()
    for file in files:
        os.utime(file, (1, 1))
    write_bundle(tmp_path, own)
    assert [file.stat().st_mtime for file in files] == [1, 1]
    write_bundle(tmp_path, load_pair(tmp_path / "other").pem)
    assert all(file.stat().st_mtime > 1 for file in files)


@pytest.mark.slow
def test_java_reads_every_root_of_the_bundle(tmp_path: Path) -> None:
    """keytool prints a line for each certificate that Java takes for a root."""
    own = load_pair(tmp_path).pem
    written = write_bundle(tmp_path, own)
    command = ["keytool", "-list", "-keystore", written.java, "-storepass", "changeit"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert listed.count("trustedCertEntry") == len(certificates(ca_bundle(own)))


def test_only_a_bundle_that_is_there_is_written_anew(tmp_path: Path) -> None:
    own = load_pair(tmp_path / "other").pem
    refresh_bundle(tmp_path, own)
    assert not list(tmp_path.glob("ca-bundle*"))
    write_bundle(tmp_path, load_pair(tmp_path).pem)
    refresh_bundle(tmp_path, own)
    assert (tmp_path / "ca-bundle.pem").read_bytes() == ca_bundle(own)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("a file")
    with pytest.raises(UserError, match="make the certs folder writable"):
        write_bundle(tmp_path / "certs", b"")
