"""./sallyport, in a repository with nothing to install and a stand-in for the proxy that tells how it was called."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REAL_PYTHON = Path(os.path.realpath(sys.executable))
STAND_IN = """
import json, os, sys
told = {"argv": sys.argv[1:], "cwd": os.getcwd(), "file": __file__, "pid": os.getpid(), "env": dict(os.environ)}
print(json.dumps(told))
sys.exit(7 if "fail" in sys.argv else 0)
"""
SET_UP = "sallyport: setting up .venv (once) ..."
pytestmark = pytest.mark.slow


def make_repository(at: Path) -> Path:
    """A repository as small as the launcher can take."""
    (at / "scripts").mkdir(parents=True)
    (at / "proxy").mkdir()
    for name in ("sallyport", "scripts/venv.sh", "scripts/venv.py"):
        shutil.copy(ROOT / name, at / name)
    (at / "requirements.lock").write_text("")
    (at / "proxy/__init__.py").write_text("")
    (at / "proxy/__main__.py").write_text(STAND_IN)
    return at


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that was set up; tests that use it leave it so."""
    repository = make_repository(tmp_path_factory.mktemp("launcher") / "with space")
    assert launch(repository / "sallyport").returncode == 0
    return repository


def launch(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, **options)


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def poor_path(at: Path, stubs: Mapping[str, str]) -> str:
    """A PATH with what the launcher calls, no Python, and these shell scripts."""
    at.mkdir()
    for tool in ("cmp", "dirname", "readlink"):
        found = shutil.which(tool)
        assert found, tool
        (at / tool).symlink_to(found)
    for name, script in stubs.items():
        (at / name).write_text(f"#!/bin/sh\n{script}\n")
        (at / name).chmod(0o755)
    return str(at)


def normal(name: str) -> str:
    """A distribution's name as an index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.01)


def test_arguments_folder_and_exit_code_pass_through(ready: Path, tmp_path: Path) -> None:
    done = launch(ready / "sallyport", "fail", "two words", "", "*", cwd=tmp_path)
    assert done.returncode == 7
    assert told(done)["argv"] == ["fail", "two words", "", "*"]
    assert told(done)["cwd"] == str(tmp_path)
    assert done.stderr == ""


def test_launcher_becomes_the_proxy_so_that_signals_reach_it(ready: Path) -> None:
    with subprocess.Popen([ready / "sallyport"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert json.load(process.stdout)["pid"] == process.pid


def test_links_lead_to_the_repository(ready: Path, tmp_path: Path) -> None:
    """An absolute link, a relative link to that, and a name found on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "absolute").symlink_to(ready / "sallyport")
    (tmp_path / "bin/sallyport").symlink_to("../absolute")
    expected = str(ready / "proxy/__main__.py")
    assert told(launch(tmp_path / "bin/sallyport"))["file"] == expected
    assert told(launch("bin/sallyport", cwd=tmp_path))["file"] == expected
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert told(launch("sh", "-c", "sallyport", env={**os.environ, "PATH": path}))["file"] == expected


def test_no_other_proxy_package_stands_in(ready: Path, tmp_path: Path) -> None:
    """A folder named proxy in the working folder or on PYTHONPATH would run beside the vault."""
    make_repository(tmp_path / "evil")
    done = launch(ready / "sallyport", cwd=tmp_path / "evil", env={**os.environ, "PYTHONPATH": str(tmp_path / "evil")})
    assert told(done)["file"] == str(ready / "proxy/__main__.py")


def test_environment_is_left_as_it_was(ready: Path) -> None:
    """What `exec` starts in a sandbox must not find its way into this repository."""
    environment = {**os.environ, "PYTHONPATH": "/somewhere"}
    environment.pop("_", None)  # each shell sets it
    assert told(launch(ready / "sallyport", env=environment))["env"].items() >= environment.items()


