"""Shows that the attacks have teeth: without a defence, one that should notice must fail.

    scripts/teeth            every row of the table, minutes each
    scripts/teeth NAME...    those rows

Each row removes one defence in a copy of the tree and runs the tests it names there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 600  # seconds for the tests of one row
FAILED = 1  # pytest: tests ran and some failed; 0 is "all passed", from 2 on nothing was proved


class Tooth(NamedTuple):
    """A defence: `text` of `proxy/module` stands there once; with `instead` in its place `tests` must not all pass."""

    name: str
    module: str
    text: str
    instead: str
    tests: str  # arguments of pytest, from tests/attack


TEETH: tuple[Tooth, ...] = (
    # Authority
    Tooth(
        "server-name",
        "tunnels.py",
        "peer.sni_mismatch = not _names(server_name, host)",
        "peer.sni_mismatch = False",
        "test_authority.py -k server_name",
    ),
    Tooth(
        "host-header",
        "flow.py",
        """        _agree(value, scheme, host, port)\n""",
        """        _authority(value, scheme)\n""",
        "test_authority.py -k another_authority",
    ),
    # Paths and methods
    Tooth(
        "path-readings",
        "request.py",
        "    return normal, _readings(normal)\n",
        "    return normal, (normal,)\n",
        "test_paths.py -k leads_into",
    ),
    Tooth(
        "dot-segments",
        "request.py",
        "normal = remove_dot_segments(_spelt(raw))",
        "normal = _spelt(raw)",
        "test_paths.py -k matched",
    ),
    Tooth(
        "method-override",
        "policy.py",
        "(self._overridden(view) if view.overrides else view.method in match.methods)",
        "(view.method in match.methods)",
        "test_paths.py -k overridden_where",
    ),
    Tooth(
        "method-in-query",
        "request.py",
        'if query and method == "POST":',
        "if False:",
        "test_paths.py -k overridden_in",
    ),
    Tooth(
        "url-override",
        "request.py",
        '        b"x-original-url",\n',
        "",
        "test_paths.py -k url_cannot",
    ),
    Tooth(
        "trace",
        "policy.py",
        'frozenset({"TRACE", "TRACK", "CONNECT"})',
        'frozenset({"CONNECT"})',
        "test_paths.py -k some_methods",
    ),
    # Framing
    Tooth(
        "two-lengths",
        "framing.py",
        "if len(lengths) > 1 or not",
        "if not",
        "test_framing.py -k malformed_head",
    ),
    Tooth(
        "secret-with-lines",
        "outbound.py",
        "if _NO_HEADER_BYTE.search(secret):",
        "if False:",
        "test_injection.py",
    ),
    Tooth(
        "websocket-size",
        "strictws.py",
        "if self._held > MAX_MESSAGE:",
        "if False:",
        "test_upgrade.py -k without_end",
    ),
    Tooth(
        "websocket-get",
        "request.py",
        'if facts.upgrade == "websocket" and method != "GET":',
        "if False:",
        "test_upgrade.py -k by_get",
    ),
    Tooth(
        "rapid-reset",
        "frames.py",
        "resets += 1",
        "resets += 0",
        "test_http2.py -k 44487",
    ),
    Tooth(
        "empty-frames",
        "frames.py",
        "control += 1",
        "control += 0",
        'test_http2.py -k "pings and flood_ends"',
    ),
    Tooth(
        "own-resets",
        "strict2.py",
        "self.frames.budget.spend(time.monotonic(), resets=1)",
        "pass",
        "test_http2.py -k 8671",
    ),
    Tooth(
        "reconnecting",
        "hooks.py",
        "lru_cache(maxsize=4096)(lambda _agent: FrameBudget())",
        "partial(lambda _agent: FrameBudget())",
        "test_http2.py -k next_connection",
    ),
    Tooth(
        "header-table",
        "strict2.py",
        "min(encoder.header_table_size, MAX_TABLE)",
        "encoder.header_table_size",
        "test_http2.py -k header_table",
    ),
    Tooth(
        "informational",
        "strict2.py",
        "if self._skipped[event.stream_id] > MAX_INFORMATIONAL:",
        "if False:",
        'test_http2.py -k "1xx"',
    ),
    # Identity
    Tooth(
        "guessing",
        "guesses.py",
        "over = left < 1",
        "over = False",
        "test_identity.py -k guessing",
    ),
    Tooth(
        "lock-out",
        "hooks.py",
        "if identified.agent is None and proofs and self._guesses",
        "if proofs and self._guesses",
        "test_identity.py -k guessing",
    ),
    Tooth(
        "source-headers",
        "request.py",
        """        b"x-client-ip",\n""",
        "",
        "test_identity.py -k claim_of_identity",
    ),
    Tooth(
        "token-in-a-row",
        "hooks.py",
        "proofs = flows.proxy_authorization(flow)",
        "proofs = flows.proxy_authorization(flow) or self.__dict__.get('last', [])\n        self.last = proofs",
        "test_identity.py -k in_a_row",
    ),
    Tooth(
        "shared-sign-in",
        "request.py",
        "elif fate == _KEPT_AUTHORIZATION and _OF_CONNECTION.match(value):",
        "elif False:",
        "test_identity.py -k signs_in",
    ),
    Tooth(
        "failed-handshake",
        "hooks.py",
        'self._cut_short(client, "CONNECT", reason)',
        'self._cut_short(client, "CONNECT", Reason.PROTOCOL_NOT_ALLOWED)',
        "test_identity.py -k handshake",
    ),
    # Exhaustion
    Tooth(
        "rate",
        "limiter.py",
        "        if limits.rate:\n",
        "        if False:\n",
        "test_limits.py -k no_more_than_the_rate",
    ),
    Tooth(
        "body-size",
        "deciding.py",
        "            if left < 0:\n",
        "            if False:\n",
        "test_limits.py -k chunks",
    ),
    # Secrets
    Tooth(
        "leak-in-head",
        "deciding.py",
        "self.runtime.leaks.check(view, target, formats=approved.scan)\n",
        "True\n",
        "test_leaks.py -k in_any_header",
    ),
    # What was decided before
    Tooth(
        "replay-policy",
        "replay.py",
        "            and ground.policy is runtime.rules.policy\n",
        "",
        "../wire/test_replay.py -k new_block_rule",
    ),
    Tooth(
        "replay-rules",
        "replay.py",
        "not plan.decision.allowed or plan.rules != decision.rules",
        "False",
        "../wire/test_replay.py -k another_rule",
    ),
    Tooth(
        "replay-body",
        "replay.py",
        "if not self._runtime.leaks.is_clean(body, formats=replay.settled.decision.formats):",
        "if False:",
        "../wire/test_replay.py -k looked_through",
    ),
    Tooth(
        "replay-answer",
        "replay.py",
        "if redactor and redactor.finds(body):",
        "if False:",
        "../wire/test_replay.py -k next_answer",
    ),
    Tooth(
        "replay-stream",
        "replay.py",
        "return scan(body, data) if body else [data]",
        "return [data] if data else []",
        "../wire/test_replay.py -k secret_in",
    ),
    Tooth(
        "leak-held-back",
        "leak.py",
        "                return at\n            if any(open_",
        "                return len(data)\n            if any(open_",
        "test_leaks.py -k streaming_is_cut",
    ),
    Tooth(
        "leak-decoded",
        "leak.py",
        "            self._decoder = decoder(content_encoding)\n",
        "            self._decoder = None\n",
        "test_leaks.py -k compression",
    ),
    Tooth(
        "leak-placeholder",
        "leakguard.py",
        "known.grant.covers_host(target)",
        "True",
        "test_leaks.py -k placeholder",
    ),
    Tooth(
        "leak-on-record",
        "hooks.py",
        "if view and self.runtime.leaks.hides(view, refused):",
        "if False:",
        "test_leaks.py -k not_written_down",
    ),
    Tooth(
        "strangers",
        "strangers.py",
        "            longest()\n",
        "            pass\n",
        "test_exhaustion.py -k say_nothing",
    ),
    Tooth(
        "changed-hands",
        "hooks.py",
        "        self._belongs(peer, tunnel.agent_id)\n",
        "",
        "test_exhaustion.py -k change_hands",
    ),
    Tooth(
        "minting",
        "tunnels.py",
        "            if self._mints_too_many(identified.agent.id, host):\n",
        "            if False:\n",
        "test_exhaustion.py -k storm",
    ),
    # Operations
    Tooth(
        "full-disk",
        "gateway.py",
        "if self.audit is not None and self.audit.refuses:",
        "if False:",
        "test_operations.py -k recorded",
    ),
    Tooth(
        "chain",
        "auditchain.py",
        'if sha256(match[1] + b"}").hexdigest() != match[3].decode():',
        "if False:",
        "test_operations.py -k changed_log",
    ),
    Tooth(
        "reflected-header-name",
        "flow.py",
        "if _redacted(name, redactor, exchange) == name",
        "if name",
        "test_reflection.py -k named_after",
    ),
    # Hidden channels
    Tooth(
        "labels",
        "policy.py",
        'return "max_labels"',
        'return ""',
        "test_channels.py -k labels",
    ),
    Tooth(
        "body-names-given-twice",
        "bodymatch.py",
        "    if len(found) != len(pairs):\n",
        "    if False:\n",
        "test_bodies.py -k read_in_two_ways",
    ),
    Tooth(
        "resolvers",
        "policy.py",
        "        if name in DNS_OVER_HTTPS:\n",
        "        if False:\n",
        "test_channels.py -k resolver",
    ),
    # The kill switch
    Tooth(
        "kill-cuts",
        "cut.py",
        "            addon.abort(peer.client)\n",
        "            pass\n",
        "test_kill.py -k cuts_what_is_open",
    ),
    Tooth(
        "kill-without-store",
        "killswitch.py",
        "        stops = read_stops(self._state)\n",
        "        stops = Stops()\n",
        "test_kill.py -k store_unreachable",
    ),
    # A parent proxy
    Tooth(
        "parent-private-address",
        "upstream.py",
        """        if host.ip:
            await self.addresses(host, port)
