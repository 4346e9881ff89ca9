# Sandboxes in workerd whose only way out is Sallyport. README.md tells how to start it.
using Workerd = import "/workerd/workerd.capnp";

const config :Workerd.Config = (
  services = [
    (name = "host", worker = .host),
    (name = "static", worker = .static),

    # The way out. Only the Gateway in `host` has it: whoever has it can say who it is.
    (name = "sallyport", external = (address = "127.0.0.1:8080", http = (style = proxy))),
    (name = "sallyport-tcp", external = (address = "127.0.0.1:8080", tcp = ())),

    # What a sandbox gets that nobody gave a way out: it proves nothing, so every request is answered 407.
    (name = "nobody", external = (
      address = "127.0.0.1:8080",
      http = (style = proxy, injectRequestHeaders = [(name = "Proxy-Authorization")]),  # no value: taken out
    )),

    # Workers without `globalOutbound` use the service of this name. Without this line it is the whole Internet.
    (name = "internet", network = (allow = [], deny = ["0.0.0.0/0", "::/0"])),
  ],
  sockets = [
    (name = "host", address = "127.0.0.1:8787", http = (), service = "host"),
    (name = "static", address = "127.0.0.1:8788", http = (), service = "static"),
  ],
);

# Trusted. Loads sandboxes at run time, and speaks for all of them.
const host :Workerd.Worker = (
  modules = [
    (name = "host.js", esModule = embed "host.js"),
    (name = "gateway.js", esModule = embed "gateway.js"),
  ],
  compatibilityDate = "2026-01-01",
  compatibilityFlags = ["experimental"],
  bindings = [
    (name = "SALLYPORT", service = "sallyport"),
    (name = "SALLYPORT_TCP", service = "sallyport-tcp"),
    (name = "GATEWAY_KEY", fromEnvironment = "GATEWAY_KEY"),
    (name = "GATEWAY_NAME", text = "workers"),
    (name = "LOADER", workerLoader = (id = "sandboxes")),
  ],
  globalOutbound = "nobody",
);

# Not trusted. Whatever it sends goes through the Gateway, as worker-1.
const static :Workerd.Worker = (
  modules = [(name = "static.js", esModule = embed "static.js")],
  compatibilityDate = "2026-01-01",
  globalOutbound = (name = "host", entrypoint = "Gateway", props = (json = "{\"agent\":\"worker-1\"}")),
);
