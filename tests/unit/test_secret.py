"""A Secret tells its value to whoever asks by name, and to nobody else: tests/property."""

from __future__ import annotations

import pytest

from proxy.secret import Secret


def test_reveal_is_the_only_way_out() -> None:
    assert Secret(b"s3cret").reveal() == b"s3cret"
    assert repr(Secret(b"s3cret")) == str(Secret(b"s3cret")) == "Secret(...)"


def test_a_secret_takes_no_other_attributes() -> None:
    with pytest.raises(AttributeError):
        Secret(b"s3cret").note = "x"  # type: ignore[attr-defined]


def test_secrets_compare_by_value_with_secrets_alone() -> None:
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"


def test_a_secret_is_no_key() -> None:
    """A dict of them would be looked up in time that depends on the value."""
    with pytest.raises(TypeError):
        hash(Secret(b"a"))
