"""An attacker who holds the store, or may write to it, opens nothing and brings nothing back."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.problem import UserError
from proxy.records import TABLE, Records
from proxy.sealing import MasterKey, Record, SealBroken, Stored
from proxy.secret import Secret
from proxy.store import Store
from tests.storage import eventually, process

KEY = os.urandom(32)
SECRET = Secret(b"ghp_5up3rs3cr3tplaintext")


def draft(kind: str = "bearer", name: str = "github", **grant: Any) -> Callable[[str | None], Stored]:
    record = Record(name, 0, kind, {}, {"hosts": ["api.github.com"], "methods": ["GET"], **grant})
    return lambda _: Stored(record, "", 1.0, None)


def in_records(
    state: Path, story: Callable[[Store, Records], Awaitable[None]], marks: Path | None = None, key: bytes = KEY
) -> None:
    """Runs `story` with the records of the store in `state` and the marks kept in `marks`."""

    async def main() -> None:
        async with await Store.open("embedded", state) as store:
            await story(store, Records(store, MasterKey(key), marks or state, os.urandom))

    asyncio.run(main())


async def text_of(store: Store, name: str = "github") -> str:
    text = await store.get(TABLE, name)
    assert text is not None
    return text


async def forge(store: Store, text: str, name: str = "github") -> None:
    await store.change(TABLE, name, lambda _: text)


def edited(text: str, **changes: object) -> str:
    return json.dumps(json.loads(text) | changes)


def test_a_written_record_opens(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        assert await records.write("github", SECRET, draft()) == 1
        opened = records.open("github", await text_of(store), records.marks())
        assert opened.secret == SECRET
        assert opened.version == 1
        assert not opened.removed

    in_records(tmp_path, story)


def test_a_stolen_copy_of_the_store_opens_nothing(tmp_path: Path) -> None:
    """Everything is taken but the master key."""

    async def keep(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())

    in_records(tmp_path / "ours", keep)
    shutil.copytree(tmp_path / "ours" / "store", tmp_path / "theirs" / "store")

    async def steal(store: Store, records: Records) -> None:
        with pytest.raises(SealBroken, match="sealed under master key"):
            records.open("github", await text_of(store), records.marks())
        text = (await text_of(store)).replace(MasterKey(KEY).id, MasterKey(b"x" * 32).id)
        with pytest.raises(SealBroken, match="changed after it was sealed"):
            records.open("github", text, records.marks())

    in_records(tmp_path / "theirs", steal, key=b"x" * 32)


def test_no_plaintext_reaches_a_file_of_the_store(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        async def idle(work: str) -> bool:
            return not (await store._client.info("persistence"))[work]

        await records.write("github", SECRET, draft())
        await store._client.bgrewriteaof()
        await eventually(partial(idle, "aof_rewrite_in_progress"))
        await store._client.bgsave()
        await eventually(partial(idle, "rdb_bgsave_in_progress"))

    in_records(tmp_path, story)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert any(path.suffix == ".rdb" for path in files)
    kept = b"".join(path.read_bytes() for path in files)
    assert b"github" in kept
    assert SECRET.reveal() not in kept
    assert KEY not in kept


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "header"},
        {"version": 2},
        {"version": 1.0},
        {"version": True},
        {"fields": {"name": "x"}},
        {"grant": {"hosts": ["**.evil.test"], "methods": ["GET"]}},
        {"grant": {"hosts": ["api.github.com"]}},
        {"grant": {}},
        {"sealed": ""},
        {"sealed": None},
        {"created": None},
    ],
)
def test_a_record_that_was_edited_does_not_open(tmp_path: Path, changes: dict[str, object]) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        with pytest.raises(SealBroken):
            records.open("github", edited(await text_of(store), **changes), records.marks())

    in_records(tmp_path, story)


def test_a_record_that_was_renamed_does_not_open(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        with pytest.raises(SealBroken, match="changed after it was sealed"):
            records.open("gitlab", await text_of(store), records.marks())

    in_records(tmp_path, story)


def test_an_older_version_that_was_put_back_does_not_open(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", Secret(b"leaked"), draft())
        old = await text_of(store)
        await records.write("github", SECRET, draft())
        with pytest.raises(SealBroken, match=r"version 1 is older than 2.*delete .*vault-versions.json"):
            records.open("github", old, records.marks())

    in_records(tmp_path, story)


def test_a_rollback_shows_after_a_restart_too(tmp_path: Path) -> None:
    """The whole store directory is put back, not one record."""

    async def write(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())

    async def refused(store: Store, records: Records) -> None:
        with pytest.raises(SealBroken, match="version 1 is older than 2"):
            records.open("github", await text_of(store), records.marks())

    in_records(tmp_path, write)
    shutil.copytree(tmp_path / "store", tmp_path / "backup")
    in_records(tmp_path, write)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "backup").rename(tmp_path / "store")
    in_records(tmp_path, refused)


def test_a_removed_record_that_was_put_back_does_not_open(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        old = await text_of(store)
        assert await records.bury("github", 2.0) == 2
        assert records.open("github", await text_of(store), records.marks()).removed
        await forge(store, old)
        with pytest.raises(SealBroken, match="version 1 is older than 2"):
            records.open("github", await text_of(store), records.marks())

    in_records(tmp_path, story)


def test_another_machine_learns_of_a_removal_from_the_tombstone(tmp_path: Path) -> None:
    """Its marks are its own, and a missing record would prove nothing."""

    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        old = await text_of(store)
        elsewhere = Records(store, MasterKey(KEY), tmp_path / "elsewhere", os.urandom)
        assert elsewhere.open("github", old, elsewhere.marks()).secret == SECRET
        await records.bury("github", 2.0)
        buried = elsewhere.open("github", await text_of(store), elsewhere.marks())
        await elsewhere.note({"github": buried.version})
        with pytest.raises(SealBroken, match="older"):
            elsewhere.open("github", old, elsewhere.marks())

    in_records(tmp_path, story)


def test_versions_count_on_over_removal_and_another_machine(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        elsewhere = Records(store, MasterKey(KEY), tmp_path / "elsewhere", os.urandom)
        versions = [
            await records.write("github", SECRET, draft()),
            await records.write("github", SECRET, draft()),
            await records.bury("github", 1.0),
            await elsewhere.write("github", SECRET, draft()),
            await elsewhere.bury("github", 2.0),
            await records.write("github", SECRET, draft()),
            await records.write("other", SECRET, draft(name="other")),
        ]
        assert versions == [1, 2, 3, 4, 5, 6, 1]

    in_records(tmp_path, story)


def test_versions_count_on_where_the_record_was_deleted_or_damaged(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        await records.write("github", SECRET, draft())
        await store.change(TABLE, "github", lambda _: None)
        assert await records.write("github", SECRET, draft()) == 3
        await forge(store, "garbage")
        assert await records.write("github", SECRET, draft()) == 4
        await forge(store, edited(await text_of(store), version=10**30))
        assert await records.write("github", SECRET, draft()) == 5
        assert records.open("github", await text_of(store), records.marks()).secret == SECRET

    in_records(tmp_path, story)


def test_a_forged_version_raises_no_mark(tmp_path: Path) -> None:
    """Else an attacker could make every true version look old."""

    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        true = await text_of(store)
        with pytest.raises(SealBroken):
            records.open("github", edited(true, version=99), records.marks())
        assert records.open("github", true, records.marks()).secret == SECRET

    in_records(tmp_path, story)


def test_a_version_that_came_while_reading_is_no_rollback(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        await records.write("github", SECRET, draft())
        marks, text = records.marks(), await text_of(store)
        await records.write("github", SECRET, draft())
        assert records.open("github", text, marks).version == 1
        assert records.outdated("github", 1)
        assert not records.outdated("github", 2)

    in_records(tmp_path, story)


def test_an_operator_is_told_of_a_record_that_is_missing_removed_or_broken(tmp_path: Path) -> None:
    async def story(store: Store, records: Records) -> None:
        with pytest.raises(UserError, match="there is no credential github: `sallyport vault list`"):
            await records.bury("github", 1.0)
        await records.write("github", SECRET, draft())
        await records.bury("github", 1.0)
        with pytest.raises(UserError, match="there is no credential github"):
            await records.bury("github", 1.0)
        with pytest.raises(UserError, match="there is no credential github"):
            records.present("github", await text_of(store), records.marks())
        with pytest.raises(
            UserError, match="github does not open: its record is damaged; `sallyport vault put github`"
        ):
            records.present("github", "garbage", records.marks())
        await forge(store, "garbage")
        assert await records.bury("github", 1.0) == 3

    in_records(tmp_path, story)


def test_two_processes_writing_at_once_give_every_version_once(tmp_path: Path) -> None:
    code = """
import os
from proxy.records import Records
from proxy.sealing import MasterKey, Record, Stored
from proxy.secret import Secret
async def main():
    state = Path(sys.argv[1])
    draft = Stored(Record("github", 0, "static", {}, {}), "", 0.0, None)
    async with await Store.open("embedded", state) as store:
        records = Records(store, MasterKey(bytes.fromhex(sys.argv[2])), state, os.urandom)
        print(*[await records.write("github", Secret(b"x"), lambda _: draft) for _ in range(15)])
asyncio.run(main())
"""
    with process(code, tmp_path, KEY.hex()) as one, process(code, tmp_path, KEY.hex()) as two:
        printed = [[int(word) for word in child.communicate()[0].split()] for child in (one, two)]
    assert all(versions == sorted(versions) for versions in printed)
    assert sorted(printed[0] + printed[1]) == list(range(1, 31))
