"""Frames of HTTP/2: counted whatever the borders of packets, cut where a piece of work ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.frames import CONTROL, PREFACE, RESETS, Flood, FrameBudget, FrameReader

DATA, HEADERS, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END = 4


def frame(kind: int, length: int = 4, flags: int = 0) -> bytes:
    return length.to_bytes(3) + bytes([kind, flags]) + b"\0\0\0\1" + b"x" * length


def reader(limit: int = 1000, skip: int = 0) -> FrameReader:
    return FrameReader(limit, FrameBudget(), skip)


@given(st.lists(st.tuples(st.sampled_from([DATA, HEADERS, WINDOW, PING]), st.integers(0, 40))), st.data())
def test_pieces_are_the_data(frames: list[tuple[int, int]], data: st.DataObject) -> None:
    """Nothing is lost or moved, and a piece ends where a frame does."""
    whole = b"x" * PREFACE + b"".join(frame(kind, length, END) for kind, length in frames)
    cut = data.draw(st.integers(0, len(whole)))
    follow = reader(skip=PREFACE)
    pieces = follow.pieces(whole[:cut], 0.0) + follow.pieces(whole[cut:], 0.0)
    assert b"".join(pieces) == whole


def test_two_requests_are_a_piece() -> None:
    """What comes behind them waits for its turn."""
    request = frame(HEADERS, 10, END)
    assert reader().pieces(request * 5, 0.0) == [request * 2, request * 2, request]


def test_a_body_is_one_piece() -> None:
    """However large: it is passed on, not worked on."""
    body = frame(HEADERS, 10, END) + frame(DATA, 60_000)
    assert reader().pieces(body, 0.0) == [body]


@pytest.mark.parametrize("step", [1, 7, 13, 1000])
def test_resets_are_counted_whatever_the_packets(step: int) -> None:
    """A frame's header may come byte by byte."""
    data, follow = frame(RST) * (int(RESETS[0]) + 1), reader()
    with pytest.raises(Flood, match="reset"):
        for at in range(0, len(data), step):
            follow.pieces(data[at : at + step], 0.0)


def test_a_budget_comes_back_with_time() -> None:
    """And never more of it than there was."""
    follow = reader()
    for now in range(100, 120):
        follow.pieces(frame(RST) * int(RESETS[1]), float(now))
    follow.pieces(frame(RST) * int(RESETS[0]), 1000.0)
    with pytest.raises(Flood):
        follow.pieces(frame(RST), 1000.0)


@pytest.mark.parametrize("kind", [PING, SETTINGS, 0xBE])
def test_frames_that_carry_nothing_are_counted(kind: int) -> None:
    """Also those of a type nobody knows."""
    with pytest.raises(Flood, match="nothing"):
        reader().pieces(frame(kind) * (int(CONTROL[0]) + 1), 0.0)


def test_a_header_block_is_bounded() -> None:
    """Over all its frames; the next one begins anew."""
    follow = reader(limit=1000)
    for _ in range(5):
        follow.pieces(frame(HEADERS, 500) + frame(CONTINUATION, 500, END), 0.0)
    with pytest.raises(Flood, match="header block"):
        follow.pieces(frame(HEADERS, 500) + frame(CONTINUATION, 501), 0.0)
