"""Which files are rules, which are told not to be, and which rules are in force."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from proxy.problem import Problems
from proxy.snapshot import Rules, read_policy, rule_files
from tests.storage import eventually

RULES = "version: 1\nrules:\n  - {name: one, match: {host: api.test, path: /**}, action: allow}\n"


@contextmanager
def folder_of_somebody_else() -> Iterator[Path]:
    """A folder that this process owns, with an effective user whom permissions bind (root is not bound by any)."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_rule_files_come_in_path_order_without_hidden_ones_and_tests(tmp_path: Path) -> None:
    """Kubernetes keeps the versions of a ConfigMap in hidden folders, editors their drafts in hidden files."""
    for name in ("b.yaml", "a/z.yaml", "a.yaml", "a.test.yaml", ".b.yaml", "..data/b.yaml", "c.yml", "d.yaml~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RULES)
    assert [str(path.relative_to(tmp_path)) for path in rule_files(tmp_path)] == ["a/z.yaml", "a.yaml", "b.yaml"]


def test_a_folder_that_may_not_be_read_is_not_passed_over() -> None:
    """It could hold block rules."""
    with folder_of_somebody_else() as folder:
        (folder / "a.yaml").write_text(RULES)
        (folder / "blocks").mkdir(mode=0o000)
        with pytest.raises(Problems, match="blocks: cannot be read: Permission denied\n    hint: let the user"):
            read_policy(folder)


def test_every_file_that_may_not_be_read_is_told_at_once() -> None:
    with folder_of_somebody_else() as folder:
        for name in ("a.yaml", "b.yaml"):
            (folder / name).write_text(RULES)
            (folder / name).chmod(0)
        with pytest.raises(Problems) as caught:
            read_policy(folder)
        assert [problem.message for problem in caught.value.problems] == ["cannot be read: Permission denied"] * 2


def test_no_rules_and_a_file_that_is_not_read_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(RULES)
    policy, warnings = read_policy(tmp_path)
    assert not policy.rules
    assert [(problem.message.partition(":")[0], problem.warning) for problem in warnings] == [
        ("there are no rules in it", True),
        ("is not read", True),
    ]


# Rules in force


def rules_of(folder: Path) -> tuple[Rules, list[tuple[bool, int]]]:
    """The rules of a folder, and what is told of each load."""
    told: list[tuple[bool, int]] = []
    return Rules(folder, lambda sound, count, _: told.append((sound, count))), told


def write(folder: Path, text: str) -> None:
    draft = folder / ".draft"
    draft.write_text(text)
    draft.replace(folder / "a.yaml")


def test_nothing_is_in_force_before_a_sound_load(tmp_path: Path) -> None:
    rules, told = rules_of(tmp_path / "missing")
    assert rules.policy is None
    assert not asyncio.run(rules.load())
    assert rules.policy is None
    assert [problem.message for problem in rules.problems] == ["no such folder of rules"]
    assert told == [(False, 0)]


def test_broken_rules_do_not_replace_the_last_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write(tmp_path, RULES)
    rules, told = rules_of(tmp_path)
    asyncio.run(rules.reload())
    good = rules.policy
    assert good
    write(tmp_path, RULES + "  - {name: two, action: alow}\n")
    asyncio.run(rules.reload())
    assert rules.policy is good
    assert [problem.line for problem in rules.problems] == [4]
    assert "the last good ones stay in force" in caplog.text
    write(tmp_path, RULES + "  - {name: two, match: {host: b.test}, action: block}\n")
    asyncio.run(rules.reload())
    assert rules.policy
    assert [rule.name for rule in rules.policy.rules] == ["one", "two"]
    assert rules.problems == ()
    assert [rule.name for rule in good.rules] == ["one"], "who began with it keeps it"
    assert told == [(True, 1), (False, 1), (True, 2)]
    assert good.digest in caplog.text
    assert rules.policy.digest != good.digest


def test_a_bug_in_loading_replaces_nothing_and_quotes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> NoReturn:
        raise RuntimeError("words of a rule file")

    write(tmp_path, RULES)
    rules, _ = rules_of(tmp_path)
    asyncio.run(rules.load())
    good = rules.policy
    monkeypatch.setattr("proxy.snapshot.read_policy", broken)
    assert not asyncio.run(rules.load())
    assert rules.policy is good
    assert [problem.message for problem in rules.problems] == ["cannot be loaded: RuntimeError"]


@pytest.mark.slow
def test_every_change_is_followed(tmp_path: Path) -> None:
    """An edit of the same length, a new file, a removed one, the folder gone and back."""
    write(tmp_path, RULES)
    rules, told = rules_of(tmp_path)
    hidden = tmp_path.with_name(f"{tmp_path.name}-gone")

    def names() -> list[str]:
        return [rule.name for rule in rules.policy.rules] if rules.policy else []

    async def story() -> None:
        assert await rules.load()
        following = asyncio.create_task(rules.follow())
        write(tmp_path, RULES.replace("one", "two"))
        await eventually(lambda: names() == ["two"])
        (tmp_path / "b.yaml").write_text(RULES.replace("one", "three"))
        await eventually(lambda: names() == ["two", "three"])
        (tmp_path / "a.yaml").unlink()
        await eventually(lambda: names() == ["three"])
        await asyncio.to_thread(tmp_path.rename, hidden)
        await eventually(lambda: rules.problems)
        assert names() == ["three"]
        await asyncio.to_thread(hidden.rename, tmp_path)
        await eventually(lambda: not rules.problems)
        following.cancel()

    asyncio.run(story())
    assert told[-2:] == [(False, 1), (True, 1)]
