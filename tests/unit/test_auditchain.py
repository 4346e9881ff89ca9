"""A line that was changed, taken out, put in or moved shows."""

from __future__ import annotations

import json

import pytest

from proxy.auditchain import BEGIN, Chain, last_hash, link

LINES = [b'{"id":%d,"path":"/\\u00e9"}\n' % number for number in range(5)]
LOG, LAST = link(b"".join(LINES), BEGIN)


def wrong(*files: bytes, expect: str = "") -> tuple[list[tuple[int, str]], Chain]:
    chain = Chain()
    return [problem for file in files for problem in chain.verify(file.splitlines(keepends=True), expect)], chain


def test_a_chain_as_it_was_written_is_whole() -> None:
    """In one piece or in groups, in one file or several; every line is JSON that ends in its hash."""
    first, middle = link(b"".join(LINES[:2]), BEGIN)
    second, last = link(b"".join(LINES[2:]), middle)
    assert (first + second, last) == (LOG, LAST)
    for files in ([LOG], [first, second]):
        problems, chain = wrong(*files)
        assert (problems, chain.lines, chain.last) == ([], 5, LAST)
    records = [json.loads(line) for line in LOG.splitlines()]
    assert [list(record)[-2:] for record in records] == [["prev", "hash"]] * 5
    assert records[0]["prev"] == BEGIN
    assert records[1]["prev"] == records[0]["hash"]


def test_every_change_of_a_byte_shows() -> None:
    for at in range(0, len(LOG), 7):
        changed = LOG[:at] + bytes([LOG[at] ^ 1]) + LOG[at + 1 :]
        problems, chain = wrong(changed)
        assert problems or chain.last != LAST or chain.after != BEGIN, LOG[max(0, at - 20) : at + 20]


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
def test_a_line_that_was_taken_out_shows(gone: int) -> None:
    lines = LOG.splitlines(keepends=True)
    problems, chain = wrong(b"".join(lines[:gone] + lines[gone + 1 :]))
    assert problems or chain.after != BEGIN  # older lines may be in another file


def test_what_was_cut_off_shows_against_a_hash_kept_elsewhere() -> None:
    """The chain itself cannot know how long it was."""
    lines = LOG.splitlines(keepends=True)
    assert wrong(LOG, expect=LAST)[1].expected
    problems, chain = wrong(b"".join(lines[:-1]), expect=LAST)
    assert (problems, chain.expected) == ([], False)
    anew, _ = link(b"".join(LINES[1:]), BEGIN)
    assert not wrong(anew, expect=LAST)[1].expected


def test_lines_that_changed_places_or_were_put_in_show() -> None:
    lines = LOG.splitlines(keepends=True)
    assert wrong(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))[0]
    assert wrong(b"".join([*lines[:2], b'{"id":9}\n', *lines[2:]]))[0] == [(3, "is not in the chain")]
    forged, _ = link(b'{"id":9}\n', BEGIN)
    assert wrong(b"".join([*lines[:2], forged, *lines[2:]]))[0]


def test_what_a_crash_left_is_no_change() -> None:
    """A torn line, which never counted; and lines from before there was a chain."""
    lines = LOG.splitlines(keepends=True)
    problems, chain = wrong(b'{"old":1}\n' + b"".join([*lines[:2], b'{"id":2,"pa\n', *lines[2:]]))
    assert (problems, chain.torn, chain.unlinked, chain.lines) == ([], 1, 1, 5)


def test_the_chain_goes_on_after_a_restart() -> None:
    assert last_hash(LOG) == LAST
    assert last_hash(LOG + b'{"id":5,"to') == LAST
    assert last_hash(LOG[-100:]) == BEGIN  # a line begins before what was read
    assert last_hash(b'{"old":1}\n') == last_hash(b"") == BEGIN
