"""docker-compose.yml: a sandbox whose only way out is the proxy, and no container with more than it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.settings import load_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def network(name: str) -> Any:
    return ip_network(COMPOSE["networks"][name]["ipam"]["config"][0]["subnet"])


def image_environment() -> dict[str, str]:
    """What `ENV` in the Dockerfile sets for Sallyport."""
    return dict(re.findall(r"(SALLYPORT_\w+)=(\S+)", DOCKERFILE))


@pytest.mark.slow
def test_compose_file_follows_the_compose_specification() -> None:
    schema = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    command = [sys.executable, *schema, str(ROOT / "docker-compose.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_agent_is_on_the_sandbox_network_only() -> None:
    assert SERVICES["agent"]["networks"] == ["sandbox"]
    assert COMPOSE["networks"]["sandbox"]["internal"] is True
    assert [name for name, service in SERVICES.items() if "sandbox" in service["networks"]] == ["proxy", "agent"]


def test_the_agent_reaches_no_address_of_the_host() -> None:
    """An internal network still has the host on its bridge, unless that is isolated too."""
    options = COMPOSE["networks"]["sandbox"]["driver_opts"]
    assert options["com.docker.network.bridge.gateway_mode_ipv4"] == "isolated"
    assert "ports" not in SERVICES["agent"]


def test_the_agent_holds_no_secret() -> None:
    agent = SERVICES["agent"]
    assert agent["volumes"] == ["public:/run/sallyport:ro"]
    assert not [name for name in agent["environment"] if name.startswith("SALLYPORT_")]
    assert "${" not in str(agent)


def test_the_proxy_listens_for_agents_on_their_network_and_shows_admin_on_another() -> None:
    """Otherwise a sandbox could read the metrics, or the monitoring network could speak as the agent."""
    addresses = {name: at.get("ipv4_address") for name, at in SERVICES["proxy"]["networks"].items()}
    environment = SERVICES["proxy"]["environment"]
    assert environment["SALLYPORT_LISTEN"] == f"{addresses['sandbox']}:8080"
    assert environment["SALLYPORT_ADMIN"] == f"{addresses['monitoring']}:9090"
    assert ip_address(addresses["sandbox"]) in network("sandbox")
    assert ip_address(addresses["monitoring"]) in network("monitoring")
    assert SERVICES["agent"]["environment"]["https_proxy"] == f"http://{environment['SALLYPORT_LISTEN']}"


def test_sallyport_accepts_the_settings_of_the_image_and_of_compose(tmp_path: Path) -> None:
    image = image_environment()
    assert load_settings(None, image, {}, tmp_path).state == Path(image["SALLYPORT_STATE"])
    environment = {name: re.sub(r"\$\{.*?\}", "0f", text) for name, text in SERVICES["proxy"]["environment"].items()}
    settings = load_settings(None, image | environment, {}, tmp_path)
    assert settings.identity.networks == {network("sandbox"): "sample"}


def test_only_the_proxy_and_grafana_have_a_way_out() -> None:
    """Grafana's is the port it publishes, on the host's loopback."""
    open_networks = {name for name, made in COMPOSE["networks"].items() if not made.get("internal")}
    assert open_networks == {"egress", "console"}
    reaches = {name for name, service in SERVICES.items() if open_networks & set(service["networks"])}
    assert reaches == {"proxy", "grafana"}
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:3000:3000"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_read_only_and_without_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_passwords_come_from_outside_and_never_as_arguments() -> None:
    """Every process of the host can read the arguments of every other."""
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == {"VALKEY_PASSWORD", "GRAFANA_PASSWORD"}
    assert set(re.findall(r"\$\{\w+(.*?)\}", TEXT)) == {":?run ./deploy/init first"}
    assert not any("${" in str(service.get(key)) for service in SERVICES.values() for key in ("command", "entrypoint"))


def test_init_writes_passwords_that_only_the_owner_reads_and_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy/init"
    script.write_bytes((ROOT / "deploy/init").read_bytes())
    subprocess.run(["sh", script], check=True, capture_output=True)
    made = tmp_path / ".env"
    first = made.read_text()
    assert made.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"VALKEY_PASSWORD=[0-9a-f]{48}\nGRAFANA_PASSWORD=[0-9a-f]{48}\n", first)
    subprocess.run(["sh", script], check=True, capture_output=True)
    assert made.read_text() == first
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_everything_that_is_mounted_or_copied_is_there() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", ())]
    sources = {mount.split(":")[0] for mount in mounts}
    assert {source for source in sources if source.startswith("./") and not (ROOT / source).exists()} == set()
    assert {source for source in sources if not source.startswith("./")} == set(COMPOSE["volumes"])
    for source in re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists(), source
        assert f"!{source.rstrip('/')}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_image_runs_as_nobody_and_checks_its_health() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["65532:65532"]
    assert "HEALTHCHECK" in DOCKERFILE
    assert "--require-hashes" in DOCKERFILE
