"""What AWS gets is signed as it gets it, by a key the sandbox never saw; its own signature is gone, on both lanes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from tests.h2client import Http2
from tests.harness import Proxy, Reply, Seen, Upstream, refused

pytestmark = pytest.mark.slow
Make = Callable[..., Proxy]
KEY, SECRET, TOKEN = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEXAMPLETOKEN="
RULES = """version: 1
rules:
  - name: bucket
    action: allow
    match: {host: api.test}
    inject: [{credential: aws, as: sigv4, service: s3, region: eu-central-1}]
  - name: table
    action: allow
    match: {host: other.test}
    inject: [{credential: session}]
"""
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
CLAIMS = {
    "authorization": "AWS4-HMAC-SHA256 Credential=FAKE/x, SignedHeaders=host, Signature=00",
    "x-amz-date": "20000101T000000Z",
    "x-amz-security-token": "fake",
}


@pytest.fixture(scope="module")
def proxy(make_proxy: Make, lane: str) -> Proxy:
    proxy = make_proxy(RULES, lane=lane, limits={"buffer": "64KiB"})
    proxy.agent()
    proxy.credential("aws", f"{KEY}:{SECRET}", "--kind", "sigv4", "--host", "api.test")
    words = ("--kind", "sigv4", "--field", "service=dynamodb", "--field", "region=us-east-1", "--host", "other.test")
    proxy.credential("session", f"{KEY}:{SECRET}:{TOKEN}", *words)
    return proxy


def one(seen: Seen, name: str) -> str:
    (value,) = seen.header(name)
    return value


def verified(seen: Seen, service: str, region: str) -> bool:
    """Whether a request is signed, worked out from what arrived as the documentation of AWS has it."""
    claim = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(.+?)/(\d{8})/(.+?)/(.+?)/aws4_request, SignedHeaders=(.+?), "
        r"Signature=([0-9a-f]{64})",
        one(seen, "authorization"),
    )
    assert claim
    access_key, day, *scope, names, sign = claim.groups()
    assert (access_key, scope, names.split(";")) == (KEY, [region, service], sorted(names.split(";")))
    stamp, payload = one(seen, "x-amz-date"), one(seen, "x-amz-content-sha256")
    assert abs(datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(
        minutes=1
    )
    assert stamp.startswith(day)
    assert payload in ("UNSIGNED-PAYLOAD", hashlib.sha256(seen.body).hexdigest(), "STREAMING-UNSIGNED-PAYLOAD-TRAILER")
    wanted = {name.lower() for name, _ in seen.headers if name.lower().startswith("x-amz-")} | {"host"}
    assert wanted <= set(names.split(";"))
    path, _, query = seen.target.partition("?")
    parts = sorted(tuple(part.partition("=")[::2]) for part in query.split("&") if part)
    headers = "".join(f"{name}:{','.join(seen.header(name))}\n" for name in names.split(";"))
    again = path if service == "s3" else quote(path, safe="/-_.~")
    canonical = f"{seen.method}\n{again}\n{'&'.join(map('='.join, parts))}\n{headers}\n{names}\n{payload}"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{day}/{region}/{service}/aws4_request\n"
    text += hashlib.sha256(canonical.encode()).hexdigest()
    key = b"AWS4" + SECRET.encode()
    for part in (day, region, service, "aws4_request", text):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.compare_digest(key.hex(), sign)


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/", "/"),
        ("/photos/a$b%20(c)'d*.jpg?versionId=1&acl", "/photos/a%24b%20%28c%29%27d%2A.jpg?versionId=1&acl"),
        ("/k?b=2&a=x+y&a=%2B", "/k?b=2&a=x%20y&a=%2B"),
        ("/k?X-Amz-Credential=FAKE&X-Amz-Signature=00&X-Amz-Date=x&list-type=2", "/k?list-type=2"),
    ],
)
def test_a_request_is_signed_as_it_is_sent(proxy: Proxy, upstream: Upstream, target: str, sent: str) -> None:
    response = proxy.get(f"https://api.test{target}", headers={**CLAIMS, "x-amz-acl": "private"})
    assert response.status == 200
    (seen,) = upstream.seen
    assert seen.target == sent
    assert verified(seen, "s3", "eu-central-1")
    assert one(seen, "x-amz-acl") == "private"
    assert seen.header("x-amz-security-token") == []
    assert "FAKE" not in str(seen)
    (line,) = proxy.audit(id=proxy.audit(1, host="api.test")[-1]["id"])
    assert [(entry["credential"], entry["location"]) for entry in line["injected"]] == [("aws", "sigv4")]


def test_a_body_for_s3_streams_unsigned(proxy: Proxy, upstream: Upstream) -> None:
    """More than `limits.buffer`: over TLS the payload need not be in the signature."""
    body = bytes(300_000)
    assert proxy.get("https://api.test/big", method="PUT", body=body).status == 200
    (seen,) = upstream.seen
    assert (one(seen, "x-amz-content-sha256"), seen.body) == ("UNSIGNED-PAYLOAD", body)
    assert verified(seen, "s3", "eu-central-1")


def test_any_other_service_gets_the_hash_of_the_body(proxy: Proxy, upstream: Upstream) -> None:
    """Held up to `limits.buffer`; service and region are the credential's own, and so is a session token."""
    body = b'{"TableName": "t"}'
    headers = {**CLAIMS, "x-amz-target": "DynamoDB_20120810.Scan", "content-type": "application/x-amz-json-1.0"}
    assert proxy.get("https://other.test/a%20b", method="POST", headers=headers, body=body).status == 200
    (seen,) = upstream.seen
    assert seen.body == body
    assert one(seen, "x-amz-content-sha256") == hashlib.sha256(body).hexdigest()
    assert one(seen, "x-amz-security-token") == TOKEN
    assert verified(seen, "dynamodb", "us-east-1")


