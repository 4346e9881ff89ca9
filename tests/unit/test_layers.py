"""The rooms of `proxy/`: which layer each is in, that imports only go down, and who may see a secret."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.storage import ROOT

LAYERS = {
    0: "problem reason secret",
    1: (
        "address agent agenttoken auditchain bodymatch clienthello coding exchange forms frames framing http1 "
        "jaildns literals passing pattern proof request series strangers url"
    ),
    2: "claims grant keyformats leak policy redact sigv4",
    3: (
        "credential explain outbound passthrough plan quantity rulefield rulefile rulemodel rulerisk ruletest "
        "sealing validation yamltree"
    ),
    4: (
        "admin agentca arrival audit auditline auditlink ca canary certificate cipher cpus doctorclients doctorways "
        "embedded files follow gateway gatewaykeys guard guesses handover identity jailfs jailnet jwks jwtidentity "
        "killswitch leakguard limiter link listening masterkey metrics mtls parent poller proxies records redirect "
        "registry rekey rollback rotation running sandboxca sandboxenv settings settingvalue snapshot store "
        "unixsocket upstream vault workerprocess"
    ),
    5: (
        "addon answering asking contexts conversation cut deciding doors fastflow flow handler hooks jaildoor lane "
        "laneclient layers peer pool relay replay runtime server settled signing strict1 strict2 strictws supervisor "
        "tls tlsdoor transparent tunnels worker"
    ),
    6: "__main__ check cli cliagent cliaudit clicanary cligateway clirekey clitools clivault demo doctor jail script",
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules.split()} | {"__init__": 0}

# mitmproxy loads proxy/addon.py as a script (`mitmweb -s`), which then has to find what is above it.
UP = {("addon", "script")}

PURE = 3  # the last layer of what decides: no wire, no clock, no chance, nothing that waits
NOT_PURE = (
    *(
        "asyncio",
        "concurrent",
        "ctypes",
        "datetime",
        "logging",
        "mitmproxy",
        "multiprocessing",
        "os",
        "random",
        "redis",
    ),
    *("secrets", "select", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "tornado", "uuid"),
)

# Where a secret is checked, sealed and injected; nobody else reads one.
REVEAL = {"credential", "outbound", "sealing"}
REVEAL_STORE_URL = {"check", "clitools", "runtime"}  # `settings.store` is a URL with a password, for `Store.open`


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / "proxy" / f"{module}.py").read_text())


def modules() -> set[str]:
    return {path.stem for path in (ROOT / "proxy").glob("*.py")}


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what is imported, such as `proxy.request` or `time`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            assert node.module
            if node.module == "proxy":
                yield from (f"proxy.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rooms(names: Iterator[str]) -> set[str]:
    """The modules of ours among them."""
    found = (name.removeprefix("proxy.") for name in names if name.startswith("proxy."))
    return {name for name in found if not name.startswith("__")}  # `from proxy import __version__`


def test_every_module_has_one_layer() -> None:
    assert modules() == set(LAYER)
    assert sum(len(names.split()) for names in LAYERS.values()) == len(LAYER) - 1


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_only_go_down(module: str) -> None:
    """Those inside functions too."""
    up = {(module, other) for other in rooms(imported(ast.walk(tree(module)))) if LAYER[other] > LAYER[module]}
    assert up <= UP


def test_no_two_modules_import_each_other() -> None:
    """When they are loaded, which leaves out what stands in a function or for types only."""
    TopologicalSorter({module: rooms(imported(iter(tree(module).body))) for module in modules()}).prepare()


@pytest.mark.parametrize("module", sorted(module for module, layer in LAYER.items() if layer <= PURE))
def test_what_decides_knows_no_wire_no_clock_and_no_chance(module: str) -> None:
    """It must be fuzzable, usable without a proxy, and immune to a mitmproxy upgrade."""
    assert {name.partition(".")[0] for name in imported(ast.walk(tree(module)))}.isdisjoint(NOT_PURE)


def test_what_decides_loads_no_driver_by_way_of_others() -> None:
    pure = sorted(module for module, layer in LAYER.items() if layer <= PURE and not module.startswith("__"))
    code = f"import sys, {', '.join(f'proxy.{module}' for module in pure)}\n"
    code += "print(*{'mitmproxy', 'redis', 'tornado'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def revealed(module: str) -> Iterator[str]:
    """What `.reveal` is asked of, as it is written; no way around it is taken."""
    for node in ast.walk(tree(module)):
        word = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
        assert word != "_value" or module == "secret"
        if isinstance(node, ast.Attribute) and word == "reveal":
            yield ast.unparse(node.value)
        assert word != "reveal" or isinstance(node, ast.Attribute)


def test_a_secret_is_revealed_where_it_must_be_only() -> None:
    asked = {module: set(revealed(module)) for module in modules()}
    assert {module for module, whats in asked.items() if whats - {"settings.store"}} == REVEAL
    assert {module for module, whats in asked.items() if "settings.store" in whats} == REVEAL_STORE_URL
