"""The settings: defaults, which source wins, and the words and places of what is wrong."""

from __future__ import annotations

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from proxy.address import Host
from proxy.cpus import usable_cpus
from proxy.problem import Problems
from proxy.settings import Settings, load_settings, settings_schema
from proxy.settingvalue import Endpoint, Listener, StoreUrl


def _load(
    tmp_path: Path, text: str | None = None, env: dict[str, str] | None = None, flags: dict[str, object] | None = None
) -> Settings:
    if text is not None:
        (tmp_path / "sallyport.yaml").write_text(text)
    return load_settings(None, env or {}, flags or {}, tmp_path)


def _problems(tmp_path: Path, *args: Any) -> list[str]:
    with pytest.raises(Problems) as caught:
        _load(tmp_path, *args)
    return [str(problem).replace(str(tmp_path), "TMP") for problem in caught.value.problems]


def _endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(Host.parse(host), port)


_DEFAULTS: list[tuple[str, Any]] = [
    ("listen", (Listener("127.0.0.1:8080", "127.0.0.1", 8080),)),
    ("admin", _endpoint("127.0.0.1", 9090)),
    ("workers", 1),
    ("lane", "fast"),
    ("identity.token", True),
    ("identity.networks", {}),
    ("identity.jwt", None),
    ("identity.mtls", None),
    ("upstream.trust", ()),
    ("upstream.connect_to", {}),
    ("upstream.nameservers", ()),
    ("upstream.allow_addresses", ()),
    ("upstream.via", None),
    ("store", StoreUrl("embedded")),
    ("vault.lease", 60.0),
    ("audit.stdout", False),
    ("limits.buffer", 1024 * 1024),
    ("limits.headers", 64 * 1024),
    ("limits.connections_per_agent", 256),
    ("limits.unidentified_per_source", 512),
    ("limits.new_hosts_per_agent", (1200, 60.0)),
    ("limits.idle", 300.0),
]


def _get(settings: object, name: str) -> object:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize(("name", "value"), _DEFAULTS)
def test_a_setting_has_its_default(tmp_path: Path, name: str, value: object) -> None:
    """Without a file, a variable or a flag, the settings are the documented ones."""
    got = _get(_load(tmp_path), name)
    assert (got, type(got)) == (value, type(value))


def test_default_paths_are_in_the_working_directory(tmp_path: Path) -> None:
    """Without a file, relative means relative to where the command runs."""
    settings = _load(tmp_path)
    assert (settings.rules, settings.certs, settings.state, settings.audit.file) == (
        tmp_path / "rules",
        tmp_path / "certs",
        tmp_path / ".sallyport",
        tmp_path / ".sallyport/audit.jsonl",
    )


_EVERY = """\
listen: ["0.0.0.0:0", {address: "[::1]:8081", agent: coder-1}, "localhost:8082"]
admin: "[::1]:0"
rules: r
certs: /c
state: s
store: rediss://user:hunter2@db:6380/1
workers: 1
identity: {token: false, networks: {"10.1.2.0/24": coder-1, "10.1.2.3": coder-2, "fc00::/7": c}}
upstream:
  trust: [ca.pem]
  connect_to: {"API.example.test:443": "127.0.0.1:9443", "[::1]:443": "[::1]:1"}
  nameservers: ["127.0.0.1:5353", "[::1]:53"]
  allow_addresses: [10.0.0.0/8]
lane: mitmproxy
vault: {lease: 500ms}
audit: {file: "log/{state}.jsonl", stdout: true}
limits:
  {buffer: 10MB, headers: 4096, connections_per_agent: 1, unidentified_per_source: 2,
   new_hosts_per_agent: 5/s, idle: 2d}
"""


