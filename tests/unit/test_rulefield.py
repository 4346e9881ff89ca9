"""What each value may be is in tests/golden/problems_*.txt; here is what everything has in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy import rulefield

PARSERS = [
    value
    for name, value in sorted(vars(rulefield).items())
    if name.startswith("parse_") and value.__module__ == rulefield.__name__
]
ODD = [None, True, 5, 1.5, [], {}, ["a"], {"a": "b"}]


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_what_is_no_text_is_refused_in_words(parse: Callable[[object], object], value: object) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse(value)
    message, hint = caught.value.args
    assert message.startswith("expected ")
    assert isinstance(hint, str)


@pytest.mark.parametrize("name", ["Host", "Content-Length", "Proxy-Authorization", "Sallyport-X", "TE", "keep-alive"])
def test_no_spelling_of_the_proxys_own_headers_may_be_changed(name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        rulefield.parse_header_name(name)


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "Cookie", "x-proxy"])
def test_other_headers_may(name: str) -> None:
    assert rulefield.parse_header_name(name) == name.lower()
