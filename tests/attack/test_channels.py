"""Ways to carry data out towards hosts that a wildcard allows: narrow where a rule says so; no DNS over HTTPS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness import Proxy, Upstream, refused
from tests.nameserver import Nameserver

type Make = Callable[..., Proxy]

RULES = """
version: 1
rules:
  - name: tenants
    match: {host: ["**.api.test", "**.lookup.test"]}
    action: allow
    limits: {max_labels: 1, max_url: 120}
  - name: everything
    match: {host: "**"}
    action: allow
"""


@pytest.fixture(scope="module")
def nameserver() -> Iterator[Nameserver]:
    with Nameserver() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, nameserver: Nameserver, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, upstream={"nameservers": [f"127.0.0.1:{nameserver.port}"]})
    proxy.agent()
    return proxy


@pytest.mark.parametrize("host", ["a.b.lookup.test", "6e6f7468696e67.746f.736565.lookup.test", "a.b.api.test"])
def test_a_name_with_too_many_labels_is_not_even_asked_of_dns(
    proxy: Proxy, upstream: Upstream, nameserver: Nameserver, host: str
) -> None:
    nameserver.asked.clear()
    error = refused(proxy.get(f"https://{host}/"), "limit_exceeded")
    assert error["rule"] == "tenants"
    assert "too many labels" in error["message"]
    assert (nameserver.asked, upstream.seen) == ([], [])
    assert proxy.metric("sallyport_limits_exceeded_total", agent="coder-1", rule="tenants", limit="max_labels") > 0


def test_one_label_is_let_through(proxy: Proxy, upstream: Upstream) -> None:
    assert proxy.get("https://a.api.test/").status == 200


@pytest.mark.parametrize("target", ["/" + "d" * 120, "/?" + "d" * 120, "/%64" + "%64" * 110])
def test_a_url_that_is_too_long_does_not_leave(proxy: Proxy, upstream: Upstream, target: str) -> None:
    refused(proxy.get(f"https://a.api.test{target}"), "limit_exceeded")
    assert upstream.seen == []
    assert proxy.get(f"https://a.api.test{target[:40]}").status == 200


@pytest.mark.parametrize("host", ["dns.google", "dns.quad9.net", "cloudflare-dns.com", "mozilla.cloudflare-dns.com"])
@pytest.mark.parametrize("path", ["/dns-query?dns=AAAB", "/resolve?name=data.attacker.test", "/"])
def test_no_wildcard_leads_to_a_resolver(
    proxy: Proxy, upstream: Upstream, nameserver: Nameserver, host: str, path: str
) -> None:
    nameserver.asked.clear()
    error = refused(proxy.get(f"https://{host}{path}"), "no_rule")
    assert error["rule"] is None
    assert (nameserver.asked, upstream.seen) == ([], [])


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "9.9.9.9"])
def test_no_wildcard_leads_to_a_resolvers_address(proxy: Proxy, upstream: Upstream, address: str) -> None:
    refused(proxy.get(f"https://{address}/dns-query?dns=AAAB"), "no_rule")