def test_every_setting_is_read_from_the_file(tmp_path: Path) -> None:
    """Each becomes a value nobody has to parse again; paths are relative to the file."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ca.pem").touch()
    (tmp_path / "etc/s.yaml").write_text(_EVERY.replace("log/{state}.jsonl", "{state}/a.jsonl"))
    settings = load_settings(Path("etc/s.yaml"), {}, {}, tmp_path)
    assert settings.listen == (
        Listener("0.0.0.0:0", "0.0.0.0", 0),
        Listener("[::1]:8081", "::1", 8081, "coder-1"),
        Listener("localhost:8082", "localhost", 8082),
    )
    assert settings.admin == _endpoint("::1", 0)
    assert (settings.rules, settings.certs, settings.state) == (tmp_path / "etc/r", Path("/c"), tmp_path / "etc/s")
    assert settings.store.reveal() == "rediss://user:hunter2@db:6380/1"
    assert settings.identity.token is False
    assert settings.identity.networks == {
        ip_network("10.1.2.0/24"): "coder-1",
        ip_network("10.1.2.3/32"): "coder-2",
        ip_network("fc00::/7"): "c",
    }
    assert settings.upstream.trust == (tmp_path / "etc/ca.pem",)
    assert settings.upstream.connect_to == {
        (Host.parse("api.example.test"), 443): _endpoint("127.0.0.1", 9443),
        (Host.parse("::1"), 443): _endpoint("::1", 1),
    }
    assert settings.upstream.nameservers == (_endpoint("127.0.0.1", 5353), _endpoint("::1", 53))
    assert settings.upstream.allow_addresses == (ip_network("10.0.0.0/8"),)
    assert (settings.lane, settings.vault.lease) == ("mitmproxy", 0.5)
    assert (settings.audit.file, settings.audit.stdout) == (tmp_path / "etc/s/a.jsonl", True)
    assert settings.limits.model_dump() == {
        "buffer": 10_000_000,
        "headers": 4096,
        "connections_per_agent": 1,
        "unidentified_per_source": 2,
        "new_hosts_per_agent": (5, 1.0),
        "idle": 172_800.0,
    }


def test_defaults_are_in_the_folder_of_the_file(tmp_path: Path) -> None:
    """The same --config finds the same store from every working directory."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/s.yaml").touch()
    assert load_settings(Path("etc/s.yaml"), {}, {}, tmp_path).state == tmp_path / "etc/.sallyport"


def test_a_section_with_every_line_commented_out_is_the_default(tmp_path: Path) -> None:
    """`vault:` with nothing below it is no mistake."""
    assert _load(tmp_path, "vault:\n  # lease: 5s\nidentity:\n").vault.lease == 60.0


def test_flags_win_over_variables_over_the_file(tmp_path: Path) -> None:
    """The nearer to the operator's hand, the stronger."""
    text, env, flags = "vault: {lease: 1s}\n", {"SALLYPORT_VAULT__LEASE": "2s"}, {"vault.lease": "3s"}
    assert _load(tmp_path, text).vault.lease == 1.0
    assert _load(tmp_path, text, env).vault.lease == 2.0
    assert _load(tmp_path, text, env, dict(flags)).vault.lease == 3.0
    assert _load(tmp_path, text, env, {"vault.lease": None}).vault.lease == 2.0


def test_a_variable_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    """One setting of a section can be overridden without the others."""
    limits = _load(tmp_path, "limits: {idle: 1s, buffer: 5}", {"SALLYPORT_LIMITS__IDLE": "2s"}).limits
    assert (limits.idle, limits.buffer) == (2.0, 5)


