"""Every command as a newcomer types it: what it prints, how it ends, and what it says to wrong input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cryptography import x509

from proxy.cli import main
from tests.harness import ROOT

SECRET = "real-key-4f1e9b7c2d"
RULES = """version: 1
rules:
  - name: api
    match: {host: api.test, path: /v1/**}
    action: allow
    inject: [{credential: api, as: bearer}]
"""
TESTS = """version: 1
tests:
  - name: reads
    request: {agent: coder-1, method: GET, url: "https://api.test/v1/x"}
    expect: {verdict: allow, rule: api, inject: [api]}
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed, which is JSON and nothing else."""
        return json.loads(self.out)


class Shell:
    """Types commands in a folder; nothing but what `main` would print in a process of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Result:
        with self._monkeypatch.context() as patch:
            patch.chdir(self.folder)
            for name in [name for name in os.environ if name.startswith("SALLYPORT_")]:
                patch.delenv(name)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            try:
                status = main(words)
            except SystemExit as end:
                status = int(end.code or 0)
        out, err = self._capsys.readouterr()
        return Result(status, out, err)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "api.yaml").write_text(RULES)
    return Shell(tmp_path, monkeypatch, capsys)


# Agents


def test_the_life_of_an_agent(shell: Shell) -> None:
    added = shell("agent", "add", "coder-1", "--label", "team=payments", "--ttl", "8h", "--on-behalf-of", "alice")
    assert (added.status, re.fullmatch(r"slp_\w+\n", added.out) is not None) == (0, True)
    assert "sallyport agent env coder-1" in added.err
    again = shell("agent", "add", "coder-1")
    assert (again.status, again.out) == (1, "")
    assert "sallyport agent token coder-1" in again.err
    second = shell("agent", "add", "coder-2", "--json").json()
    assert set(second) == {"agent", "token", "expires"}
    assert second["expires"] is None
    listed = shell("agent", "list")
    assert listed.out.splitlines()[0].split() == ["AGENT", "STATE", "EXPIRES", "ON", "BEHALF", "OF", "LABELS"]
    assert "team=payments" in listed.out
    assert [agent["agent"] for agent in shell("agent", "list", "--json").json()] == ["coder-1", "coder-2"]
    shown = shell("agent", "show", "coder-1", "--json").json()
    assert (shown["labels"], shown["on_behalf_of"], shown["state"]) == ({"team": "payments"}, "alice", "active")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown["expires"])
    assert "payments" in shell("agent", "show", "coder-1").out
    token = shell("agent", "token", "coder-1").out
    assert token.startswith("slp_")
    assert token != added.out
    texts = [
        shell(*words).out for words in (("agent", "list"), ("agent", "list", "--json"), ("agent", "show", "coder-1"))
    ]
    assert [text for text in texts if "slp_" in text] == []
    assert shell("agent", "remove", "coder-1").status == 0
    assert shell("agent", "show", "coder-1").status == 1


def test_kill_and_revive_of_one_and_of_all(shell: Shell) -> None:
    for name in ("coder-1", "coder-2"):
        shell("agent", "add", name)

    def states() -> list[str]:
        return [agent["state"] for agent in shell("agent", "list", "--json").json()]

    killed = shell("agent", "kill", "coder-1", "--reason", "runs wild")
    assert (killed.status, "sallyport agent revive coder-1" in killed.err) == (0, True)
    assert states() == ["killed", "active"]
    assert shell("agent", "show", "coder-1", "--json").json()["kill_reason"] == "runs wild"
    assert shell("agent", "revive", "coder-1").status == 0
    assert states() == ["active", "active"]
    assert "revive --all" in shell("agent", "kill", "--all").err
    assert states() == ["killed", "killed"]
    shell("agent", "revive", "--all")
    assert states() == ["active", "active"]


def by_sh(text: str) -> dict[str, str]:
    command = f"{text}\n{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    result = subprocess.run(["sh", "-euc", command], env={}, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def by_dotenv(text: str) -> dict[str, str]:
    """Single quotes are literal to every reader of such files, sh among them."""
    return by_sh(f"set -a\n{text}")


def by_docker(text: str) -> dict[str, str]:
    """docker run --env-file: everything behind the first =, as it is."""
    return dict(line.split("=", 1) for line in text.splitlines())


def by_k8s(text: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in yaml.safe_load(text)}


@pytest.mark.parametrize(
    ("form", "read"), [("sh", by_sh), ("dotenv", by_dotenv), ("docker", by_docker), ("k8s", by_k8s)]
)
def test_agent_env_is_read_alike_in_every_format(shell: Shell, form: str, read: Any) -> None:
    """Also where the paths hold characters that mean something to a shell."""
    odd = 'cer ts$HOME"`#'
    token = shell("agent", "add", "coder-1").out.strip()
    expected = shell("agent", "env", "coder-1", "--json", "--certs", odd).json()
    text = shell("agent", "env", "coder-1", "--format", form, "--certs", odd).out
    found = read(text)
    assert {name: found.get(name) for name in expected} == expected
    assert expected["HTTPS_PROXY"] == f"http://coder-1:{token}@127.0.0.1:8080"
    assert Path(expected["SSL_CERT_FILE"]).read_bytes().count(b"BEGIN CERTIFICATE") > 1


def test_agent_env_takes_what_the_sandbox_sees(shell: Shell) -> None:
    """Inside a container the proxy has another address and the bundle another path."""
    shell("agent", "add", "coder-1")
    words = ("agent", "env", "coder-1", "--json", "--proxy", "sallyport:8080", "--ca", "/etc/ca.pem")
    values = shell(*words).json()
    assert values["https_proxy"].endswith("@sallyport:8080")
    assert values["CURL_CA_BUNDLE"] == "/etc/ca.pem"


# The vault


def test_the_life_of_a_credential(shell: Shell) -> None:
    grant = (
        "--host",
        "api.test",
        "--host",
        "*.api.test:8443",
        "--method",
        "GET",
        "--path",
        "/v1/**",
        "--agent",
        "coder-*",
    )
    put = shell("vault", "put", "api", *grant, "--expires", "2031-01-31", stdin=f"{SECRET}\n")
    assert (put.status, put.out) == (0, "")
    assert "newline" in put.err
    assert "sealed api version 1" in put.err
    shown = shell("vault", "show", "api", "--json").json()
    expected = {"credential": "api", "version": 1, "kind": "static", "hosts": ["api.test", "*.api.test:8443"]}
    expected |= {"methods": ["GET"], "paths": ["/v1/**"], "agents": ["coder-*"], "expires": "2031-01-31T00:00:00Z"}
    assert {name: shown[name] for name in expected} == expected
    assert shell("vault", "rotate", "api", "--json", stdin="another").json() == {"credential": "api", "version": 2}
    rotated = shell("vault", "show", "api", "--json").json()
    assert rotated["rotated"] is not None
    assert rotated["paths"] == ["/v1/**"]
    listed = shell("vault", "list")
    assert listed.out.splitlines()[1].split() == ["api", "2", "static", "api.test,", "*.api.test:8443"]
    assert [entry["credential"] for entry in shell("vault", "list", "--json").json()] == ["api"]
    assert shell("vault", "remove", "api").status == 0
    assert (shell("vault", "list").out, shell("vault", "list", "--json").json()) == ("", [])
    assert shell("vault", "put", "api", "--host", "api.test", "--json", stdin="x" * 8).json()["version"] == 4


@pytest.mark.parametrize("source", ["stdin", "env", "file"])
def test_a_secret_comes_from_anywhere_but_the_command_line(shell: Shell, source: str) -> None:
    """And is nowhere to be seen afterwards."""
    (shell.folder / "secret").write_text(SECRET)
    words = {"stdin": (), "env": ("--from-env", "THE_KEY"), "file": ("--from-file", "secret")}[source]
    result = shell("vault", "put", "api", "--host", "api.test", *words, stdin=SECRET, env={"THE_KEY": SECRET})
    assert result.status == 0
    (shell.folder / "secret").unlink()
    shown = [
        shell("vault", *words) for words in (("list",), ("list", "--json"), ("show", "api"), ("show", "api", "--json"))
    ]
    assert [text for one in (result, *shown) for text in (one.out, one.err) if SECRET in text] == []
    written = [path for path in shell.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == []


def test_a_placeholder_is_told_to_whoever_puts_it(shell: Shell) -> None:
    result = shell("vault", "put", "api", "--kind", "placeholder", "--host", "api.test", stdin=SECRET)
    assert "slp_placeholder_api" in result.err
    assert shell("vault", "show", "api", "--json").json()["placeholder"] == "slp_placeholder_api"


# The CA and the schemas


def test_the_ca_alone_and_with_the_systems_roots(shell: Shell) -> None:
    alone = shell("ca", "export").out
    assert alone == (shell.folder / "certs" / "ca.pem").read_text()
    assert stat.S_IMODE((shell.folder / "certs" / "ca.key").stat().st_mode) == 0o600
    bundle = shell("ca", "export", "--bundle").out
    assert bundle.count("-----BEGIN CERTIFICATE-----") > 50
    assert bundle.endswith(f"-----END CERTIFICATE-----\n{alone}")
    own = x509.load_pem_x509_certificate(alone.encode())
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_schema_of_rules_takes_the_starter_rules(shell: Shell) -> None:
    schema = shell("schema", "rules").json()
    jsonschema.validators.validator_for(schema).check_schema(schema)
    files = [path for path in (ROOT / "rules").glob("*.yaml") if not path.name.endswith(".test.yaml")]
    assert files
    for path in (*files, shell.folder / "rules" / "api.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(RULES.replace("match", "mtach")), schema)


def test_the_schema_of_settings_takes_what_the_proxy_takes(shell: Shell) -> None:
    schema = shell("schema", "settings").json()
    jsonschema.validators.validator_for(schema).check_schema(schema)
    settings = {
        "listen": ["127.0.0.1:8080", {"address": "127.0.0.1:8081", "agent": "coder-1"}],
        "store": "redis://127.0.0.1:6379",
        "identity": {"networks": {"10.1.2.0/24": "coder-1"}},
        "upstream": {"connect_to": {"api.test:443": "127.0.0.1:9443"}, "allow_addresses": ["10.0.0.0/8"]},
        "vault": {"lease": "60s"},
        "limits": {"buffer": "1MiB", "headers": 65536},
    }
    jsonschema.validate(settings, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"lisen": []}, schema)


# Check, test, explain


def test_check_tells_everything_at_once_and_nothing_else(shell: Shell) -> None:
    good = shell("check")
    assert (good.status, good.out, good.err) == (0, "1 rule from rules: no problems\n", "")
    (shell.folder / "rules" / "bad.yaml").write_text(RULES.replace("api", "b").replace("host", "hots"))
    (shell.folder / "rules" / "worse.yaml").write_text("version: 2\nrules: []\n")
    (shell.folder / "sallyport.yaml").write_text("lisen: []\n")
    bad = shell("check")
    assert (bad.status, bad.out) == (1, "")
    for part in ("sallyport.yaml:1:1: ", 'did you mean "listen"?'):
        assert part in bad.err
    (shell.folder / "sallyport.yaml").unlink()
    bad = shell("check")
    for part in ("rules/bad.yaml:4:13: ", 'did you mean "host"?', "rules/worse.yaml:1:10: "):
        assert part in bad.err
    only = shell("check", "rules/api.yaml")
    assert (only.status, only.err) == (0, "")


def test_check_warns_of_a_credential_that_is_not_there(shell: Shell) -> None:
    """With the command to type; it is no error."""
    shell("vault", "put", "other", "--host", "api.test", stdin=SECRET)
    result = shell("check")
    assert result.status == 0
    assert 'rules/api.yaml:6:14: warning: unknown credential "api"' in result.err


def test_test_runs_the_tests_beside_the_rules(shell: Shell) -> None:
    none = shell("test")
    assert (none.status, none.err.count("\n")) == (1, 1)
    (shell.folder / "rules" / "api.test.yaml").write_text(TESTS)
    assert shell("test").out == "1 passed, 0 failed\n"
    (shell.folder / "rules" / "api.test.yaml").write_text(TESTS.replace("allow, rule: api", "block, rule: api"))
    failed = shell("test")
    assert (failed.status, failed.out) == (1, "0 passed, 1 failed\n")
    assert "rules/api.test.yaml:3" in failed.err
    (shell.folder / "rules" / "api.test.yaml").write_text(TESTS.replace("expect", "expct"))
    assert shell("test").status == 1
    assert shell("check").status == 1


def test_explain_says_which_rule_and_why(shell: Shell) -> None:
    allowed = shell("explain", "--agent", "coder-1", "GET", "https://api.test/v1/x?key=in-the-query")
    assert allowed.status == 0
    for part in ("> allow", "api", "rules/api.yaml:3", "injects  api", "authorization"):
        assert part in allowed.out
    data = shell("explain", "--agent", "coder-1", "--json", "DELETE", "https://api.test/v2").json()
    assert (data["verdict"], data["reason"], data["rule"]) == ("block", "no_rule", None)
    assert data["steps"][0]["rules"][0]["missing"] == "path"
    assert not (shell.folder / ".sallyport").exists(), "it starts nothing"


# Settings


@pytest.mark.parametrize("words", [["--config", "my.yaml", "agent", "list"], ["agent", "list", "--config", "my.yaml"]])
def test_config_goes_before_and_after_the_verb(shell: Shell, words: list[str]) -> None:
    """Its relative paths are relative to it."""
    (shell.folder / "deep").mkdir()
    (shell.folder / "deep" / "my.yaml").write_text("state: here/\n")
    words = ["deep/my.yaml" if word == "my.yaml" else word for word in words]
    assert shell(*words).status == 0
    assert (shell.folder / "deep" / "here").is_dir()
    between = shell("agent", "--config", "deep/my.yaml", "list")
    assert between.status == 0


def test_a_variable_and_a_flag_overrule_the_file(shell: Shell) -> None:
    (shell.folder / "sallyport.yaml").write_text("state: from-file\n")
    shell("agent", "list", env={"SALLYPORT_STATE": "from-env"})
    shell("agent", "list", "--state", "from-flag", env={"SALLYPORT_STATE": "unused"})
    assert sorted(path.name for path in shell.folder.iterdir() if path.name.startswith("from-")) == [
        "from-env",
        "from-flag",
    ]
    assert not (shell.folder / "unused").exists()


# Wrong input: one line, what to do next, and never a traceback

WRONG = [
    ("agent add coder:1", 1, "letters, digits"),
    ("agent add ", 1, "letters, digits"),
    ("agent add -x", 2, "required: ID"),
    ("agent add x --ttl soon", 1, '"8h"'),
    ("agent add x --ttl 0s", 1, "8h"),
    ("agent add x --label novalue", 1, "key=value"),
    ("agent add x --label =value", 1, "key=value"),
    ("agent add x --on-behalf-of a\nb", 1, "control characters"),
    ("agent show nobody", 1, "`sallyport agent list`"),
    ("agent token nobody", 1, "`sallyport agent list`"),
    ("agent remove nobody", 1, "`sallyport agent list`"),
    ("agent kill nobody", 1, "`sallyport agent list`"),
    ("agent revive nobody", 1, "`sallyport agent list`"),
    ("agent env nobody", 1, "`sallyport agent list`"),
    ("agent env nobody --format xml", 2, "choose from"),
    ("agent kill", 1, "--all"),
    ("agent kill x --all", 1, "--all"),
    ("agent show *", 1, "no agent *"),
    ("vault put k", 1, "--host"),
    ("vault put k --host https://api.test", 1, "not a host"),
    ("vault put k --host API.test", 1, 'write "api.test"'),
    ("vault put k --host *", 1, '"*.example.com"'),
    ("vault put k --host api.test:99999", 1, "not a port"),
    ("vault put k --host ", 1, "not a host"),
    ("vault put k --host api.test --method G/T", 1, "not a method"),
    ("vault put k --host api.test --path v1", 1, 'write "/v1"'),
    ("vault put k --host api.test --agent a:b", 1, "not an agent"),
    ("vault put k --host api.test --expires whenever", 1, '"90d"'),
    ("vault put k --host api.test --kind baerer", 1, "did you mean 'bearer'"),
    ("vault put k --host api.test --field x", 1, "key=value"),
    ("vault put k --host api.test --field x=y", 1, "no field 'x'"),
    ("vault put k --host api.test --kind header --field name=a:b", 1, "characters a name cannot have"),
    ("vault put k --host api.test --from-env NOPE", 1, "no variable NOPE"),
    ("vault put k --host api.test --from-file nope", 1, "no such file"),
    ("vault put k --host api.test --from-file rules", 1, "is a directory"),
    ("vault put k --host api.test --from-env A --from-file b", 2, "not allowed with"),
    ("vault put k s3cret --host api.test", 2, "unrecognized"),
    ("vault put k --secret s3cret --host api.test", 2, "unrecognized"),
    ("vault put a/b --host api.test", 1, "letters, digits"),
    ("vault show nope", 1, "`sallyport vault list`"),
    ("vault rotate nope", 1, "`sallyport vault list`"),
    ("vault remove nope", 1, "`sallyport vault list`"),
    ("explain --agent a GET nope", 1, "https://"),
    ("explain --agent a GET https://", 1, "host and port"),
    ("explain --agent a GET https://api.test/%zz", 1, "broken escape"),
    ("explain --agent a G/T https://api.test/", 1, "not a token"),
    ("explain --agent a GET https://api.test/ -H nope", 1, '"Name: value"'),
    ("explain --agent a:b GET https://api.test/", 1, "letters, digits"),
    ("explain GET https://api.test/", 2, "--agent"),
    ("check nowhere", 1, "mkdir nowhere"),
    ("test nowhere", 1, "mkdir nowhere"),
    ("schema yaml", 2, "choose from"),
    ("ca", 2, "required"),
    ("", 2, "required"),
    ("fly", 2, "choose from"),
    ("agent list --nope", 2, "unrecognized"),
    ("agent list --config nowhere.yaml", 1, "check --config"),
    ("agent list --config rules", 1, "cannot be read"),
    ("agent list --store nope", 1, "redis://"),
    ("agent list --store redis://127.0.0.1:1", 1, "check that it runs"),
    ("agent list --state rules/api.yaml", 1, "set `state` to"),
    ("agent list --state /proc/x", 1, "set `state` to"),
    ("run --listen nope", 1, "host:port"),
    ("run --listen 127.0.0.1:99999", 1, "65535"),
    ("run --listen 192.0.2.1:8080 --admin 127.0.0.1:0", 1, "an address of this host"),
    ("run --listen 127.0.0.1:0 --admin nope.invalid:1", 1, "set admin: to"),
    ("run --listen 127.0.0.1:0 --admin 127.0.0.1:0 --certs /proc/x", 1, "point certs: at"),
    ("ca export --certs rules/api.yaml", 1, "point certs: at"),
]


@pytest.mark.parametrize(("line", "status", "told"), WRONG, ids=[line or "nothing" for line, *_ in WRONG])
def test_wrong_input_is_told_with_what_to_do_next(shell: Shell, line: str, status: int, told: str) -> None:
    """One line, or one and a hint; a usage error also shows the usage."""
    result = shell(*(line.split(" ") if line else ()), stdin=SECRET)
    assert (result.status, result.out) == (status, "")
    assert told in result.err
    assert SECRET not in result.err
    lines = [text for text in result.err.splitlines() if not text.startswith(("usage:", " "))]
    assert len(lines) == 1, result.err


CONFIGS = [
    ("lisen: []", ":1:1: ", 'did you mean "listen"?'),
    ("vault: {lease: soon}", ":1:16: ", '"60s"'),
    ("limits:\n  buffer: much\n", ":2:11: ", '"1MiB"'),
    ("state: [a\n", ":2:1: ", "close the list"),
    ("\tstate: x", ":1:1: ", "indent with spaces"),
    ("state: a\nstate: b\n", ":2:1: ", "on line 1 already"),
    ("identity: {jwt: {jwks: x}}", ":1:17: ", 'missing field "issuer"'),
    ("workers: many", ":1:10: ", "write 2, or auto"),
]


@pytest.mark.parametrize(("text", "place", "told"), CONFIGS, ids=[text for text, *_ in CONFIGS])
def test_a_wrong_setting_is_told_with_its_place(shell: Shell, text: str, place: str, told: str) -> None:
    (shell.folder / "sallyport.yaml").write_text(text)
    result = shell("agent", "list")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"sallyport.yaml{place}")
    assert told in result.err


def test_a_wrong_variable_is_told_by_its_name(shell: Shell) -> None:
    result = shell("agent", "list", env={"SALLYPORT_LISEN": "x"})
    assert result.status == 1
    assert "environment SALLYPORT_LISEN: unknown setting" in result.err
    assert 'did you mean "SALLYPORT_LISTEN"?' in result.err


# Folders and files that are not ours


@pytest.fixture
def somebody() -> int:
    """The id of another user; only root can give files to one."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file to somebody else")
    return 12345


def test_a_state_folder_of_another_user_is_not_used(shell: Shell, somebody: int) -> None:
    (shell.folder / ".sallyport").mkdir()
    os.chown(shell.folder / ".sallyport", somebody, somebody)
    for words in (("agent", "list"), ("run",)):
        result = shell(*words)
        assert (result.status, result.err.count("\n")) == (1, 1)
        assert "belongs to user 12345" in result.err


def test_a_certs_folder_of_another_user_is_not_used(shell: Shell, somebody: int) -> None:
    """Whoever owns the key can sign for every host."""
    shell("ca", "export")
    for path in (shell.folder / "certs").rglob("*"):
        os.chown(path, somebody, somebody)
    for words in (("ca", "export"), ("run", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")):
        result = shell(*words)
        assert (result.status, result.err.count("\n")) == (1, 1)
        assert "belongs to user 12345" in result.err
        assert "point certs: at" in result.err


@pytest.mark.parametrize("name", ["certs/ca.key", ".sallyport/master.key"])
def test_a_key_that_others_can_read_is_not_used(shell: Shell, name: str) -> None:
    shell("ca", "export")
    shell("agent", "add", "coder-1")
    (shell.folder / name).chmod(0o640)
    result = shell("run", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "chmod 600" in result.err


def test_a_lost_half_of_the_ca_is_told(shell: Shell) -> None:
    shell("ca", "export")
    (shell.folder / "certs" / "ca.pem").unlink()
    result = shell("ca", "export")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "ca.pem is missing" in result.err
    shutil.rmtree(shell.folder / "certs")
    assert shell("ca", "export").status == 0


# Processes of their own


def typed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "proxy", *words],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_module_is_the_command(shell: Shell) -> None:
    """`python -m proxy` and the installed script are the same."""
    assert re.fullmatch(r"sallyport \d+\.\d+\.\d+\n", typed(shell.folder, "--version").stdout)
    assert typed(shell.folder, "agent", "show", "nobody").returncode == 1


def test_output_cut_off_by_a_pipe_is_no_error(shell: Shell) -> None:
    command = f"{sys.executable} -P -m proxy ca export --bundle | head -1"
    result = subprocess.run(
        ["sh", "-c", command],
        cwd=shell.folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""


@pytest.mark.slow
def test_the_demo_tells_its_story(shell: Shell) -> None:
    """Offline, in under 20 s, leaving nothing behind."""
    result = typed(shell.folder, "demo")
    assert result.returncode == 0, result.stderr
    for part in ("THE AGENT SENT", "THE UPSTREAM SAW", "authorization: Bearer ", "(nothing)", "./sallyport run"):
        assert part in result.stdout
    assert sorted(path.name for path in shell.folder.iterdir()) == ["rules"]
