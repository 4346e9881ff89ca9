"""The proxy.py of the benchmark: adds the credential, and finds every name on this machine."""

from __future__ import annotations

import os

from proxy.http.parser import HttpParser
from proxy.http.proxy import HttpProxyBasePlugin


class Inject(HttpProxyBasePlugin):
    """For --plugins."""

    def handle_client_request(self, request: HttpParser) -> HttpParser:
        """What is inside the tunnel gets the header."""
        if request.method != b"CONNECT":
            request.add_header(b"Authorization", os.environ["CREDENTIAL"].encode())
        return request

    def resolve_dns(self, host: str, port: int) -> tuple[str, None]:
        """As every contestant does."""
        return "127.0.0.1", None
