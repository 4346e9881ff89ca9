"""`check`, `test` and `explain`: what the pure rooms say of settings and rules, printed. Starts nothing that stays."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from proxy.agent import Agent, AgentState, parse_agent_id
from proxy.bodymatch import Body
from proxy.explain import explain, parse_url
from proxy.masterkey import load_master_key
from proxy.problem import Problem, Problems, UserError
from proxy.registry import Registry
from proxy.rulerisk import unknown_credentials
from proxy.ruletest import Case, load_tests
from proxy.ruletest import run_tests as run_cases
from proxy.settings import Settings
from proxy.snapshot import TESTS, read_files, read_policy, shown, yaml_files
from proxy.store import Store
from proxy.vault import Vault


def check(read_settings: Callable[[], Settings], paths: Sequence[Path]) -> int:
    """Print every problem of the settings and of the rules at once; 0 if there is none but warnings."""
    problems: list[Problem] = []
    settings = None
    try:
        settings = read_settings()
    except Problems as error:
        problems += error.problems
    folders = list(paths) or ([settings.rules] if settings else [])
    rules = 0
    for path in folders:
        try:
            policy, warnings = read_policy(path)
        except Problems as error:
            problems += error.problems
        else:
            rules += len(policy.rules)
            problems += warnings
            problems += unknown_credentials(policy, names) if (names := _credentials(settings)) is not None else []
        problems += _test_problems(path)
    for problem in sorted(set(problems)):
        print(problem, file=sys.stderr)
    errors = [problem for problem in problems if not problem.warning]
    if not errors:
        print(f"{rules} rule{'' if rules == 1 else 's'} from {', '.join(map(shown, folders))}: no problems")
    return 1 if errors else 0


def _credentials(settings: Settings | None) -> set[str] | None:
    """The names in the vault; None where there is no vault to ask, which `check` does not need."""
    if settings is None or (settings.store.embedded and not (settings.state / "store").is_dir()):
        return None

    async def names(url: str, state: Path) -> set[str]:
        async with await Store.open(url, state) as store:
            vault = Vault(store, await load_master_key(state, os.environ, store), state)
            return {entry.name for entry in await vault.list()}

    try:
        return asyncio.run(names(settings.store.reveal(), settings.state))
    except UserError:
        return None


def _test_problems(path: Path) -> Iterable[Problem]:
    try:
        _cases(path)
    except Problems as error:
        return error.problems
    return ()


def _cases(path: Path) -> list[Case]:
    return load_tests(read_files(test_files(path)))


def test_files(path: Path) -> list[Path]:
    """The test files at or below `path`."""
    if path.is_file():
        return [path] if path.name.endswith(TESTS) else []
    return [file for file in yaml_files(path) if file.name.endswith(TESTS)]


def run_tests(rules: Callable[[], Path], paths: Sequence[Path]) -> int:
    """Run the test files of `paths`, each folder's against its own rules; print what failed."""
    folders = list(paths) or [rules()]
    passed = failed = 0
    for path in folders:
        policy, _ = read_policy(_rules_of(path))
        for result in run_cases(policy, _cases(path)):
            passed += result.passed
            failed += not result.passed
            if not result.passed:
                print(result, file=sys.stderr)
    print(f"{passed} passed, {failed} failed")
    if not passed + failed:
        raise UserError(f"no tests in {', '.join(map(shown, folders))}: write one in NAME{TESTS} beside the rules")
    return 1 if failed else 0


def _rules_of(path: Path) -> Path:
    return path.parent if path.is_file() and path.name.endswith(TESTS) else path


def explain_request(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print which rule decides a request and why."""
    from proxy.clitools import pairs

    policy, _ = read_policy(settings.rules)
    headers = []
    for text in arguments.header:
        name, colon, value = text.partition(":")
        if not colon:
            raise UserError(f'-H {text!r}: write it as "Name: value"')
        headers.append((name.strip(), value.strip()))
    try:
        view = parse_url(arguments.method, arguments.url, headers)
    except ValueError as error:
        raise UserError(f"{arguments.url}: {error}") from None
    labels = pairs(arguments.label, "--label")
    try:
        agent = _agent(settings, parse_agent_id(arguments.agent), labels)
    except ValueError as error:
        raise UserError(f"--agent: {error}") from None
    explanation = explain(policy, agent, view._replace(body=_body(arguments.data)))
    print(json.dumps(explanation.as_json()) if arguments.json else explanation.as_text())
    return 0


def _body(data: str | None) -> Body:
    """`--data`: the text itself, or what is in the file behind an @."""
    if data is None or not data.startswith("@"):
        return Body((data or "").encode(errors="surrogateescape"))
    try:
        return Body(Path(data[1:]).read_bytes())
    except OSError as error:
        raise UserError(f"--data {data}: {(error.strerror or 'cannot be read').lower()}") from None


def _agent(settings: Settings, agent_id: str, labels: dict[str, str]) -> Agent:
    """The registered agent, or one of that id with the labels given; the store is not started for it."""
    unregistered = Agent(agent_id, labels, state=AgentState.ACTIVE)
    if labels or (settings.store.embedded and not (settings.state / "store").is_dir()):
        return unregistered

    async def show() -> Agent:
        async with await Store.open(settings.store.reveal(), settings.state) as store:
            return await Registry(store).show(agent_id)

    try:
        return asyncio.run(show())
    except UserError:
        return unregistered
