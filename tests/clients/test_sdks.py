"""The openai and anthropic SDKs, curl and Node.js stream answers token by token, with a key they never see."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from tests.clients.sandbox import NODE, Sandbox, tool
from tests.harness import PATIENCE, Proxy, Seen, Upstream, read_request, server_context

OPENAI_KEY = "sk-proj-9aB3xK7mQ2wE5rT8yU1iO4pL6zN0"
ANTHROPIC_KEY = "sk-ant-api03-V4nH7jC1qS9dF2gX6bM8kW3e"
TOKENS = [f"token-{number}" for number in range(20)]
RULES = """
version: 1
rules:
  - name: openai
    match: {host: api.openai.test, method: POST, path: /v1/chat/completions}
    action: allow
    inject: [{credential: openai, as: bearer}]
  - name: anthropic
    match: {host: api.anthropic.test, method: POST, path: /v1/messages}
    action: allow
    inject: [{credential: anthropic, as: header, name: x-api-key}]
"""
OPENAI = """
from openai import OpenAI
client = OpenAI(base_url="https://api.openai.test/v1", api_key="dummy-of-the-agent", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]
for chunk in client.chat.completions.create(model="gpt-test", messages=messages, stream=True):
    print(chunk.choices[0].delta.content, flush=True)
"""
ANTHROPIC = """
from anthropic import Anthropic
client = Anthropic(base_url="https://api.anthropic.test", api_key="dummy-of-the-agent", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]
with client.messages.stream(model="claude-test", max_tokens=99, messages=messages) as stream:
    for text in stream.text_stream:
        print(text, flush=True)
"""


def openai_events(texts: list[str]) -> Iterator[list[str]]:
    """The events of a chat completion; those of one list go out together."""
    shape = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-test"}
    for text in texts:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        yield [f"data: {json.dumps({**shape, 'choices': [choice]})}\n\n"]
    yield ["data: [DONE]\n\n"]


def anthropic_events(texts: list[str]) -> Iterator[list[str]]:
    """The events of a message; those of one list go out together."""

    def event(kind: str, **data: object) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"

    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": "m1", "type": "message", "role": "assistant", "content": [], "model": "claude-test"}
    begin = [
        event("message_start", message={**message, "stop_reason": None, "stop_sequence": None, "usage": usage}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    ]
    for text in texts:
        yield [*begin, event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})]
        begin = []
    yield [
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=usage),
        event("message_stop"),
    ]


@dataclass
class Model:
    """An imitation of a model's endpoint: it sends the next token only when the client has acknowledged the last."""

    events: Callable[[list[str]], Iterator[list[str]]]
    key_header: str
    acknowledged: queue.Queue[None] = field(default_factory=queue.Queue)
    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One streamed answer; its last token is the caller's key."""
        seen = await read_request(reader)
        self.seen.append(seen)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number, together in enumerate(self.events([*TOKENS, *seen.header(self.key_header)])):
            if number:
                await asyncio.to_thread(self.acknowledged.get, timeout=PATIENCE)
            data = "".join(together).encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@pytest.fixture(scope="module")
def server(upstream_ca: trustme.CA) -> Iterator[Upstream]:
    with Upstream(server_context(upstream_ca, "api.openai.test", "api.anthropic.test")) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(make_proxy: Callable[..., Proxy], server: Upstream) -> Proxy:
    names = ("api.openai.test", "api.anthropic.test")
    proxy = make_proxy(RULES, {f"{name}:443": f"127.0.0.1:{server.port}" for name in names})
    proxy.credential("openai", OPENAI_KEY, "--host", "api.openai.test", "--method", "POST")
    proxy.credential("anthropic", ANTHROPIC_KEY, "--host", "api.anthropic.test", "--path", "/v1/messages")
    return proxy


def converse(sandbox: Sandbox, model: Model, *command: str | Path) -> list[str]:
    """The lines that a client printed, each acknowledged as it came."""
    printed = []
    with (
        (sandbox.home / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            command,
            cwd=sandbox.home,
            env=sandbox.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as client,
    ):
        assert client.stdout
        for line in filter(str.strip, client.stdout):
            printed.append(line.rstrip("\n"))
            model.acknowledged.put(None)
    sandbox.printed += printed
    assert client.returncode == 0, (sandbox.home / "stderr.txt").read_text() + sandbox.log()
    return printed


def test_openai_streams_token_by_token(server: Upstream, sandbox: Sandbox) -> None:
    """Were anything buffered, the second token would never come; the key that the model repeats is not shown."""
    server.raw = model = Model(openai_events, "authorization")
    assert converse(sandbox, model, sys.executable, "-I", "-c", OPENAI) == [*TOKENS, "Bearer [redacted:openai]"]
    assert [seen.header("authorization") for seen in model.seen] == [[f"Bearer {OPENAI_KEY}"]]
    sandbox.proxy.audit(rule="openai", status=200)
    sandbox.assert_no_trace(OPENAI_KEY)


def test_anthropic_streams_token_by_token(server: Upstream, sandbox: Sandbox) -> None:
    """The same with the key in a header of its own, of which the agent's value does not get through."""
    server.raw = model = Model(anthropic_events, "x-api-key")
    assert converse(sandbox, model, sys.executable, "-I", "-c", ANTHROPIC) == [*TOKENS, "[redacted:anthropic]"]
    assert [seen.header("x-api-key") for seen in model.seen] == [[ANTHROPIC_KEY]]
    sandbox.proxy.audit(rule="anthropic", status=200)
    sandbox.assert_no_trace(ANTHROPIC_KEY)


URL = "https://api.openai.test/v1/chat/completions"
FETCH = """
const answer = await fetch(process.argv[1], { method: "POST", body: "{}" });
const text = new TextDecoder();
for await (const chunk of answer.body) process.stdout.write(text.decode(chunk, { stream: true }));
"""
CLIENTS: dict[str, Callable[[], tuple[str | Path, ...]]] = {
    "curl by HTTP/2": lambda: (tool("curl"), "--silent", "--no-buffer", "--http2", "--data", "{}", URL),
    "curl by HTTP/1.1": lambda: (tool("curl"), "--silent", "--no-buffer", "--http1.1", "--data", "{}", URL),
    "node": lambda: (NODE, "--input-type=module", "--eval", FETCH, URL),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_other_clients_stream_token_by_token(server: Upstream, sandbox: Sandbox, client: str) -> None:
    """Whatever the version of HTTP on the agent's side."""
    server.raw = model = Model(openai_events, "authorization")
    printed = converse(sandbox, model, *CLIENTS[client]())
    wanted = [*TOKENS, "Bearer [redacted:openai]", "[DONE]"]
    assert all(text in line for text, line in zip(wanted, printed, strict=True)), printed
    assert [seen.header("authorization") for seen in model.seen] == [[f"Bearer {OPENAI_KEY}"]]
    sandbox.assert_no_trace(OPENAI_KEY)
