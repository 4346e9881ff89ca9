"""deploy/kubernetes: manifests that a cluster accepts, sandboxes that reach the proxy alone, tokens that name them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.address import is_public
from proxy.rulefile import load_policy
from proxy.settings import load_settings
from tests.harness import PATIENCE, ROOT, Proxy, Upstream, wait_for

FOLDER = ROOT / "deploy/kubernetes"
NO_MANIFESTS = {"kustomization.yaml", "sallyport.yaml", "sandbox.yaml"}
ISSUER = "https://kubernetes.default.svc.cluster.local"


def documents(name: str) -> list[dict[str, Any]]:
    """The objects in a file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object that is applied, and the sandbox."""
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name not in {"kustomization.yaml", "sallyport.yaml"}:
            yield from ((f"{path.name}:{each['kind']}", each) for each in documents(path.name))


def policies() -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["spec"] for each in documents("networkpolicy.yaml")}


KUSTOMIZATION = documents("kustomization.yaml")[0]
SETTINGS = documents("sallyport.yaml")[0]
POD = next(each for each in documents("sandbox.yaml") if each["kind"] == "Pod")
DEPLOYMENT = documents("deployment.yaml")[0]
PODS = {"sandbox": POD["spec"]} | {
    each["metadata"]["name"]: each["spec"]["template"]["spec"]
    for _, each in objects()
    if "template" in each.get("spec", {})
}


def test_every_manifest_is_listed_and_everything_listed_is_there() -> None:
    there = {path.name for path in FOLDER.glob("*.yaml")} - NO_MANIFESTS
    assert set(KUSTOMIZATION["resources"]) == there
    made = {"jwks.json", *(f"secret/{name}" for name in ("ca.pem", "ca.key", "master.key", "store", "password"))}
    files = {
        file
        for each in KUSTOMIZATION["configMapGenerator"] + KUSTOMIZATION["secretGenerator"]
        for file in each["files"]
    }
    assert {file for file in files if not (FOLDER / file).exists()} <= made
    assert {f"rules/{path.name}" for path in (FOLDER / "rules").iterdir()} == {
        file for file in files if "rules/" in file
    }
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/kubernetes/secret*/", "/deploy/kubernetes/jwks.json"} <= set(ignored)


def test_what_sandboxes_may_mount_holds_no_secret() -> None:
    maps = {each["name"]: each for each in KUSTOMIZATION["configMapGenerator"]}
    assert [name for name, each in maps.items() if each["namespace"] == "sandboxes"] == ["sallyport-ca"]
    assert maps["sallyport-ca"]["files"] == ["secret/ca.pem"]
    assert {file for each in maps.values() for file in each["files"] if "secret/" in file} == {"secret/ca.pem"}
    assert {each["namespace"] for each in KUSTOMIZATION["secretGenerator"]} == {"sallyport"}


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_restricted(name: str) -> None:
    """As the Pod Security Standard `restricted` wants it; and none speaks to the API server or inherits addresses."""
    pod = PODS[name]
    assert set(PODS) == {"sandbox", "sallyport", "valkey"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


def test_a_sandbox_reaches_the_proxy_and_nothing_else() -> None:
    """Not DNS either: names carry data out."""
    spec = policies()["only-the-proxy"]
    assert (spec["podSelector"], spec["policyTypes"], "ingress" in spec) == ({}, ["Ingress", "Egress"], False)
    (rule,) = spec["egress"]
    (to,) = rule["to"]
    assert to["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "sallyport"}
    assert to["podSelector"]["matchLabels"] == DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert rule["ports"] == [{"port": 8080, "protocol": "TCP"}]
    assert SETTINGS["listen"] == ["0.0.0.0:8080"]
    assert POD["metadata"]["namespace"] == "sandboxes"


def test_sandboxes_do_not_reach_the_admin_endpoint() -> None:
    reached = {
        port["port"]: [each["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for each in rule["from"]]
        for rule in policies()["sallyport"]["ingress"]
        for port in rule["ports"]
    }
    assert reached == {8080: ["sandboxes"], 9090: ["monitoring"]}
    assert SETTINGS["admin"] == "0.0.0.0:9090"


def blocks() -> list[dict[str, Any]]:
    return [to["ipBlock"] for rule in policies()["sallyport"]["egress"] for to in rule["to"] if "ipBlock" in to]


def allowed(address: str) -> bool:
    """Whether the proxy's pods may send there."""
    ip = ip_address(address)
    return any(
        ip in ip_network(block["cidr"]) and not any(ip in ip_network(each) for each in block["except"])
        for block in blocks()
    )


