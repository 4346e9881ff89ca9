"""Small package registries, each with one package of the name `tiny`, and a git repository of one commit."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Mapping

from tests.harness import Reply, Seen

COMMIT = "1f0c8a3b5d7e9f2a4c6e8b0d1f3a5c7e9b2d4f60"


def wheel() -> bytes:
    """A package with one module."""
    files = {
        "tiny.py": "ANSWER = 42\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, "tiny-1.0.dist-info/RECORD"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {**files, "tiny-1.0.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tarball(folder: str, files: Mapping[str, str]) -> bytes:
    """The same for Node and for Rust."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


WHEEL = wheel()
TARBALL = tarball(
    "package",
    {
        "package.json": json.dumps({"name": "tiny", "version": "1.0.0", "main": "index.js"}),
        "index.js": "module.exports = 42;\n",
    },
)
CRATE = tarball("tiny-1.0.0", {"Cargo.toml": '[package]\nname = "tiny"\nversion = "1.0.0"\n', "src/lib.rs": ""})


def pypi(seen: Seen) -> Reply:
    """A simple index (PEP 503) for one wheel."""
    name = "tiny-1.0-py3-none-any.whl"
    link = f'<a href="/files/{name}#sha256={hashlib.sha256(WHEEL).hexdigest()}">{name}</a>'
    page = f"<!DOCTYPE html><html><body>{link}</body></html>"
    return _one_of(seen, {f"/files/{name}": WHEEL, "/simple/tiny/": page.encode()}, {"/simple/tiny/": "text/html"})


def npm(seen: Seen) -> Reply:
    """An npm registry of one package."""
    integrity = f"sha512-{b64encode(hashlib.sha512(TARBALL).digest()).decode()}"
    dist = {"tarball": "https://registry.test/tiny/-/tiny-1.0.0.tgz", "integrity": integrity}
    version = {"name": "tiny", "version": "1.0.0", "dist": dist}
    document = {"name": "tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    pages = {"/tiny/-/tiny-1.0.0.tgz": TARBALL, "/tiny": json.dumps(document).encode()}
    return _one_of(seen, pages, {"/tiny": "application/json"})


def crates(seen: Seen) -> Reply:
    """A sparse index (RFC 2789 of Rust) and its one crate."""
    config = {"dl": "https://crates.test/dl/{crate}/{version}"}
    line = {"name": "tiny", "vers": "1.0.0", "deps": [], "features": {}, "yanked": False}
    line["cksum"] = hashlib.sha256(CRATE).hexdigest()
    pages = {"/config.json": json.dumps(config).encode(), "/ti/ny/tiny": json.dumps(line).encode()}
    return _one_of(seen, {**pages, "/dl/tiny/1.0.0": CRATE})


def debian(seen: Seen) -> Reply:
    """A flat archive of no package at all; apt asks for /debian/./Packages, and the proxy sends what it matched."""
    return _one_of(seen, {"/debian/Packages": b""})


def git(seen: Seen) -> Reply:
    """A repository as plain files, which is enough to list it."""
    refs = f"{COMMIT}\trefs/heads/main\n".encode()
    pages = {"/x.git/info/refs?service=git-upload-pack": refs, "/x.git/HEAD": b"ref: refs/heads/main\n"}
    return _one_of(seen, pages, dict.fromkeys(pages, "text/plain"))


def _one_of(seen: Seen, pages: Mapping[str, bytes], kinds: Mapping[str, str] | None = None) -> Reply:
    if seen.target not in pages:
        return Reply(404)
    kind = (kinds or {}).get(seen.target, "application/octet-stream")
    return Reply(headers=[("content-type", kind)], body=pages[seen.target])