@pytest.mark.parametrize(
    ("name", "text", "setting", "value"),
    [
        ("LISTEN", "127.0.0.1:1, [::1]:2", "listen", ("127.0.0.1:1", "[::1]:2")),
        ("LISTEN", "[::1]:2", "listen", ("[::1]:2",)),
        ("LISTEN", '["[::1]:2"]', "listen", ("[::1]:2",)),
        ("LISTEN", '{address: "127.0.0.1:1", agent: a},127.0.0.1:2', "listen", ("127.0.0.1:1", "127.0.0.1:2")),
        ("ADMIN", "[::1]:1", "admin", _endpoint("::1", 1)),
        ("RULES", "x: #y", "rules", "x: #y"),
        ("STATE", "/abs", "state", "/abs"),
        ("STORE", "redis://h", "store", StoreUrl("redis://h")),
        ("STORE", "", "store", StoreUrl("embedded")),
        ("WORKERS", "3", "workers", 3),
        ("LANE", "mitmproxy", "lane", "mitmproxy"),
        ("IDENTITY__TOKEN", "false", "identity.token", False),
        ("IDENTITY__NETWORKS", '{"10.0.0.0/8": a}', "identity.networks", {ip_network("10.0.0.0/8"): "a"}),
        (
            "UPSTREAM__ALLOW_ADDRESSES",
            "10.0.0.0/8,fc00::/7",
            "upstream.allow_addresses",
            (ip_network("10.0.0.0/8"), ip_network("fc00::/7")),
        ),
        ("UPSTREAM__VIA", "null", "upstream.via", None),
        ("AUDIT__FILE", "null", "audit.file", None),
        ("AUDIT__FILE", "{state}/x", "audit.file", ".sallyport/x"),
        ("AUDIT__STDOUT", "true", "audit.stdout", True),
        ("LIMITS__BUFFER", "2048", "limits.buffer", 2048),
        ("LIMITS__CONNECTIONS_PER_AGENT", "7", "limits.connections_per_agent", 7),
    ],
)
def test_a_variable_is_spelt_as_its_setting(tmp_path: Path, name: str, text: str, setting: str, value: object) -> None:
    """Text is taken as it is, a list may have commas, the rest is YAML; an empty variable is not set."""
    got = _get(_load(tmp_path, None, {f"SALLYPORT_{name}": text}), setting)
    if isinstance(got, tuple) and got and isinstance(got[0], Listener):
        got = tuple(listener.address for listener in got)
    assert got == (tmp_path / value if isinstance(got, Path) and isinstance(value, str) else value)


