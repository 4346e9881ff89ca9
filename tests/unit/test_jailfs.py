"""What a jail sees, before any is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.jailfs import Mount, Sight, bwrap_arguments
from proxy.problem import UserError


def sight(cwd: Path, hidden: Path, *mounts: Mount) -> Sight:
    return Sight(cwd, Path("/home/someone"), mounts, [hidden], [])


def test_a_mount_says_where_and_whether_it_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert Mount.parse("a", tmp_path) == Mount(tmp_path / "a", tmp_path / "a", True)
    assert Mount.parse("a:/data", tmp_path) == Mount(tmp_path / "a", Path("/data"), True)
    assert Mount.parse("a:/data:ro", tmp_path) == Mount(tmp_path / "a", Path("/data"), False)
    assert Mount.parse("a:ro", tmp_path) == Mount(tmp_path / "a", tmp_path / "a", False)


@pytest.mark.parametrize("text", ["", "a:b:c", ":x", "a:", "nowhere"])
def test_a_mount_that_cannot_be_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="--mount"):
        Mount.parse(text, tmp_path)


def test_a_link_is_mounted_as_what_it_leads_to(tmp_path: Path) -> None:
    """So it cannot lead to what is hidden."""
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to("state")
    mount = Mount.parse("link:/data", tmp_path)
    with pytest.raises(UserError, match="the proxy's own"):
        bwrap_arguments(sight(tmp_path / "work", tmp_path / "state", mount))


@pytest.mark.parametrize(
    ("cwd", "workable"), [("/srv/work", True), ("/srv", False), ("/srv/proxy", False), ("/srv/proxy/state", False)]
)
def test_a_folder_with_the_proxys_files_is_not_written_in(cwd: str, workable: bool) -> None:
    assert sight(Path(cwd), Path("/srv/proxy")).workable is workable


@pytest.mark.parametrize("cwd", ["/", "/home", "/home/someone", "/usr"])
def test_neither_is_the_system_or_a_whole_home(cwd: str) -> None:
    """What is written there would be run outside later, such as ~/.profile."""
    assert not sight(Path(cwd), Path("/srv/proxy")).workable


def test_variables_are_not_among_the_arguments() -> None:
    """Which every user of the host can read."""
    words = bwrap_arguments(sight(Path("/srv/work"), Path("/srv/proxy")))
    assert "--setenv" not in words
    assert words[-2:] == ["--chdir", "/srv/work"]
