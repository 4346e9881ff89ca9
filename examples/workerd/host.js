// Runs code that somebody sends, each piece as the agent it belongs to:
//   curl --data-binary @static.js http://127.0.0.1:8787/coder-1
export { Gateway } from "./gateway.js";

export default {
  async fetch(request, env, ctx) {
    const agent = new URL(request.url).pathname.slice(1);
    const code = await request.text();
    // A loaded Worker keeps the way out it was loaded with: its id must hold the agent, or one agent's Worker would be
    // taken for another's.
    const worker = env.LOADER.get(`${agent}/${await digest(code)}`, () => ({
      compatibilityDate: "2026-01-01",
      mainModule: "main.js",
      modules: { "main.js": code },
      env: {},
      globalOutbound: ctx.exports.Gateway({ props: { agent } }),
    }));
    return worker.getEntrypoint().fetch("http://sandbox/");
  },
};

async function digest(text) {
  const hash = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