def test_flags_take_paths_and_lists(tmp_path: Path) -> None:
    """What a command-line parser gives is taken as it is; paths are relative to the working directory."""
    (tmp_path / "ca.pem").touch()
    flags: dict[str, object] = {"rules": Path("x"), "upstream.trust": [Path("ca.pem")], "listen": ("127.0.0.1:1",)}
    settings = _load(tmp_path, None, {}, flags)
    assert (settings.rules, settings.upstream.trust) == (tmp_path / "x", (tmp_path / "ca.pem",))
    assert settings.listen[0].port == 1


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    """SALLYPORT_CONFIG is used unless --config is."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"rules: {name}")
    env = {"SALLYPORT_CONFIG": "a.yaml"}
    assert load_settings(None, env, {}, tmp_path).rules == tmp_path / "a"
    assert load_settings(tmp_path / "b.yaml", env, {}, tmp_path).rules == tmp_path / "b"


@pytest.mark.parametrize(
    ("env", "config", "expected"),
    [
        ({}, Path("no.yaml"), "no.yaml: no such settings file\n    hint: check --config"),
        ({"SALLYPORT_CONFIG": "no.yaml"}, None, "no.yaml: no such settings file\n    hint: check SALLYPORT_CONFIG"),
        ({}, Path("."), ".: cannot be read: Is a directory"),
    ],
)
def test_a_named_file_must_be_there(tmp_path: Path, env: dict[str, str], config: Path | None, expected: str) -> None:
    """A file somebody asked for is not silently replaced by the defaults."""
    with pytest.raises(Problems) as caught:
        load_settings(config, env, {}, tmp_path)
    assert str(caught.value) == expected


def test_a_dangling_default_file_is_not_no_file(tmp_path: Path) -> None:
    """A link to a volume that is not mounted must not start the proxy with defaults."""
    (tmp_path / "sallyport.yaml").symlink_to(tmp_path / "gone.yaml")
    assert _problems(tmp_path) == ["sallyport.yaml: no such settings file"]


_PORT_HINT = "\n    hint: the port is a number from 0 to 65535"
_ENDPOINT_HINT = "\n    hint: the port is a number from 1 to 65535"
_LISTENER_HINT = '\n    hint: write {address: "127.0.0.1:8081", agent: coder-1}'
_STORES = "the store is embedded or a URL beginning with redis://, rediss://, redis+sentinel://, redis+cluster://"
_HOST_HINT = "\n    hint: write a host name or an IP address"
_WORKER_WORDS, _WORKER_HINT = "expected a number of workers from 1 to 256, or auto", "\n    hint: write 2, or auto"
_VIA = '\n    hint: write "http://user:password@proxy.example.com:3128"'
_VIA_ESCAPES = f'{_VIA}; percent-encode "/?#@%" in the password'
_STORE_HINT = "\n    hint: write embedded, or redis://:password@host:6379/0"
_STORE_WORDS = f'the store\'s URL is not well-formed{_STORE_HINT}; percent-encode "/?#@" in the password'
_DURATION_HINT = '\n    hint: write a number and a unit: "500ms", "60s", "5m", "8h"'
_SIZE_HINT = '\n    hint: write "64KiB", "1MiB", "10MB" or a number of bytes'
_ID = "use 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lsiten: []", '1:1: unknown field "lsiten"\n    hint: did you mean "listen"?'),
        ("vault:\n  laese: 5s", '2:3: unknown field "laese"\n    hint: did you mean "lease"?'),
        ("- a", "1:1: expected a mapping, got a list"),
        ("vault: 5", "1:8: expected a mapping, got a number"),
        ("listen: 127.0.0.1:1", "1:9: expected a list, got text\n    hint: write it in brackets: [...]"),
        ("listen: []", "1:9: must not be empty"),
        ("listen: [5]", "1:10: expected an address such as 127.0.0.1:8080, got a number"),
        ("listen: [localhost]", f'1:10: "localhost" is not host:port{_PORT_HINT}'),
        ("listen: [a:65536]", f'1:10: "a:65536" is not host:port{_PORT_HINT}'),
        ("listen: ['a:\u0661']", f'1:10: "a:\u0661" is not host:port{_PORT_HINT}'),
        (
            "listen: [':80']",
            '1:10: ":80" has no host\n    hint: write "127.0.0.1:80", or "0.0.0.0:80" for every interface',
        ),
        ("listen: ['::1:80']", '1:10: "::1:80": an IPv6 address needs brackets\n    hint: write "[::1]:8080"'),
        ("listen: ['a b:80']", '1:10: "a b" is not a host' + _HOST_HINT),
        ("listen: ['1.2.3:80']", '1:10: "1.2.3" is not a host' + _HOST_HINT),
        ("listen: [{agent: a}]", '1:10: missing field "address"' + _LISTENER_HINT),
        (
            "listen: [{address: 'a:1', agnet: a}]",
            '1:10: unknown field "agnet"\n    hint: a regular listener takes address, agent',
        ),
        (
            "listen: [{address: 'tls://a:1', mode: '0600'}]",
            '1:10: unknown field "mode"\n    hint: a tls listener takes address, agent, client_certificate',
        ),
        ("listen: [{address: 'a:1', agent: 'a:b'}]", f"1:10: 'a:b' cannot be an agent id: {_ID}"),
        ("listen: [{address: 'a:1', agent: 5}]", "1:10: expected an agent id, got a number"),
        ("listen: ['transparent@x']", f'1:10: "x" is not host:port{_PORT_HINT}'),
        (
            "listen: ['unix:a.sock']",
            '1:10: "unix:a.sock" has no absolute path\n    hint: write "unix:/run/sallyport/{agent}.sock"',
        ),
        (
            "listen: ['unix:/{agent}/{agent}']",
            '1:10: "/{agent}/{agent}" needs {agent} once\n    hint: {agent} stands where the agent\'s id is',
        ),
        (
            "listen: ['unix:/{agent}/s']",
            '1:10: "unix:/{agent}/s": {agent} must be in the file\'s name\n    hint: write /run/sallyport/{agent}.sock',
        ),
        (
            "listen: [{address: 'unix:/{agent}.s', agent: a}]",
            '1:10: "unix:/{agent}.s" has a socket for each agent\n    hint: leave agent: out',
        ),
        (
            "listen: [{address: 'unix:/s', mode: 0777}]",
            '1:10: mode "777" is not 0600, 0660 or 0666\n    hint: write mode: "0660", in quotes',
        ),
        (
            f"listen: ['unix:/{'s' * 107}']",
            f'1:10: "unix:/{"s" * 107}" is too long for a socket\n    hint: a path has 103 bytes, an id up to 63',
        ),
        (
            "listen: [{address: 'tls://a:1', client_certificate: maybe}]",
            "1:10: client_certificate is optional or required\n    hint: write required, and set identity.mtls",
        ),
        (
            "listen: ['a:1', {address: 'tls://a:1', client_certificate: required}]",
            "1:17: client certificates are required, and none are trusted\n    hint: set identity.mtls: {ca: FILE}",
        ),
        ("listen: ['tls://x']", f'1:10: "x" is not host:port{_PORT_HINT}'),
        ("admin: 9090", "1:8: expected host:port, got a number"),
        ("rules: ''", "1:8: expected a path, got empty text"),
        ("rules: [a]", "1:8: expected a path, got a list"),
        ("state:", "1:7: expected a path, got nothing"),
        ("store: mysql://u:hunter2@h", f"1:8: {_STORES}{_STORE_HINT}"),
        ("store: redis://:hun/ter2@h", f"1:8: {_STORE_WORDS}"),
        ("store: redis://u:1?ter2@h", f"1:8: {_STORE_WORDS}"),
        ('store: "redis://h:6379\\n"', f"1:8: {_STORE_WORDS}"),
        ("store: redis://", f"1:8: {_STORE_WORDS}"),
        ("store: [x]", "1:8: expected text, got a list"),
        ("workers: 0", f"1:10: {_WORKER_WORDS}, got 0{_WORKER_HINT}"),
        ("workers: 257", f"1:10: {_WORKER_WORDS}, got 257{_WORKER_HINT}"),
        ("workers: true", f"1:10: {_WORKER_WORDS}, got True{_WORKER_HINT}"),
        ("workers: 1.0", f"1:10: {_WORKER_WORDS}, got a number{_WORKER_HINT}"),
        ("workers: two", f"1:10: {_WORKER_WORDS}, got text{_WORKER_HINT}"),
        ("identity: {token: yes}", "1:19: expected true or false, got text"),
        ("identity: {networks: [a]}", "1:22: expected a mapping, got a list"),
        (
            "identity: {networks: {10.0.0.1/8: a}}",
            '1:23: "10.0.0.1/8" has bits set outside its mask\n    hint: write "10.0.0.0/8"',
        ),
        ("identity: {networks: {lan: a}}", '1:23: "lan" is not a network\n    hint: write it as "10.1.2.0/24"'),
        ("identity: {networks: {10.0.0.0/8: -a}}", f"1:35: '-a' cannot be an agent id: {_ID}"),
        (
            "identity: {networks: {10.0.0.0/8: a, 10.0.0.0/8: b}}",
            '1:38: duplicate key "10.0.0.0/8"\n    hint: it is on line 1 already',
        ),
        (
            "identity: {networks: {'fc00::/7': a, 'FC00::/7': b}}",
            '1:22: "FC00::/7" is the same as "fc00::/7"\n    hint: remove one of them',
        ),
        (
            "identity: {jwt: {jwks: x, issuer: i, audience: a}}",
            "1:24: no such file: TMP/x\n    hint: give a JWK Set, or its https:// URL",
        ),
        (
            "identity: {jwt: {jwks: 'http://idp.test/keys', issuer: i, audience: a}}",
            "1:24: the keys' URL must begin with https:// and hold no password\n    hint: or give a file",
        ),
        ("identity: {mtls: {ca: x}}", "1:23: no such file: TMP/x\n    hint: give the path of a PEM file"),
        ("identity: {mtls: {}}", '1:18: missing field "ca"'),
        (
            "identity: {uids: {root: a}}",
            '1:19: "root" is not a user\'s number\n    hint: write it as `id -u` prints it, such as 1001',
        ),
        (
            "identity: {uids: {'65534': a}}",
            "1:19: 65534 is every user of a sandbox that this host has no number for\n    hint: give it a real one",
        ),
        ("upstream: {trust: [no.pem]}", "1:20: no such file: TMP/no.pem\n    hint: give the path of a PEM file"),
        ("upstream: {trust: no.pem}", "1:19: expected a list, got text\n    hint: write it in brackets: [...]"),
        ("upstream: {connect_to: {a: 'b:1'}}", f'1:25: "a" is not host:port{_ENDPOINT_HINT}'),
        ("upstream: {connect_to: {'a:1': 'b:0'}}", f'1:32: "b:0" is not host:port{_ENDPOINT_HINT}'),
        (
            "upstream: {connect_to: {'a:1': 'b:1', 'A.:1': 'b:1'}}",
            '1:24: "A.:1" is the same as "a:1"\n    hint: remove one of them',
        ),
        (
            "upstream: {nameservers: ['dns:53']}",
            '1:26: "dns:53" is not ip:port\n    hint: a nameserver is given by its IP address',
        ),
        ("upstream: {nameservers: [1.1.1.1]}", f'1:26: "1.1.1.1" is not host:port{_ENDPOINT_HINT}'),
        (
            "upstream: {allow_addresses: [10.1.0.0/8]}",
            '1:30: "10.1.0.0/8" has bits set outside its mask\n    hint: write "10.0.0.0/8"',
        ),
        ("upstream: {via: 'https://u:hunter2@h:1'}", f"1:17: a parent proxy is a URL beginning with http://{_VIA}"),
        ("upstream: {via: 'http://u:hun/ter2@h:1'}", f"1:17: the parent proxy's URL is not well-formed{_VIA_ESCAPES}"),
        ("upstream: {via: 'http://u:hunter2@h'}", f"1:17: the parent proxy's URL names no host and port{_VIA}"),
        ("upstream: {via: 5}", "1:17: expected a URL, got a number"),
        ("lane: fats", '1:7: expected "mitmproxy" or "fast", got "fats"\n    hint: did you mean "fast"?'),
        ("vault: {lease: 60}", f"1:16: expected a duration, got a number{_DURATION_HINT}"),
        ("vault: {lease: soon}", f'1:16: expected a duration, got "soon"{_DURATION_HINT}'),
        ("audit: {file: 5}", "1:15: expected a path, got a number"),
        ("audit: {stdout: 1}", "1:17: expected true or false, got a number"),
        ("limits: {buffer: 0}", "1:18: must be more than 0"),
        ("limits: {buffer: 1 MB/s}", f'1:18: expected a size, got "1 MB/s"{_SIZE_HINT}'),
        ("limits: {headers: [1]}", f"1:19: expected a size, got a list{_SIZE_HINT}"),
        ("limits: {connections_per_agent: 0}", "1:33: must be at least 1"),
        ("limits: {connections_per_agent: 1.5}", "1:33: expected a whole number, got a number"),
        ("limits: {idle: 0s}", "1:16: must be more than 0"),
    ],
)
def test_bad_settings_have_a_place_and_words(tmp_path: Path, text: str, expected: str) -> None:
    """Each mistake is one problem where it is written, and no secret is repeated in it."""
    problems = _problems(tmp_path, text)
    assert problems == [f"sallyport.yaml:{expected}"]
    assert "ter2" not in problems[0]


def test_all_settings_are_judged_at_once(tmp_path: Path) -> None:
    """Mistakes in the file, the environment and the flags are told together."""
    env = {"SALLYPORT_LAEN": "fast", "SALLYPORT_WORKERS": "[", "SALLYPORT_ADMIN": "x"}
    assert _problems(tmp_path, "rules: 5\nvault: {lease: 5}\n", env, {"lane": "slow", "vault.lease": "x"}) == [
        '--lane: expected "mitmproxy" or "fast", got "slow"',
        f'--vault-lease: expected a duration, got "x"{_DURATION_HINT}',
        f'environment SALLYPORT_ADMIN: "x" is not host:port{_PORT_HINT}',
        'environment SALLYPORT_LAEN: unknown setting\n    hint: did you mean "SALLYPORT_LANE"?',
        "environment SALLYPORT_WORKERS: did not find expected node content",
        "sallyport.yaml:1:8: expected a path, got a number",
    ]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (
            {"SALLYPORT_VAULTLEASE": "{}"},
            'SALLYPORT_VAULTLEASE: unknown setting\n    hint: did you mean "SALLYPORT_VAULT__LEASE"?',
        ),
        (
            {"SALLYPORT_MASTERKEY": "hunter2"},
            'SALLYPORT_MASTERKEY: unknown setting\n    hint: did you mean "SALLYPORT_MASTER_KEY"?',
        ),
        ({"SALLYPORT_LISTEN": "a:1,b"}, f'SALLYPORT_LISTEN: "b" is not host:port{_PORT_HINT}'),
        (
            {"SALLYPORT_UPSTREAM__TRUST": "no.pem"},
            "SALLYPORT_UPSTREAM__TRUST: no such file: TMP/no.pem\n    hint: give the path of a PEM file",
        ),
        ({"SALLYPORT_STORE": "mysql://hunter2"}, f"SALLYPORT_STORE: {_STORES}{_STORE_HINT}"),
        (
            {"SALLYPORT_ADMIN_PORT": "1"},
            'SALLYPORT_ADMIN_PORT: unknown setting\n    hint: did you mean "SALLYPORT_ADMIN"?',
        ),
    ],
)
def test_a_bad_variable_is_named(tmp_path: Path, env: dict[str, str], expected: str) -> None:
    """The place of a variable's mistake is the variable; its value is not repeated where it may be a secret."""
    assert _problems(tmp_path, None, env) == [f"environment {expected}"]


