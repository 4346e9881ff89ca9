"""What clients are shown by contexts that show one leaf after the other: real handshakes, in memory."""

from __future__ import annotations

import os
import ssl

import pytest

from proxy import contexts as module
from proxy.address import Host
from proxy.ca import Authority, Leaf, new_ca
from proxy.certificate import utc_now
from proxy.contexts import Contexts
from proxy.tlsdoor import load_leaf

AUTHORITY = Authority(*new_ca(utc_now()))


def leaf(name: str) -> Leaf:
    return AUTHORITY.leaf(Host(name))


def client_context(most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.maximum_version = most
    return context


class Handshake:
    """A client that asks for `name`, and the server that a context of ours is for it."""

    def __init__(
        self, ours: ssl.SSLContext, name: str, client: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> None:
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = ours.wrap_bio(to_server, to_client, server_side=True)
        self.client = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)

    def begin(self) -> None:
        """The client has sent its hello, and the server has not read it."""
        with pytest.raises(ssl.SSLWantReadError):
            self.client.do_handshake()

    def finish(self) -> None:
        """Raises ssl.SSLError when the client does not take what it is shown."""
        done = set()
        for side in [self.client, self.server] * 3:
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
        assert done == {self.client, self.server}
        self.server.write(b"x")
        assert self.client.read(1) == b"x"  # and the ticket before it

    @property
    def shown(self) -> str:
        """The name in the certificate that the client has accepted."""
        certificate = self.client.getpeercert()
        assert certificate
        ((kind, name),) = certificate["subjectAltName"]
        assert kind == "DNS"
        return str(name)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two contexts for whom is asked for once, and two for whom is asked for again."""
    monkeypatch.setattr(module, "MAX_ONCE", 2)
    monkeypatch.setattr(module, "MAX_CONTEXTS", 2)


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_handshakes_under_way_each_show_their_own_leaf(few: None, most: ssl.TLSVersion) -> None:
    """One context may be on its third leaf when the first client goes on."""
    contexts, client = Contexts(), client_context(most)
    names = [f"{letter}.test" for letter in "abcdef"]
    under_way = []
    for name in names:
        handshake = Handshake(contexts.get(leaf(name)), name, client)
        handshake.begin()
        under_way.append(handshake)
    assert len({id(context) for context in contexts._once.values()}) == 2
    for handshake in reversed(under_way):
        handshake.finish()
    assert [handshake.shown for handshake in under_way] == names


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_leaves_of_several_keys_take_turns(few: None, most: ssl.TLSVersion) -> None:
    """With a CA for each agent a context goes from one key to another, and has to be given it."""
    others = [Authority(*new_ca(utc_now())) for _ in range(2)]
    contexts = Contexts()
    for number, authority in enumerate([AUTHORITY, *others, *others, others[0], others[0], AUTHORITY, AUTHORITY]):
        client = ssl.create_default_context(cadata=authority.pem.decode())
        client.maximum_version = most
        name = f"n{number}.test"
        handshake = Handshake(contexts.get(authority.leaf(Host(name))), name, client)
        handshake.begin()
        handshake.finish()
        assert handshake.shown == name


def test_a_key_that_does_not_belong_to_a_leaf_is_not_used() -> None:
    """OpenSSL drops it: the handshake fails, whoever was mistaken about the key."""
    stranger = Authority(*new_ca(utc_now())).leaf(Host("a.test"))
    ours = Contexts().get(stranger)
    load_leaf(ours, leaf("a.test"), has_key=True)
    handshake = Handshake(ours, "a.test", client_context())
    handshake.begin()
    with pytest.raises(ssl.SSLError, match=r"NO_SUITABLE_SIGNATURE_ALGORITHM|NO_SHARED_CIPHER"):
        handshake.finish()


def test_a_leaf_that_cannot_be_read_is_no_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one before it would be shown."""
    ours = Contexts().get(leaf("a.test"))
    for pem in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        monkeypatch.setattr(Leaf, "certificates_pem", pem)
        with pytest.raises(ssl.SSLError):
            load_leaf(ours, leaf("a.test"), has_key=True)


def test_a_client_takes_no_other_name(few: None) -> None:
    handshake = Handshake(Contexts().get(leaf("a.test")), "b.test", client_context())
    handshake.begin()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake.finish()


def test_what_was_shown_last_is_not_read_again(few: None) -> None:
    contexts = Contexts()
    first = contexts.get(leaf("a.test"))
    contexts.get(leaf("b.test"))
    assert contexts.get(leaf("a.test")) is first
    for name in ("c.test", "d.test", "e.test"):
        contexts.get(leaf(name))
    assert [*contexts._once] == [leaf("d.test"), leaf("e.test")]
    assert contexts.get(leaf("a.test")) is first


def test_who_is_asked_for_again_goes_in_the_end_and_its_context_is_the_next_to_show_another(few: None) -> None:
    contexts = Contexts()
    made = {name: contexts.get(leaf(f"{name}.test")) for name in "abc" for _ in range(2)}
    assert [*contexts._again] == [leaf("b.test"), leaf("c.test")]
    assert contexts.get(leaf("b.test")) is made["b"]
    assert [*contexts._once] == [leaf("a.test")]
    contexts.get(leaf("x.test"))
    assert contexts.get(leaf("y.test")) is made["a"]
    for name in "xyuvwuvw":
        contexts.get(leaf(f"{name}.test"))
    assert len({id(context) for context in [*contexts._once.values(), *contexts._again.values()]}) == 4


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed(few: None, most: ssl.TLSVersion) -> None:
    """The certificate need not be signed with again, which is a third of a handshake."""
    contexts, client = Contexts(), client_context(most)
    first = Handshake(contexts.get(leaf("a.test")), "a.test", client)
    first.finish()
    contexts.get(leaf("b.test"))
    second = Handshake(contexts.get(leaf("a.test")), "a.test", client, first.client.session)
    second.finish()
    assert (first.server.session_reused, second.server.session_reused) == (False, True)


def test_showing_many_leaves_leaves_no_descriptor_open(few: None) -> None:
    contexts = Contexts()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        contexts.get(leaf(f"h{number}.test"))
    assert len(os.listdir("/proc/self/fd")) == before
