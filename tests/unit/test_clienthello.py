"""What a ClientHello asks for is read as mitmproxy's parser reads it; what is odd is not read at all."""

from __future__ import annotations

import ssl

import pytest
from mitmproxy.proxy.layers.tls import parse_client_hello as reference

from proxy.clienthello import MAX_HELLO, ClientHello, is_tls, parse_client_hello


def hello(
    server_name: str | None = "api.test",
    protocols: tuple[str, ...] = (),
    most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
) -> bytes:
    """What a real client sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = most
    if protocols:
        context.set_alpn_protocols(list(protocols))
    sent = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return sent.read()


def made(*extensions: tuple[int, bytes], body: bytes | None = None) -> bytes:
    """A ClientHello record by hand, of these extensions or of any body."""
    if body is None:
        packed = b"".join(kind.to_bytes(2) + len(data).to_bytes(2) + data for kind, data in extensions)
        body = b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00" + len(packed).to_bytes(2) + packed
    message = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(message).to_bytes(2) + message


def name_list(*names: bytes, kind: int = 0) -> bytes:
    entries = b"".join(bytes([kind]) + len(name).to_bytes(2) + name for name in names)
    return len(entries).to_bytes(2) + entries


NAME = (0, name_list(b"api.test"))
ALPN = (16, b"\x00\x0c\x02h2\x08http/1.1")
GREASE = (0x1A1A, b"\x00")
PADDING = (21, bytes(4000))
KEYS = (51, (1220).to_bytes(2) + b"\x11\xec" + (1216).to_bytes(2) + bytes(1216))  # X25519MLKEM768

REAL = {
    "a name": hello(),
    "no name": hello(None),
    "h2 and http/1.1": hello(protocols=("h2", "http/1.1")),
    "http/1.1 alone": hello(protocols=("http/1.1",)),
    "h2 alone, no name": hello(None, ("h2",)),
    "TLS 1.2": hello(protocols=("h2", "http/1.1"), most=ssl.TLSVersion.TLSv1_2),
    "GREASE around everything": made(GREASE, NAME, ALPN, (0xFAFA, b"")),
    "GREASE among the protocols": made(NAME, (16, b"\x00\x0c\x02\x5a\x5a\x08http/1.1")),
    "a post-quantum key share": made(NAME, KEYS, ALPN),
    "much padding": made(PADDING, NAME, ALPN),
    "extensions of no length": made(),
    "no extensions": made(body=b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"),
}


@pytest.mark.parametrize("case", REAL)
def test_it_is_read_as_mitmproxy_reads_it(case: str) -> None:
    theirs, ours = reference(REAL[case]), parse_client_hello(REAL[case])
    assert theirs
    assert ours == ClientHello(theirs.sni, tuple(theirs.alpn_protocols))


def test_what_is_asked_for_is_found() -> None:
    assert parse_client_hello(REAL["h2 and http/1.1"]) == ClientHello("api.test", (b"h2", b"http/1.1"))
    assert parse_client_hello(REAL["no name"]) == ClientHello(None, ())


def test_an_encrypted_hello_is_told() -> None:
    """The name that is read then is not the one that counts (ECH)."""
    assert parse_client_hello(made(NAME, (0xFE0D, b"\x00"))) == ClientHello("api.test", (), encrypted=True)


@pytest.mark.parametrize("case", REAL)
def test_cut_anywhere_it_is_incomplete(case: str) -> None:
    """Never wrong, and never half of an answer."""
    whole = REAL[case]
    for end in range(0, len(whole), max(1, len(whole) // 700)):
        assert is_tls(whole[:end])
        assert parse_client_hello(whole[:end]) is None
    assert parse_client_hello(whole[:-1]) is None


def test_what_follows_the_first_record_is_not_looked_at() -> None:
    """A client may send its early data right behind."""
    assert parse_client_hello(REAL["a name"] + b"\x17\x03\x03\xff\xff") == ClientHello("api.test")


def test_the_largest_record_is_read() -> None:
    empty = len(made(NAME, (21, b"")))
    whole = made(NAME, (21, bytes(MAX_HELLO - empty)))
    assert len(whole) == MAX_HELLO
    assert parse_client_hello(whole) == ClientHello("api.test")


FIXED = b"\x03\x03" + bytes(32)
ODD = {
    "no TLS": b"GET / HTTP/1.1\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "SSL 2": b"\x80\x2e\x01\x03\x01\x00\x15",
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "an empty record": b"\x16\x03\x01\x00\x00",
    "a record too short for a message, and a length behind it": b"\x16\x03\x01\x00\x01\x01\x00\x00\x00",
    "a message without a body": b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
    "a record that is too long": b"\x16\x03\x01\x40\x01" + bytes(0x4001),
    "another message": b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
    "a message over two records": b"\x16\x03\x01\x00\x05\x01\x00\x01\x00\x00",
    "two messages in a record": b"\x16\x03\x01\x00\x09\x01\x00\x00\x00" + b"\x01\x00\x00\x01\x00",
    "only a version": made(body=b"\x03\x03"),
    "a session id that is too long": made(body=FIXED + b"\x21" + bytes(32)),
    "no compression methods": made(body=FIXED + b"\x00" + b"\x00\x02\x13\x01"),
    "half a length of extensions": made(body=FIXED + b"\x00\x00\x02\x13\x01\x01\x00" + b"\x00"),
    "bytes behind the extensions": made(body=FIXED + b"\x00\x00\x02\x13\x01\x01\x00" + b"\x00\x00" + b"\x00"),
    "an extension longer than all": made(body=FIXED + b"\x00\x00\x02\x13\x01\x01\x00" + b"\x00\x04\x00\x00\x00\x01"),
    "half an extension": made(body=FIXED + b"\x00\x00\x02\x13\x01\x01\x00" + b"\x00\x01\x00"),
    "two lists of names": made(NAME, (0, name_list(b"other.test"))),
    "an extension twice, both empty": made((23, b""), NAME, (23, b"")),
    "two names": made((0, name_list(b"api.test", b"other.test"))),
    "a name of another type": made((0, name_list(b"api.test", kind=1))),
    "bytes behind the names": made((0, name_list(b"api.test") + b"\x00")),
    "an empty list of names": made((0, b"\x00\x00")),
    "a list of names without a length": made((0, b"")),
    "bytes behind the protocols": made((16, b"\x00\x03\x02h2\x00")),
    "a protocol longer than the list": made((16, b"\x00\x03\x03h2")),
}


@pytest.mark.parametrize("case", ODD)
def test_what_another_reader_could_read_otherwise_is_refused(case: str) -> None:
    """The rest of the proxy, and OpenSSL, would act on another name."""
    with pytest.raises(ValueError, match=r"ClientHello|record|name"):
        parse_client_hello(ODD[case])


def test_a_name_that_is_not_ascii_is_no_name_of_anything() -> None:
    """It differs from every host a tunnel can have, so it is a mismatch and no error."""
    found = parse_client_hello(made((0, name_list("ä.test".encode()))))
    assert found
    assert found.server_name == "\ufffd\ufffd.test"


@pytest.mark.parametrize(
    ("start", "may"),
    [(b"", True), (b"\x16", True), (b"\x16\x03", True), (b"\x16\x03\x03", True), (b"\x16\x03\x04", False)],
)
def test_the_start_of_a_handshake_is_told(start: bytes, may: bool) -> None:
    assert is_tls(start) is may


@pytest.mark.parametrize("start", [b"G", b"\x16\x02", b"\x16\x03\x05", b"\x17\x03\x03", b"\x80\x2e\x01"])
def test_so_is_what_cannot_be_one(start: bytes) -> None:
    assert not is_tls(start)