def test_a_wrong_section_in_the_file_is_not_hidden_by_a_variable(tmp_path: Path) -> None:
    """Overriding one setting does not repair the file around it."""
    problems = _problems(tmp_path, "vault: 5", {"SALLYPORT_VAULT__LEASE": "1s"})
    assert problems == ["sallyport.yaml:1:8: expected a mapping, got a number"]


def test_other_known_variables_are_no_settings(tmp_path: Path) -> None:
    """The master key's variables, and what Kubernetes injects for services, are left alone."""
    env = {
        "SALLYPORT_MASTER_KEY": "k",
        "SALLYPORT_MASTER_KEY_FILE": "f",
        "SALLYPORT_SERVICE_HOST": "10.0.0.1",
        "SALLYPORT_SERVICE_PORT": "8080",
        "SALLYPORT_SERVICE_PORT_HTTP": "8080",
        "SALLYPORT_PORT": "tcp://10.0.0.1:8080",
        "SALLYPORT_PORT_8080_TCP_ADDR": "10.0.0.1",
        "SALLYPORT_ADMIN_SERVICE_HOST": "10.0.0.1",
        "SALLYPORT_ADMIN_SERVICE_PORT": "9090",
        "SALLYPORT_ADMIN_PORT": "tcp://10.0.0.1:9090",
        "SALLYPORT_ADMIN_PORT_9090_TCP_PROTO": "tcp",
        "PATH": "/bin",
    }
    assert _load(tmp_path, None, env) == _load(tmp_path)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("embedded", "embedded"),
        ("redis://u:hunter2@h:6379/0?password=hunter2", "redis://h:6379/0"),
        ("rediss://:hun%2Fter2@[::1]", "rediss://[::1]"),
        ("redis+sentinel://:hunter2@a:1,b:2/main/0", "redis+sentinel://a:1,b:2/main/0"),
        ("redis+cluster://a,b", "redis+cluster://a,b"),
    ],
)
def test_the_stores_password_is_not_shown(tmp_path: Path, url: str, shown: str) -> None:
    """The settings can be printed; only reveal() tells the URL."""
    settings = _load(tmp_path, None, {"SALLYPORT_STORE": url})
    assert (str(settings.store), settings.store.reveal()) == (shown, url)
    assert settings.store.embedded == (url == "embedded")
    assert "ter2" not in f"{settings} {settings!r} {settings.store} {settings.store!r}"


