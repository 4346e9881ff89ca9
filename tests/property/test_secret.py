"""A Secret occurs in nothing that is written, shown or sent by accident."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import pickle
import pprint
import reprlib
import string
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.outbound import Opened
from proxy.secret import Secret

# Long and of letters that none of the text around it has in that order.
SECRETS = st.text(string.ascii_letters + string.digits, min_size=12, max_size=40).map(str.encode)


def opened(value: bytes) -> Opened:
    return Opened("name", 1, "bearer", {}, Secret(value))


def fail(secret: Secret, holder: Opened) -> None:
    """Has both among its locals."""
    raise RuntimeError("refused", secret, holder)


@given(SECRETS)
def test_no_text_shows_a_secret(value: bytes) -> None:
    secret, holder = Secret(value), opened(value)
    texts = [
        repr(secret),
        str(secret),
        f"{secret} {secret!r} {secret!a} {holder} {[secret]} { {'a': secret} }",
        "%s %r %a" % (secret, secret, holder),  # noqa: UP031
        "{} {!r}".format(secret, holder),  # noqa: UP032
        ascii(secret),
        pprint.pformat({"a": [secret, holder]}),
        reprlib.repr([secret]),
        json.dumps({"a": secret, "b": holder}, default=str),
        json.dumps({"a": secret, "b": holder}, default=repr),
        repr(dir(secret)),
    ]
    assert not [text for text in texts if value.decode() in text]


@given(SECRETS)
def test_no_traceback_shows_a_secret(value: bytes) -> None:
    """Also with the locals of every frame."""
    try:
        fail(Secret(value), opened(value))
    except RuntimeError as error:
        del value  # ours; the rest of this frame is looked at too
        whole = traceback.TracebackException.from_exception(error, capture_locals=True, lookup_lines=True)
        shown = "".join(whole.format()) + "".join(traceback.format_exception(error)) + repr(error.args)
        held: bytes = error.args[1].reveal()
        assert "secret = Secret(...)" in shown
        assert held.decode() not in shown


@given(SECRETS)
def test_no_log_shows_a_secret(value: bytes) -> None:
    stream = io.StringIO()
    logger = logging.Logger("test")  # noqa: LOG001  # one of its own, with no handlers above it
    logger.addHandler(logging.StreamHandler(stream))
    logger.error("%s %r %s", Secret(value), Secret(value), opened(value))
    try:
        fail(Secret(value), opened(value))
    except RuntimeError:
        logger.exception("it failed")
    assert "Secret(...)" in stream.getvalue()
    assert value.decode() not in stream.getvalue()


@pytest.mark.parametrize(
    "copied",
    [
        *(lambda secret, protocol=protocol: pickle.dumps(secret, protocol) for protocol in range(6)),
        copy.copy,
        copy.deepcopy,
        json.dumps,
        bytes,
        vars,
        list,
        hash,
        lambda secret: f"{secret:x}",
        lambda secret: dataclasses.asdict(Opened("name", 1, "bearer", {}, secret)),
        lambda secret: json.dumps(secret, default=vars),
    ],
)
@given(value=SECRETS)
def test_what_would_copy_a_secret_fails_and_does_not_quote_it(copied: Any, value: bytes) -> None:
    with pytest.raises(TypeError) as failed:
        copied(Secret(value))
    assert value.decode() not in str(failed.value)


@given(SECRETS, SECRETS)
def test_secrets_are_equal_when_their_values_are(one: bytes, other: bytes) -> None:
    assert (Secret(one) == Secret(other)) is (one == other)
    assert Secret(one) != one