""",
        """        if host.ip:
            pass
""",
        "test_parent.py -k what_is_private",
    ),
    Tooth(
        "parent-local-name",
        "upstream.py",
        "elif is_local_name(host):",
        "elif False:",
        "test_parent.py -k what_is_private",
    ),
    Tooth(
        "parent-answer",
        "parent.py",
        'if not status or status[1][:1] != b"2" or end + 4 != len(answer):',
        "if not status:",
        "test_parent.py -k answer_is_not",
    ),
    # Addresses
    Tooth(
        "not-public",
        "address.py",
        "    return ip.is_global and not ip.is_multicast and not ip.is_reserved\n",
        "    return True\n",
        "test_addresses.py -k not_public",
    ),
    Tooth(
        "metadata-at-a-public-address",
        "address.py",
        """    IPv4Network("168.63.129.16/32"),""",
        "",
        "test_addresses.py -k not_public",
    ),
    Tooth(
        "not-unicast",
        "address.py",
        "        if ip not in _UNICAST6:\n            return False\n",
        "",
        "test_addresses.py -k not_public",
    ),
    Tooth(
        "one-answer-of-many",
        "upstream.py",
        "not all(self._may_dial(address, private) for address in found)",
        "not any(self._may_dial(address, private) for address in found)",
        "test_addresses.py -k leads_to",
    ),
    Tooth(
        "numbers-are-addresses",
        "address.py",
        "if _NUMERIC.fullmatch(labels[-1]):",
        "if len(labels) == 4 and _NUMERIC.fullmatch(labels[-1]):",
        "test_addresses.py -k no_spelling",
    ),
    Tooth(
        "itself",
        "upstream.py",
        "if await self._leads_to_us(found, to_port):",
        "if False:",
        "test_addresses.py -k itself",
    ),
    # Upstream
    Tooth(
        "certificate",
        "pool.py",
        "context.set_ciphers(CIPHERS)",
        "context.set_ciphers(CIPHERS); context.check_hostname = False",
        "test_upstream.py -k prove",
    ),
    Tooth(
        "certificate-in-the-stack",
        "tls.py",
        "self._context.set_verify(SSL.VERIFY_PEER)",
        "self._context.set_verify(SSL.VERIFY_NONE)",
        "test_upstream.py -k prove",
    ),
    Tooth(
        "old-tls",
        "pool.py",
        "context.set_ciphers(CIPHERS)",
        'context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED; context.set_ciphers("ALL:@SECLEVEL=0")',
        "test_upstream.py -k prove",
    ),
    Tooth(
        "control-characters",
        "strict1.py",
        "if _CONTROL.search(",
        "if False and _CONTROL.search(",
        "test_upstream.py -k cannot_become",
    ),
    Tooth(
        "dripping-heads",
        "strict1.py",
        "yield from self._give_up(LATE_HEAD)",
        "pass",
        "test_upstream.py -k drips",
    ),
    Tooth(
        "unasked-answers",
        "pool.py",
        "if connection.buffer or channel.closed or",
        "if channel.closed or",
        "test_upstream.py -k answers_nobody",
    ),
    Tooth(
        "bombs",
        "flow.py",
        "        if size > MAX_EXPANDED:\n",
        "        if False:\n",
        "test_upstream.py -k bomb",
    ),
    Tooth(
        "patience",
        "lane.py",
        "patience = min(CONNECT_TIMEOUT, self.limits.idle)",
        "patience = CONNECT_TIMEOUT",
        "test_upstream.py -k handshake",
    ),
    # Slow clients
    Tooth(
        "dripping-requests-in-the-lane",
        "conversation.py",
        "patience = max(0.0, started + self.lane.head_seconds - now) if started else self.idle",
        "patience = self.idle",
        "test_slow.py -k in_a_tunnel",
    ),
    Tooth(
        "dripping-requests",
        "strict1.py",
        "                self.head_since = self.head_since or time.monotonic()\n",
        "                self.head_since = time.monotonic()\n",
        "test_slow.py -k request",
    ),
    Tooth(
        "dripping-handshakes",
        "layers.py",
        "if time.monotonic() - self.begun >= ",
        "if False and time.monotonic() - self.begun >= ",
        "test_slow.py -k ClientHello",
    ),
)


def bite(tooth: Tooth, folder: Path) -> str:
    """What is wrong with a row, or an empty text. `folder` gets the copy."""
    for part in ("proxy", "rules", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    path = folder / "proxy" / tooth.module
    source = path.read_text()
    if source.count(tooth.text) != 1:
        return f"its text is not in proxy/{tooth.module} once"
    path.write_text(source.replace(tooth.text, tooth.instead))
    tests, *options = shlex.split(tooth.tests)
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/attack/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        result = subprocess.run(
            [*command, *options],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its tests took longer than {PATIENCE} seconds"
    if result.returncode == 0:
        return "every attack passed without it"
    if result.returncode != FAILED or " failed" not in result.stdout:  # an error in a fixture is no failed attack
        return f"its tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return ""


def main(names: Sequence[str]) -> int:
    """Try the rows of these names, or all; how many have no teeth."""
    if unknown := set(names) - {tooth.name for tooth in TEETH}:
        print(f"no such row: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    toothless = 0
    for tooth in TEETH:
        if names and tooth.name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="teeth-") as folder:
            problem = bite(tooth, Path(folder))
        toothless += bool(problem)
        print(f"{tooth.name}: {problem or 'an attack got through without it, and was noticed'}", flush=True)
    return min(toothless, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