def test_the_proxy_reaches_no_private_address() -> None:
    """Whatever Sallyport itself would refuse to dial; a second look in the network."""
    private = ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "127.0.0.1"]
    metadata = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fe80::1", "::1"]
    assert [
        address for address in private + metadata + ["224.0.0.1", "255.255.255.255", "0.0.0.0"] if allowed(address)
    ] == []
    assert not [address for address in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1") if allowed(address)]
    assert allowed("1.1.1.1")
    assert allowed("2606:4700:4700::1111")


def test_what_the_network_keeps_from_the_proxy_is_what_it_would_not_dial() -> None:
    for block in blocks():
        for text in block["except"]:
            network = ip_network(text)
            assert not is_public(network[0]), text
            assert not is_public(network[-1]), text


def test_the_store_is_reached_by_the_proxy_only() -> None:
    spec = policies()["valkey"]
    (rule,) = spec["ingress"]
    assert [each["podSelector"]["matchLabels"] for each in rule["from"]] == [{"app.kubernetes.io/name": "sallyport"}]
    assert "egress" not in spec
    assert policies()["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_services_budget_scaling_and_monitoring_find_the_pods() -> None:
    deployment = DEPLOYMENT
    labels, pod = deployment["spec"]["template"]["metadata"]["labels"], deployment["spec"]["template"]["spec"]
    named = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    service, admin = documents("service.yaml")
    assert service["spec"]["selector"] == admin["spec"]["selector"] == labels
    assert {port["targetPort"] for each in (service, admin) for port in each["spec"]["ports"]} == set(named)
    assert documents("poddisruptionbudget.yaml")[0]["spec"]["selector"]["matchLabels"] == labels
    assert (
        documents("horizontalpodautoscaler.yaml")[0]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    )
    assert "replicas" not in deployment["spec"]
    monitor = documents("servicemonitor.yaml")[0]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= admin["metadata"]["labels"].items()
    assert "labels" not in service["metadata"]  # one of the two is scraped
    assert monitor["endpoints"][0]["port"] == admin["spec"]["ports"][0]["name"]
    assert admin["metadata"]["labels"][monitor["jobLabel"]] == "sallyport"
    assert 'job="sallyport"' in (ROOT / "deploy/prometheus/alerts.yml").read_text()


def test_sallyport_accepts_the_settings_and_the_rules(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "sallyport.yaml", tmp_path)
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    settings = load_settings(tmp_path / "sallyport.yaml", {"SALLYPORT_STORE": "redis://:x@valkey:6379/0"}, {}, tmp_path)
    mounts = {mount["mountPath"] for mount in PODS["sallyport"]["containers"][0]["volumeMounts"]}
    assert {str(settings.rules), str(settings.state.parent), str(settings.certs.parent)} <= mounts
    path = FOLDER / "rules/sandboxes.yaml"
    _, problems = load_policy({str(path): path.read_bytes()})
    assert problems == []


def test_the_sandbox_shows_a_token_that_is_for_sallyport_only() -> None:
    (token,) = [each["serviceAccountToken"] for each in POD["spec"]["volumes"][0]["projected"]["sources"][:1]]
    assert token["audience"] == SETTINGS["identity"]["jwt"]["audience"]
    assert POD["spec"]["activeDeadlineSeconds"] < token["expirationSeconds"]
    account = POD["spec"]["serviceAccountName"]
    subject = f"system:serviceaccount:{POD['metadata']['namespace']}:{account}"
    assert SETTINGS["identity"]["jwt"]["agent"].replace("{agent}", account) == subject


# With the real tools


def sallyport(folder: Path) -> Path:
    """The command, as `init` calls it."""
    path = folder / "sallyport"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m proxy "$@"\n')
    path.chmod(0o755)
    return path


def validated(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.slow
def test_what_init_and_kustomize_make_is_what_kubernetes_takes(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    assert kubectl, "kubectl is missing: run scripts/test as root, or apt-get install kubernetes-client"
    folder = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("secret*", "jwks.json"))
    init = [folder / "init"]
    subprocess.run(init, env={**os.environ, "SALLYPORT": str(sallyport(tmp_path))}, check=True, capture_output=True)
    assert {path.stat().st_mode & 0o077 for path in (folder / "secret").iterdir() if path.name != "ca.pem"} == {0}
    key = (folder / "secret/master.key").read_text()
    subprocess.run(init, check=True, capture_output=True)
    assert (folder / "secret/master.key").read_text() == key
    (folder / "jwks.json").write_text('{"keys": []}')
    made = tmp_path / "made.yaml"
    made.write_text(subprocess.run([kubectl, "kustomize", folder], check=True, capture_output=True, text=True).stdout)
    done = validated(made)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert len(re.findall("passed for resource", output)) == 19
    assert re.findall("Couldn't find schema for kind (.*?) ", output) == ["ServiceMonitor"]
    made.write_text(made.read_text().replace("minAvailable", "minimumAvailable"))
    assert validated(made).returncode != 0
    assert validated(FOLDER / "sandbox.yaml").returncode == 0


@pytest.fixture
def signing_key() -> rsa.RSAPrivateKey:
    """The cluster's, for service accounts."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def service_account_token(key: rsa.RSAPrivateKey, namespace: str, name: str, audience: str = "sallyport") -> str:
    """What the kubelet puts into the projected volume."""
    now = int(time.time())
    claims = {
        "aud": [audience],
        "exp": now + 28800,
        "iat": now,
        "iss": ISSUER,
        "jti": "6b4cbe57-a4b4-4bf2-8a31-6a6e1f1a7a3b",
        "kubernetes.io": {
            "namespace": namespace,
            "pod": {"name": name, "uid": "0a0d8b0a-55f9-4e0b-9d4b-0a3f5e0f1c11"},
            "serviceaccount": {"name": name, "uid": "7a8f3e8e-8a0b-4b0c-b6a5-3c2f0e5d4b3a"},
        },
        "nbf": now,
        "sub": f"system:serviceaccount:{namespace}:{name}",
    }
    return jwt.encode(claims, key, "RS256", headers={"kid": "cluster-1"})


@pytest.mark.slow
def test_a_sandbox_is_known_by_its_service_account(
    make_proxy: Callable[..., Proxy], signing_key: rsa.RSAPrivateKey, upstream: Upstream, tmp_path: Path, lane: str
) -> None:
    """The settings of deploy/kubernetes, the command of sandbox.yaml, the token of a cluster, a real curl."""
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(signing_key.public_key()))
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps({"keys": [{**public, "kid": "cluster-1", "use": "sig", "alg": "RS256"}]}))
    identity = {**SETTINGS["identity"], "jwt": {**SETTINGS["identity"]["jwt"], "jwks": str(jwks)}}
    rules = (FOLDER / "rules/sandboxes.yaml").read_text().replace("example.com", "api.test")
    proxy = make_proxy(rules, lane=lane, identity=identity)
    proxy.cli("agent", "add", "coder-1")
    (container,) = POD["spec"]["containers"]
    script, *words = container["args"]

    def start(token: str) -> str:
        (tmp_path / "token").write_text(token)
        command = [*container["command"], script.replace("/run/sallyport", str(tmp_path)), *words[:-1]]
        environment = {
            "PATH": os.environ["PATH"],
            "PROXY_ADDRESS": f"{proxy.address[0]}:{proxy.address[1]}",
            "CURL_CA_BUNDLE": str(proxy.folder / "certs/ca.pem"),
        }
        url, status = "https://api.test/v1", "%{http_code} %{http_connect}"
        done = subprocess.run(
            [*command, "-o", "/dev/null", "-w", status, url],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.stdout

    wait_for(lambda: start(service_account_token(signing_key, "sandboxes", "coder-1")) == "200 200")  # once it is known
    assert proxy.audit(host="api.test", verdict="allow")[-1]["identity"] == ["jwt"]
    seen = len(upstream.seen)
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for token in (
        service_account_token(signing_key, "default", "coder-1"),
        service_account_token(signing_key, "sandboxes", "coder-2"),  # nobody registered it
        service_account_token(signing_key, "sandboxes", "coder-1", "https://kubernetes.default.svc"),
        service_account_token(stranger, "sandboxes", "coder-1"),
    ):
        assert start(token) == "000 407"
    assert len(upstream.seen) == seen == 1