def test_so_it_is_in_http2(proxy: Proxy, upstream: Upstream) -> None:
    client = Http2(proxy.tunnel("other.test", alpn="h2"))
    stream = client.request("/", "other.test", "POST", [("content-length", "2")], body=b"{}")
    assert client.response(stream).status == 200
    (seen,) = upstream.seen
    assert verified(seen, "dynamodb", "us-east-1")


@pytest.mark.parametrize(
    ("url", "headers", "body", "code"),
    [
        ("https://other.test/", {}, bytes(70_000), "body_too_large"),
        ("https://other.test/", {"transfer-encoding": "chunked"}, None, "body_too_large"),
        (
            "https://api.test/",
            {"x-amz-content-sha256": SIGNED_CHUNKS},
            b"x",
            "protocol_not_allowed",
        ),
    ],
    ids=["too large", "of unknown length", "signed in chunks"],
)
def test_a_body_that_cannot_be_signed_is_refused(
    proxy: Proxy, upstream: Upstream, url: str, headers: dict[str, str], body: bytes | None, code: str
) -> None:
    refused(proxy.get(url, method="POST", headers=headers, body=body), code)
    assert upstream.seen == []


def test_chunks_without_signatures_pass(proxy: Proxy, upstream: Upstream) -> None:
    """What AWS's SDKs send with a checksum in a trailer of the body."""
    headers = {"x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "x-amz-trailer": "x-amz-checksum-crc32"}
    body = b"2\r\nhi\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    assert proxy.get("https://api.test/k", method="PUT", headers=headers, body=body).status == 200
    (seen,) = upstream.seen
    assert (one(seen, "x-amz-content-sha256"), seen.body) == (headers["x-amz-content-sha256"], body)
    assert verified(seen, "s3", "eu-central-1")


def test_neither_key_nor_token_comes_back(proxy: Proxy, upstream: Upstream) -> None:
    upstream.handler = lambda seen: Reply(body=f"{SECRET} {TOKEN} {seen.header('x-amz-security-token')}".encode())
    body = proxy.get("https://other.test/").body.decode()
    assert SECRET not in body
    assert TOKEN not in body
    assert body.count("[redacted:session]") == 3


def test_a_secret_of_another_form_is_not_taken(proxy: Proxy) -> None:
    result = proxy.cli(
        "vault", "put", "bad", "--kind", "sigv4", "--host", "api.test", stdin="hunter2hunter2", check=False
    )
    assert result.returncode == 1
    assert "ACCESS_KEY_ID:SECRET_ACCESS_KEY" in result.stderr
    assert "hunter2" not in result.stderr
