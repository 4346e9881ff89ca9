"""Signatures are those that AWS publishes for its own examples, with their example keys."""

from __future__ import annotations

import pytest

from proxy.sigv4 import (
    UNSIGNED,
    Scope,
    authorization,
    canonical_request,
    hash_of,
    is_of_signature,
    sent_path,
    sent_query,
    signature,
    signed_headers,
)

# AWS Signature Version 4 test suite, aws-sig-v4-test-suite.zip: keys AKIDEXAMPLE, us-east-1, "service".
SUITE_KEY = b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SUITE = Scope("service", "us-east-1", "20150830T123600Z")
SUITE_HEADERS = [(b"Host", b"example.amazonaws.com"), (b"X-Amz-Date", b"20150830T123600Z")]

# Amazon S3 API Reference, "Signature Calculations for the Authorization Header: Transferring
# Payload in a Single Chunk".
S3_KEY = b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
S3 = Scope("s3", "us-east-1", "20130524T000000Z")
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def suite(
    method: str, path: str, query: str = "", more: list[tuple[bytes, bytes]] | None = None, body: bytes = b""
) -> str:
    headers = signed_headers([*SUITE_HEADERS, *(more or [])])
    canonical = canonical_request(method, path, query, headers, hash_of(body), encode_again=False)
    return signature(canonical, SUITE, SUITE_KEY)


@pytest.mark.parametrize(
    ("name", "sign", "expected"),
    [
        ("get-vanilla", suite("GET", "/"), "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        (
            "get-vanilla-query-order-key-case",
            suite("GET", "/", "Param2=value2&Param1=value1"),
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        ("post-vanilla", suite("POST", "/"), "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        (
            "post-x-www-form-urlencoded",
            suite("POST", "/", "", [(b"Content-Type", b"application/x-www-form-urlencoded")], b"Param1=value1"),
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        ),
        (
            "get-utf8",
            suite("GET", sent_path("/%E1%88%B4")),
            "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
        ),
    ],
)
def test_the_test_suite_of_aws(name: str, sign: str, expected: str) -> None:
    assert sign == expected, name


def s3(method: str, path: str, query: str = "", more: list[tuple[str, str]] | None = None, payload: str = EMPTY) -> str:
    fields = {"host": "examplebucket.s3.amazonaws.com", "x-amz-content-sha256": payload, "x-amz-date": S3.stamp}
    headers = {**fields, **dict(more or [])}
    canonical = canonical_request(method, path, sent_query(query), headers, payload, encode_again=False)
    return signature(canonical, S3, S3_KEY)


@pytest.mark.parametrize(
    ("name", "sign", "expected"),
    [
        (
            "GET Object",
            s3("GET", "/test.txt", more=[("range", "bytes=0-9")]),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT Object",
            s3(
                "PUT",
                sent_path("/test$file.text"),
                more=[("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")],
                payload=hash_of(b"Welcome to Amazon S3."),
            ),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET Bucket Lifecycle",
            s3("GET", "/", "lifecycle"),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "Get Bucket (List Objects)",
            s3("GET", "/", "max-keys=2&prefix=J"),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_the_examples_of_the_s3_reference(name: str, sign: str, expected: str) -> None:
    assert sign == expected, name


def test_the_header_names_key_scope_and_headers() -> None:
    assert authorization("AKIDEXAMPLE", SUITE, ["x-amz-date", "host"], "ab") == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        "SignedHeaders=host;x-amz-date, Signature=ab"
    )


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/", "/"),
        ("/a b".replace(" ", "%20"), "/a%20b"),
        ("/a$b(c)'d*e@f", "/a%24b%28c%29%27d%2Ae%40f"),
        ("/a%2Fb//c", "/a%2Fb//c"),
        ("/~x-y_z.t", "/~x-y_z.t"),
    ],
)
def test_a_path_is_sent_in_the_one_spelling_that_is_signed(path: str, sent: str) -> None:
    assert sent_path(path) == sent
    assert sent_path(sent) == sent


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        ("b=2&a=1", "b=2&a=1"),
        ("acl", "acl"),
        ("q=a+b&t=a%2Bb", "q=a%20b&t=a%2Bb"),
        ("q=a;b", "q=a%3Bb"),
        ("X-Amz-Algorithm=x&x-amz-signature=y&X-Amz-Credential=c&X-Amz-Expires=9&k=v&X-Amz-Date=d", "k=v"),
        ("X%2DAmz%2DSignature=y&k=v", "k=v"),
        ("AWSAccessKeyId=a&Signature=s&Expires=9&k=v", "k=v"),
        ("Expires=9&k=v", "Expires=9&k=v"),
    ],
)
def test_a_query_loses_what_presigned_it(query: str, sent: str) -> None:
    assert sent_query(query) == sent
    assert sent_query(sent) == sent


def test_headers_are_signed_as_they_are_read() -> None:
    fields = [(b"X-Amz-Meta-A", b"  a   b "), (b"x-amz-meta-a", b"c"), (b"Accept", b"*/*"), (b"Content-Type", b"t/x")]
    assert signed_headers(fields) == {"x-amz-meta-a": "a b,c", "content-type": "t/x"}


@pytest.mark.parametrize("name", [b"Authorization", b"X-Amz-Date", b"x_amz_security_token", b"X-AMZ-CONTENT-SHA256"])
def test_the_agents_own_signature_is_known_in_any_spelling(name: bytes) -> None:
    assert is_of_signature(name)
    assert not is_of_signature(b"x-amz-target")


def test_paths_of_other_services_are_encoded_again() -> None:
    lines = canonical_request("GET", "/a%20b", "", {}, UNSIGNED, encode_again=True).split("\n")
    assert lines[1] == "/a%2520b"