def test_missing_python_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    path = poor_path(tmp_path / "bin", {"python3": '[ "$1" = -V ] && echo Python 3.11.2'})
    done = launch(repository / "sallyport", env={"PATH": path, "HOME": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.12 or newer, with venv, but found Python 3.11.2" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    assert not (repository / ".venv").exists()


def test_no_python_and_no_home_is_said_as_clearly(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    done = launch(repository / "sallyport", env={"PATH": poor_path(tmp_path / "bin", {})})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "found no Python 3" in done.stderr


@pytest.mark.slow
def test_python_of_pyenv_is_found_although_its_shim_fails(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    shim = "echo 'pyenv: command not found' >&2; exit 127"
    path = poor_path(tmp_path / "bin", {"python3.13": shim, "python3.12": shim, "python3": shim})
    version = tmp_path / "pyenv/versions/{}.{}.9/bin".format(*sys.version_info)
    version.mkdir(parents=True)
    (version / "python").symlink_to(REAL_PYTHON)
    done = launch(repository / "sallyport", "x", env={"PATH": path, "PYENV_ROOT": str(tmp_path / "pyenv")})
    assert told(done)["argv"] == ["x"]
    assert done.stderr.splitlines() == [SET_UP]


@pytest.mark.slow
def test_two_first_launches_set_up_once(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    both = [
        subprocess.Popen([repository / "sallyport", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    answers = [process.communicate(timeout=200) for process in both]
    assert [json.loads(output)["argv"] for output, _ in answers] == [["one"], ["two"]]
    assert "".join(errors for _, errors in answers).count(SET_UP) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["with its children", "alone"])
def test_set_up_that_was_killed_is_repaired_by_the_next_launch(tmp_path: Path, whole: bool) -> None:
    """Killed alone, it leaves a child still writing: the next launch waits for that one to end."""
    repository = make_repository(tmp_path / "repository")
    with subprocess.Popen([repository / "sallyport"], stderr=subprocess.PIPE, start_new_session=True) as first:
        until((repository / ".venv/bin/python").exists)
        (os.killpg if whole else os.kill)(first.pid, signal.SIGKILL)
        assert not (repository / ".venv/installed.lock").exists()
        assert told(launch(repository / "sallyport", "next"))["argv"] == ["next"]
    assert launch(repository / "sallyport").stderr == ""


@pytest.mark.slow
def test_changed_lock_and_lost_interpreter_set_up_again(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    assert launch(repository / "sallyport").stderr.splitlines() == [SET_UP]
    (repository / "requirements.lock").write_text("# changed\n")
    assert launch(repository / "sallyport").stderr.splitlines() == [SET_UP]
    (repository / ".venv/bin/python").unlink()
    (repository / ".venv/bin/python").symlink_to("/nonexistent/python")
    done = launch(repository / "sallyport")
    assert done.stderr.splitlines() == [SET_UP]
    assert told(done)["argv"] == []


@pytest.mark.slow
def test_failed_installation_says_what_to_do_and_is_tried_again(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    (repository / "requirements.lock").write_text(f"sallyport-nowhere==1 --hash=sha256:{'0' * 64}\n")
    offline = {**os.environ, "PIP_NO_INDEX": "1"}
    for _ in range(2):
        done = launch(repository / "sallyport", env=offline)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith("sallyport: .venv could not be set up from requirements.lock")
        assert "Traceback" not in done.stderr
    (repository / "requirements.lock").write_text("")
    assert launch(repository / "sallyport", env=offline).returncode == 0


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository")
    (repository / ".venv").write_text("in the way")
    done = launch(repository / "sallyport")
    assert done.returncode == 1
    assert done.stderr == (
        f"sallyport: {repository}/.venv could not be set up: File exists. Mend that, then run this again.\n"
    )


def test_every_package_the_proxy_imports_is_one_it_asks_for() -> None:
    """What comes along with another package today may stay away tomorrow."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "proxy").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = metadata.packages_distributions()
    outside = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"proxy"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normal(re.split(r"[<>=; ]", line)[0]) for line in project["dependencies"]}
    declared |= {"pydantic-core"}  # the other half of pydantic, which pins it exactly
    assert {name for name in outside if not declared & set(map(normal, packages[name]))} == set()


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_files_hash_every_package_and_name_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    packages = re.findall(r"^([a-z0-9.-]+)==\S+.*\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line and line[0] not in " #"]
    assert len(packages) == len(lines)
    assert "://" not in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + (project["dependency-groups"]["dev"] if "dev" in name else [])
    assert {normal(re.split(r"[<>=; ]", line)[0]) for line in wanted} <= set(packages)