def test_settings_do_not_change(tmp_path: Path) -> None:
    """Nobody downstream can loosen a setting."""
    settings = _load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        settings.admin = _endpoint("0.0.0.0", 1)


def test_the_schema_shows_settings_as_they_are_written() -> None:
    """An editor sees text with a unit, not seconds, and no unknown keys."""
    schema = settings_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == [
        "listen",
        "admin",
        "rules",
        "certs",
        "ca",
        "state",
        "store",
        "workers",
        "identity",
        "upstream",
        "lane",
        "vault",
        "audit",
        "limits",
    ]
    lease = schema["$defs"]["Vault"]["properties"]["lease"]
    assert (lease["type"], lease["default"]) == ("string", "60s")


def test_auto_is_a_worker_for_each_cpu_we_may_use(tmp_path: Path) -> None:
    (tmp_path / "sallyport.yaml").write_text("workers: auto\n")
    assert load_settings(None, {}, {}, tmp_path).workers == usable_cpus()


def test_listeners_of_every_kind(tmp_path: Path) -> None:
    """What is behind the scheme, and how a socket for each agent is told from one for all."""
    text = """listen:
  - transparent@10.0.0.1:8081
  - {address: "tls://[::1]:8443", agent: coder-1}
  - {address: "unix:/run/s.sock", mode: "0660", group: sandboxes}
  - unix:/run/sallyport/{agent}.sock
"""
    (tmp_path / "sallyport.yaml").write_text(text)
    transparent, tls, unix, each = load_settings(None, {}, {}, tmp_path).listen
    assert (transparent.scheme, transparent.host, transparent.port) == ("transparent", "10.0.0.1", 8081)
    assert (tls.scheme, tls.host, tls.port, tls.agent) == ("tls", "::1", 8443, "coder-1")
    assert (unix.scheme, unix.path, unix.mode, unix.group) == ("unix", "/run/s.sock", 0o660, "sandboxes")
    assert unix.per_agent is None
    assert each.per_agent
    assert (each.per_agent.fill("coder-1"), each.mode) == ("/run/sallyport/coder-1.sock", 0o600)


def test_paths_within_identity_are_relative_to_the_file(tmp_path: Path) -> None:
    """Or, given by a variable, to the current folder."""
    (tmp_path / "ca.pem").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "sallyport.yaml").write_text("identity: {mtls: {ca: ../ca.pem, agent: cn}}")
    mtls = load_settings(Path("sub/sallyport.yaml"), {}, {}, tmp_path).identity.mtls
    assert mtls
    assert (mtls.ca.resolve(), mtls.agent) == (tmp_path / "ca.pem", "cn")
    given = load_settings(None, {"SALLYPORT_IDENTITY__MTLS": "{ca: ca.pem}"}, {}, tmp_path).identity.mtls
    assert given
    assert given.ca == tmp_path / "ca.pem"
