"""TLS in whole records: however what arrives is cut, nothing is lost, kept back or read past the end."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Iterator

import pytest
import trustme

from proxy.cipher import RECORD, TAKEN, Cipher

CA = trustme.CA()
LEAF = CA.issue_cert("api.test")
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Peer:
    """The other end by the standard library alone, whose ciphertext can be sent in any pieces."""

    def __init__(self, sock: socket.socket, most: ssl.TLSVersion) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = most
        LEAF.configure_cert(context)
        self.sock = sock
        self.inward, self.outward = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.inward, self.outward, server_side=True)

    def coded(self, data: bytes) -> bytes:
        """Records with `data`."""
        while data:
            data = data[self.tls.write(data) :]
        return self.outward.read()

    def goodbye(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.outward.read()


@pytest.fixture(params=VERSIONS, ids=["1.2", "1.3"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Cipher, Peer]]:
    """Both ends after a handshake; what the peer said behind it waits to be read."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        CA.configure_trust(context)
        cipher, peer = Cipher(context, ours, {"server_hostname": "api.test"}), Peer(theirs, request.param)
        done = agreed = False
        while not (done and agreed):
            if not done:
                done = cipher.shake()
                cipher.flush()
            if not agreed:
                peer.inward.write(theirs.recv(TAKEN))
                try:
                    peer.tls.do_handshake()
                    agreed = True
                except ssl.SSLWantReadError:
                    pass
                theirs.send(peer.outward.read())
            if not done:
                cipher.fill()
        yield cipher, peer


def everything(cipher: Cipher) -> bytes:
    """All that can be read without waiting."""
    data = b""
    while True:
        try:
            data += cipher.read()
        except BlockingIOError:
            return data


@pytest.mark.parametrize("size", [1, 4, 5, 6, 1000, RECORD, TAKEN - 1])
def test_records_come_out_however_they_are_cut(ends: tuple[Cipher, Peer], size: int) -> None:
    """Inside their heads, too."""
    cipher, peer = ends
    data = random.Random(size).randbytes(3 * RECORD + 77 if size >= 1000 else 300)
    parts = [data[:1], data[1:9], data[9:]]
    coded, got = b"".join(map(peer.coded, parts)), b""
    for at in range(0, len(coded), size):
        peer.sock.send(coded[at : at + size])
        got += everything(cipher)
    assert got == data
    assert not cipher.held


def test_many_records_are_read_at_once(ends: tuple[Cipher, Peer]) -> None:
    """One call of the kernel takes some full ones."""
    cipher, peer = ends
    everything(cipher)  # session tickets
    peer.sock.send(peer.coded(bytes(4 * RECORD)))
    assert len(cipher.read()) >= 3 * RECORD


def test_what_was_read_with_the_handshake_is_there(ends: tuple[Cipher, Peer]) -> None:
    """A server may speak in the packet that ends it."""
    cipher, peer = ends
    peer.sock.send(peer.coded(b"hello"))
    assert everything(cipher) == b"hello"


def test_the_end_comes_after_what_was_said(ends: tuple[Cipher, Peer]) -> None:
    """Though it came with it; what follows it is not read (RFC 8446 section 6.1)."""
    cipher, peer = ends
    peer.sock.send(peer.coded(b"bye") + peer.goodbye() + b"more")
    data = b""
    while not data:
        data = cipher.read()
    assert data == b"bye"
    assert cipher.held
    for _ in range(2):
        with pytest.raises(ssl.SSLZeroReturnError):
            cipher.read()


def test_what_was_changed_on_its_way_is_an_error_and_stays_one(ends: tuple[Cipher, Peer]) -> None:
    """What came before it is still good; it never looks like an end."""
    cipher, peer = ends
    everything(cipher)
    changed = bytearray(peer.coded(b"changed"))
    changed[-1] ^= 1
    peer.sock.send(peer.coded(b"") + bytes(changed) + peer.coded(b"behind it"))
    for _ in range(2):
        with pytest.raises(ssl.SSLError) as caught:
            cipher.read()
        assert not isinstance(caught.value, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def test_a_cut_is_no_goodbye(ends: tuple[Cipher, Peer]) -> None:
    """In the middle of a record, too."""
    cipher, peer = ends
    peer.sock.send(peer.coded(b"cut short")[:-3])
    assert everything(cipher) == b""
    peer.sock.close()
    with pytest.raises(ssl.SSLEOFError):
        cipher.read()


def test_what_cannot_be_sent_waits(ends: tuple[Cipher, Peer]) -> None:
    """And goes out in the order in which it was said."""
    cipher, peer = ends
    said = [bytes([number]) * 5 * RECORD for number in range(40)]
    sent = [cipher.send(data) for data in said]
    assert not all(sent)
    got = b""
    while len(got) < sum(map(len, said)):
        peer.inward.write(peer.sock.recv(TAKEN))
        try:
            while True:
                got += peer.tls.read(RECORD)
        except ssl.SSLWantReadError:
            pass
        try:
            cipher.flush()
        except BlockingIOError:
            continue
    assert got == b"".join(said)


def test_buffers_stay_small(ends: tuple[Cipher, Peer]) -> None:
    """They never shrink: of all that goes through them they hold a record at most."""
    cipher, peer = ends
    peer.sock.send(peer.coded(bytes(5 * RECORD)))
    everything(cipher)
    cipher.send(bytes(5 * RECORD))
    assert cipher.inward.pending == cipher.outward.pending == 0
