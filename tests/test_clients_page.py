"""docs/clients.md says what tests/clients measures."""

from __future__ import annotations

from tests.clients.matrix import PAGE, page


def test_the_table_of_the_docs_is_the_one_that_is_tested() -> None:
    """`python -m tests.clients.matrix` writes it."""
    text = PAGE.read_text()
    assert page(text) == text
