"""Whatever is sealed opens for exactly its record, and no text whatever raises anything but SealBroken."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.sealing import MasterKey, Record, SealBroken, Stored, open_sealed, seal
from proxy.secret import Secret

MASTER = MasterKey(bytes(range(32)))

texts = st.text(max_size=12)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
grants = st.dictionaries(texts, leaves | st.lists(texts, max_size=3), max_size=4)
records = st.builds(
    Record,
    name=texts,
    version=st.integers(min_value=0),
    kind=texts,
    fields=st.dictionaries(texts, texts, max_size=3),
    grant=grants,
)
secrets = st.binary(max_size=200).map(Secret)


def randomness(seed: int) -> Callable[[int], bytes]:
    """A stream that never repeats, the same for one seed."""
    drawn = 0

    def random(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_128(f"{seed}/{drawn}".encode()).digest(size)

    return random


@given(records, secrets, st.integers())
def test_sealed_text_opens_for_its_record(record: Record, secret: Secret, seed: int) -> None:
    assert open_sealed(MASTER, record, seal(MASTER, record, secret, randomness(seed))) == secret


@given(records, records, secrets)
def test_sealed_text_opens_for_no_other_record(record: Record, other: Record, secret: Secret) -> None:
    assume(record.associated("") != other.associated(""))
    with pytest.raises(SealBroken):
        open_sealed(MASTER, other, seal(MASTER, record, secret, randomness(0)))


@given(records, st.data())
def test_a_change_of_one_part_breaks_the_seal(record: Record, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(["name", "version", "kind", "fields", "grant"]))
    changed = replace(record, **{part: getattr(data.draw(records), part)})
    assume(changed != record)
    with pytest.raises(SealBroken):
        open_sealed(MASTER, changed, seal(MASTER, record, Secret(b"x"), randomness(0)))


@given(records, texts, texts, texts)
def test_text_does_not_move_between_neighbours(record: Record, one: str, two: str, three: str) -> None:
    """Name `ab` + kind `c` is not name `a` + kind `bc`."""
    assume(two)
    left = replace(record, name=one + two, kind=three)
    right = replace(record, name=one, kind=two + three)
    assert left.associated("") != right.associated("")


@given(st.data())
def test_a_change_of_one_character_breaks_the_seal(data: st.DataObject) -> None:
    record = Record("github", 1, "bearer", {}, {})
    sealed = seal(MASTER, record, Secret(b"some secret"), randomness(0))
    at = data.draw(st.integers(0, len(sealed) - 1))
    char = data.draw(st.characters())
    assume(sealed[at] != char)
    with pytest.raises(SealBroken):
        open_sealed(MASTER, record, sealed[:at] + char + sealed[at + 1 :])


@given(st.text() | st.from_regex(r"sp1\.[0-9a-f]{12}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", fullmatch=True))
def test_no_text_opens_or_crashes(sealed: str) -> None:
    with pytest.raises(SealBroken):
        open_sealed(MASTER, Record("a", 1, "static", {}, {}), sealed)


json_values = st.recursive(
    leaves | st.floats(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("version", "kind", "fields", "grant", "sealed", "created", "rotated"), json_values),
    )
)
def test_no_stored_record_crashes(data: dict[str, object]) -> None:
    with contextlib.suppress(SealBroken):
        stored = Stored.parse("a", json.dumps(data))
        open_sealed(MASTER, stored.record, stored.sealed)


@given(st.text() | st.sampled_from(["[" * 100_000, "null", "1", '{"version": 1e999}', "\ud800"]))
def test_no_stored_text_crashes(text: str) -> None:
    with contextlib.suppress(SealBroken):
        Stored.parse("a", text)


@given(records, secrets)
def test_a_stored_record_reads_back_the_same(record: Record, secret: Secret) -> None:
    stored = Stored(record, seal(MASTER, record, secret, randomness(0)), 1.5, None)
    back = Stored.parse(record.name, stored.text())
    assert back == stored
    assert open_sealed(MASTER, back.record, back.sealed) == secret
