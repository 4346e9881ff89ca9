"""Counters and histograms as plain numbers, and their text."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy import series
from proxy.series import Counts, Histogram


def samples(text: str) -> dict[tuple[str, str], float]:
    """What the parser of prometheus_client reads."""
    families = text_string_to_metric_families(text)
    return {(sample.name, sample.labels.get("le", "")): sample.value for f in families for sample in f.samples}


def test_a_bound_belongs_to_its_bucket() -> None:
    """`le` is less or equal."""
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.counts == [1, 2, 1]


def test_buckets_are_cumulative_in_the_text() -> None:
    histogram = Histogram((1e-05, 1.0))
    for value in (0.000001, 0.5, 7.0):
        histogram.observe(value)
    found = samples(series.head("x_seconds", "histogram", "X.") + "".join(histogram.text("x_seconds", 'a="b"')))
    assert found == {
        ("x_seconds_bucket", "1e-05"): 1,
        ("x_seconds_bucket", "1.0"): 2,
        ("x_seconds_bucket", "+Inf"): 3,
        ("x_seconds_sum", ""): 7.500001,
        ("x_seconds_count", ""): 3,
    }


def test_what_is_taken_of_one_histogram_is_added_to_another_once() -> None:
    one, other = Histogram((1.0,)), Histogram((1.0,))
    one.observe(0.5)
    other.observe(2.0)
    other.add(json.loads(json.dumps(one.take())))
    other.add(one.take())
    assert (other.counts, other.total) == ([1, 1], 2.5)


def test_counts_are_taken_once() -> None:
    one: Counts = defaultdict(int, {("a", "b"): 2})
    other: Counts = defaultdict(int, {("a", "b"): 1})
    series.add(other, json.loads(json.dumps(series.take(one))))
    series.add(other, series.take(one))
    assert other == {("a", "b"): 3}


@pytest.mark.parametrize(
    ("before", "names", "expected"),
    [("", (), "x 3\n"), ("", ("l",), 'x{l="v"} 3\n'), ('a="b",', ("l",), 'x{a="b",l="v"} 3\n')],
)
def test_a_line_has_braces_only_around_labels(before: str, names: tuple[str, ...], expected: str) -> None:
    assert series.lines("x", names, defaultdict(int, {("v",) * len(names): 3}), before) == [expected]
