"""Master keys in every spelling, and seals that hold."""

from __future__ import annotations

import base64
import os
import pickle

import pytest

from proxy.sealing import MasterKey, Record, SealBroken, Stored, open_sealed, seal
from proxy.secret import Secret

KEY = bytes.fromhex("f1" * 16 + "0e" * 16)
RECORD = Record("github", 3, "header", {"name": "x-key", "value": "{secret}"}, {"hosts": ["api.github.com"]})


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        KEY.hex(),
        KEY.hex().upper().encode(),
        f"  {KEY.hex()}\n",
        base64.b64encode(KEY),
        base64.b64encode(KEY).decode().rstrip("="),
        base64.urlsafe_b64encode(KEY).decode() + "\r\n",
        KEY + b"\n",
    ],
)
def test_a_master_key_is_read_in_every_usual_spelling(text: str | bytes) -> None:
    assert MasterKey.parse(text).id == MasterKey(KEY).id


def test_raw_bytes_that_look_like_space_are_not_stripped() -> None:
    key = b"\n" + KEY[1:-1] + b" "
    assert MasterKey.parse(key).id == MasterKey(key).id


@pytest.mark.parametrize("text", ["", "short", KEY.hex()[:-2], KEY.hex() + "00", b"\xff" * 31, b"\xff" * 33])
def test_a_key_of_another_length_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="openssl rand -hex 32"):
        MasterKey.parse(text)


@pytest.mark.parametrize("text", [b"correct horse battery staple ok!", "0123456789abcdef0123456789abcdef"])
def test_a_password_or_half_a_key_is_not_taken_for_raw_bytes(text: str | bytes) -> None:
    """`openssl rand -hex 16` gives 32 characters, and 128 bits."""
    assert len(text) == 32
    with pytest.raises(ValueError, match="64 hex digits"):
        MasterKey.parse(text)


def test_the_message_about_a_bad_key_does_not_quote_it() -> None:
    with pytest.raises(ValueError, match="master key") as caught:
        MasterKey.parse("hunter2hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_master_key_shows_its_public_id_only() -> None:
    master = MasterKey(KEY)
    assert repr(master) == f"MasterKey({master.id})"
    assert KEY.hex() not in f"{master} {master!r} {master.id}"
    assert master.id != MasterKey(os.urandom(32)).id
    with pytest.raises(TypeError):
        pickle.dumps(master)


def test_every_seal_has_its_own_data_key_and_nonces() -> None:
    drawn: list[bytes] = []

    def random(size: int) -> bytes:
        drawn.append(os.urandom(size))
        return drawn[-1]

    sealed = {seal(MasterKey(KEY), RECORD, Secret(b"s3cret"), random) for _ in range(5)}
    assert len(sealed) == 5
    assert sorted(map(len, drawn)) == [12] * 10 + [32] * 5


def test_another_master_key_opens_nothing_and_both_are_named() -> None:
    right, wrong = MasterKey(KEY), MasterKey(os.urandom(32))
    sealed = seal(right, RECORD, Secret(b"s3cret"), os.urandom)
    with pytest.raises(SealBroken, match=f"{right.id}.*{wrong.id}"):
        open_sealed(wrong, RECORD, sealed)


def test_a_forged_key_id_does_not_help() -> None:
    right, wrong = MasterKey(KEY), MasterKey(os.urandom(32))
    sealed = seal(right, RECORD, Secret(b"s3cret"), os.urandom).replace(right.id, wrong.id)
    with pytest.raises(SealBroken, match="changed"):
        open_sealed(wrong, RECORD, sealed)


def test_the_data_key_of_one_version_does_not_fit_the_secret_of_another() -> None:
    """Both layers are bound to the record, so halves of two records cannot be put together."""
    master = MasterKey(KEY)
    old = seal(master, RECORD, Secret(b"old"), os.urandom).split(".")
    new = seal(master, RECORD, Secret(b"new"), os.urandom).split(".")
    with pytest.raises(SealBroken):
        open_sealed(master, RECORD, ".".join([*old[:3], new[3]]))


def test_layers_do_not_stand_in_for_each_other() -> None:
    assert RECORD.associated("key") != RECORD.associated("secret")


def test_the_sealed_text_holds_neither_secret_nor_key() -> None:
    secret = os.urandom(24)
    sealed = seal(MasterKey(KEY), RECORD, Secret(secret), os.urandom)
    decoded = b"".join(base64.urlsafe_b64decode(part + "==") for part in sealed.split(".")[2:])
    assert secret not in decoded
    assert KEY not in decoded


def test_one_byte_and_one_mebibyte_are_sealed_alike() -> None:
    for value in (b"x", os.urandom(1 << 20)):
        sealed = seal(MasterKey(KEY), RECORD, Secret(value), os.urandom)
        assert open_sealed(MasterKey(KEY), RECORD, sealed) == Secret(value)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"version": true}', "[" * 100_000, '{"version": NaN}'])
def test_a_damaged_record_is_broken_not_a_crash(text: str) -> None:
    with pytest.raises(SealBroken):
        Stored.parse("github", text)
