// The way out of every sandbox here. It says who speaks, over whatever the sandbox said itself; Sallyport does the rest.
import { WorkerEntrypoint } from "cloudflare:workers";

const LIFE = 60; // seconds a token lives; at most what `sallyport gateway add --ttl` says
const tokens = new Map(); // by agent: {text, ends}

// Nothing but fetch and connect may be public here: a method of a WorkerEntrypoint can be called from outside.
export class Gateway extends WorkerEntrypoint {
  // fetch() and WebSockets
  async fetch(request) {
    const headers = new Headers(request.headers);
    headers.set("Proxy-Authorization", await proof(this.env, this.ctx.props.agent));
    return this.env.SALLYPORT.fetch(new Request(request, { headers }));
  }

  // connect(): a tunnel, in which Sallyport takes TLS and nothing else
  async connect(socket) {
    const { localAddress: target } = await socket.opened; // what the sandbox asked for
    if (!/^[\w.[\]:-]+$/.test(target)) throw new Error("not a host and a port");
    const authorization = await proof(this.env, this.ctx.props.agent);
    const proxy = this.env.SALLYPORT_TCP.connect(target);
    const writer = proxy.writable.getWriter();
    const head = `CONNECT ${target} HTTP/1.1\r\nHost: ${target}\r\nProxy-Authorization: ${authorization}\r\n\r\n`;
    await writer.write(new TextEncoder().encode(head));
    writer.releaseLock();
    await accepted(proxy.readable);
    await Promise.all([socket.readable.pipeTo(proxy.writable), proxy.readable.pipeTo(socket.writable)]);
  }
}

async function proof(env, agent) {
  const now = Math.floor(Date.now() / 1000);
  let token = tokens.get(agent);
  if (!token || token.ends - now < LIFE / 2) {
    token = { ends: now + LIFE, text: await mint(env.GATEWAY_KEY, env.GATEWAY_NAME, agent, now + LIFE) };
    tokens.set(agent, token);
  }
  return `Bearer ${token.text}`;
}

// A JWT (RFC 7519) as docs/identity.md describes it.
async function mint(key, gateway, agent, ends) {
  const bytes = (text) => new TextEncoder().encode(text);
  const b64 = (data) =>
    btoa(String.fromCharCode(...data)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const json = (data) => b64(bytes(JSON.stringify(data)));
  const hmac = await crypto.subtle.importKey("raw", bytes(key), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  const signed = `${json({ alg: "HS256", kid: gateway })}.${json({ sub: agent, exp: ends })}`;
  return `${signed}.${b64(new Uint8Array(await crypto.subtle.sign("HMAC", hmac, bytes(signed))))}`;
}

// Reads the answer to CONNECT, byte for byte: what follows belongs to the sandbox.
async function accepted(readable) {
  const reader = readable.getReader({ mode: "byob" });
  let head = "";
  while (!head.endsWith("\r\n\r\n")) {
    const { done, value } = await reader.read(new Uint8Array(1));
    if (done || head.length > 4096) throw new Error("Sallyport did not answer");
    head += String.fromCharCode(value[0]);
  }
  reader.releaseLock();
  if (!/^HTTP\/1\.1 200 /.test(head)) throw new Error(`refused by Sallyport: ${head.slice(9, 12)}`);
}
