"""Finding the proxy as quickly as the settings allow, and what of our variables a jail gets."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from proxy.jail import environment_of, find_state
from proxy.settings import load_settings


@pytest.mark.parametrize("text", [None, "{}", "state: elsewhere", "state: /absolute"])
@pytest.mark.parametrize("variable", [None, "of-the-variable"])
@pytest.mark.parametrize("flag", [None, "of-the-flag"])
def test_the_state_is_found_where_the_settings_have_it(
    text: str | None, variable: str | None, flag: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "sallyport.yaml").write_text(text)
    environment = {"SALLYPORT_STATE": variable} if variable else {}
    _, state = find_state(Namespace(state=flag), environment, tmp_path)
    expected = load_settings(None, environment, {"state": flag} if flag else {}, tmp_path).state
    assert state.resolve() == expected.resolve()


def test_a_file_that_is_named_counts(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    named = tmp_path / "etc" / "my.yaml"
    named.write_text("{}")
    assert find_state(Namespace(config="etc/my.yaml"), {}, tmp_path)[1] == tmp_path / "etc" / ".sallyport"
    assert find_state(Namespace(), {"SALLYPORT_CONFIG": str(named)}, tmp_path)[0] == named


def test_variables_are_passed_on_by_name() -> None:
    outer = {"PATH": "/bin", "LC_ALL": "C", "TERM": "xterm", "SALLYPORT_MASTER_KEY": "k", "AWS_SECRET": "s", "X": "1"}
    assert environment_of(outer, ["X", "Y=2", "Z"]) == {
        "PATH": "/bin:/run/sallyport/bin",
        "LC_ALL": "C",
        "TERM": "xterm",
        "X": "1",
        "Y": "2",
    }
