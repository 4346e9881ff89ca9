"""What an operator writes about a credential is accepted, or refused with what is right."""

from __future__ import annotations

import pytest

from proxy.credential import KINDS, MAX_SECRET, check_kind, check_secret, clean_secret, parse_name
from proxy.problem import UserError
from proxy.secret import Secret


@pytest.mark.parametrize("name", ["github", "a", "GitHub.prod_2-x", "9lives", "a" * 63])
def test_a_plain_name_is_a_name(name: str) -> None:
    assert parse_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a:b", "ä", "a" * 64, "a\n", "*"])
def test_an_odd_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be a credential name"):
        parse_name(name)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("static", {}),
        ("bearer", {}),
        ("basic", {"username": "x-access-token"}),
        ("header", {"name": "X-Api-Key", "value": "Token {secret}"}),
        ("query", {"name": "key"}),
        ("cookie", {"name": "session"}),
        ("placeholder", {"placeholder": "PLACEHOLDER_KEY"}),
    ],
)
def test_each_kind_takes_its_fields(kind: str, fields: dict[str, str]) -> None:
    check_kind(kind, fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("baerer", {}, "unknown kind 'baerer' .did you mean 'bearer'.*static, bearer, basic"),
        ("basic", {"user": "a"}, "no field 'user' .did you mean 'username'.*takes username"),
        ("static", {"name": "a"}, "it takes no fields"),
        ("header", {"name": "x-key", "value": "Token"}, "must contain {secret}"),
        ("header", {"name": "x key"}, "characters a name cannot have"),
        ("cookie", {"name": "a=b"}, "characters a name cannot have"),
        ("header", {"name": "x\r\ny"}, "without control characters"),
        ("query", {"name": ""}, "non-empty"),
        ("basic", {"username": "a:b"}, "must not contain a colon"),
    ],
)
def test_a_wrong_kind_or_field_is_told_with_what_is_right(kind: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_kind(kind, fields)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_one_newline_at_the_end_is_left_out_and_told(newline: bytes) -> None:
    secret, notes = clean_secret(b"s3cret" + newline, "bearer")
    assert secret == Secret(b"s3cret")
    assert notes == ["one newline at the end of the secret was left out"]


def test_nothing_is_told_where_nothing_was_done() -> None:
    assert clean_secret(b"s3cret", "bearer") == (Secret(b"s3cret"), [])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"placeholder"}))
@pytest.mark.parametrize("data", [b"a\nb", b"a\rb", b"a\0b", b"a\n\n", b"\na", b"a\r"])
def test_a_break_inside_is_refused_where_it_would_end_a_header(kind: str, data: bytes) -> None:
    with pytest.raises(UserError, match="line break or NUL inside"):
        clean_secret(data, kind)


def test_a_placeholder_may_stand_for_many_lines() -> None:
    assert clean_secret(b"-----BEGIN-----\nabc\n", "placeholder")[0] == Secret(b"-----BEGIN-----\nabc")


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n"])
def test_an_empty_secret_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="the secret is empty"):
        clean_secret(data, "static")


def test_one_byte_to_one_mebibyte_is_accepted() -> None:
    assert clean_secret(b"x", "static")[0] == Secret(b"x")
    assert clean_secret(b"x" * MAX_SECRET + b"\n", "static")[0] == Secret(b"x" * MAX_SECRET)
    with pytest.raises(UserError, match="more than 64 KiB"):
        clean_secret(b"x" * (MAX_SECRET + 1), "static")


def test_no_message_quotes_the_secret() -> None:
    with pytest.raises(UserError) as caught:
        check_secret(Secret(b"hunter2\nhunter2"), "bearer")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "right"),
    [
        (b"AKIDEXAMPLE:wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", True),
        (b"ASIDEXAMPLE:wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY:FwoGZXIvYXdz/+=", True),
        (b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", False),
        (b"AKIDEXAMPLE:", False),
        (b"AKIDEXAMPLE:wJalrXUtnFEMI and more", False),
    ],
)
def test_an_aws_secret_has_its_key_id_with_it(data: bytes, right: bool) -> None:
    if right:
        assert clean_secret(data, "sigv4")[0].reveal() == data
        return
    with pytest.raises(UserError, match="ACCESS_KEY_ID:SECRET_ACCESS_KEY") as error:
        clean_secret(data, "sigv4")
    assert "wJal" not in str(error.value)


@pytest.mark.parametrize("value", ["S3", "eu central 1", "-x"])
def test_a_service_or_region_is_spelt_as_aws_spells_it(value: str) -> None:
    for field in ("service", "region"):
        with pytest.raises(UserError, match="write it as AWS does"):
            check_kind("sigv4", {field: value})
