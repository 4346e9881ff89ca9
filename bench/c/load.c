/* The load generator of the benchmark: HTTPS through a CONNECT proxy (or straight, to measure the generator and the
 * upstream themselves), one thread, certificates verified. Prints one line of JSON.
 *
 * It opens its connections and warms up with small GETs, says "ready", waits for a line on standard input and measures: whoever started
 * it reads the proxy's CPU time before and after. Latency counts from when a request was due, not from when it could
 * be sent (no coordinated omission). */
#include "common.h"

static struct {
    int proxy, port;           /* of this machine; no proxy: straight to the upstream */
    bool reverse;              /* TLS to the proxy itself, no CONNECT */
    const char *host;          /* with %d: another name each connection, counted from first_host */
    const char *path, *credential;
    int first_host, hosts, connections, opening; /* opening: so many at once while warming up */
    bool varied;               /* another path for each request */
    long per_connection;       /* requests before a connection is closed; 0: no limit */
    double warm_up, seconds, rate;
    long requests;             /* stop after so many; 0: no limit */
    uint64_t upload;           /* bytes of a body to POST */
} want = {.host = "api.bench.test", .path = "/v1/models", .hosts = 1 << 30, .connections = 16, .opening = 16, .warm_up = 0.3, .seconds = 1};

/* Nanoseconds, in buckets 1/128 wide. */
struct histogram {
    uint64_t bucket[64 << 7], count, most;
};

struct conn {
    int fd, host, status;
    SSL *ssl;
    enum { CLOSED, ASK, ASKED, SHAKE, IDLE, SEND, RECEIVE } state;
    long used;
    char out[1024], in[HEAD_MAX + 1], line[64]; /* line: of an event stream */
    size_t out_size, out_done, have, line_size;
    uint64_t upload_left, due, sent;
    struct body body;
    bool head_read, body_begun, close;
};

static struct histogram latency, first_byte, event_delay;
static struct conn **idle; /* a ring: the one that waited longest is next */
static char **agents;
static int idle_first, idle_count, epoll, agent_count, next_agent, next_host, in_flight;
static long started, completed, refused, failed, dials;
static uint64_t received, next_due, finish, last_done;
static bool measuring;
static SSL_CTX *context;

static void record(struct histogram *h, uint64_t ns) {
    if (!measuring) return;
    int shift = 63 - __builtin_clzll(ns | 128) - 7;
    h->bucket[(shift << 7) + (int)(ns >> shift)]++;
    h->count++;
    if (ns > h->most) h->most = ns;
}

/* In microseconds. */
static double quantile(const struct histogram *h, double q) {
    uint64_t wanted = (uint64_t)(q * (double)h->count), seen = 0;
    for (int i = 0; i < 64 << 7; i++)
        if ((seen += h->bucket[i]) > wanted)
            return (i < 128 ? i + 0.5 : ((i & 127) + 128.5) * (double)(1ull << ((i >> 7) - 1))) / 1e3;
    return (double)h->most / 1e3;
}

static void rest(struct conn *c) { idle[(idle_first + idle_count++) % want.connections] = c; }

static void hang_up(struct conn *c) {
    SSL_free(c->ssl);
    if (c->fd >= 0) close(c->fd);
    c->ssl = NULL, c->fd = -1, c->state = CLOSED, c->used = 0;
}

static void fail(struct conn *c) {
    hang_up(c);
    failed++, in_flight--;
    last_done = now_ns();
    rest(c);
}

static void dial(struct conn *c) {
    char name[128];
    dials++;
    snprintf(name, sizeof name, want.host, c->host = next_host++ % want.hosts);
    if ((c->fd = dial_loopback(want.proxy ? want.proxy : want.port)) < 0) die("connect");
    c->ssl = SSL_new(context);
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, name);
    SSL_set1_host(c->ssl, name);
    SSL_set_connect_state(c->ssl);
    c->state = SHAKE, c->out_done = c->have = 0;
    if (want.proxy && !want.reverse) {
        const char *proof = agent_count ? agents[next_agent++ % agent_count] : NULL;
        c->out_size = (size_t)snprintf(c->out, sizeof c->out, "CONNECT %s:%d HTTP/1.1\r\nHost: %s:%d\r\n%s%s%s\r\n", name,
            want.port, name, want.port, proof ? "Proxy-Authorization: " : "", proof ? proof : "", proof ? "\r\n" : "");
        c->state = ASK;
    }
    watch(epoll, c->fd, c);
}

static void write_request(struct conn *c) {
    char name[128], varied[32] = "";
    uint64_t upload = measuring ? want.upload : 0;
    snprintf(name, sizeof name, want.host, c->host);
    if (want.varied) snprintf(varied, sizeof varied, "/%ld?page=%ld", started, started % 100);
    size_t n = (size_t)snprintf(c->out, sizeof c->out,
        "%s %s%s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: bench/1\r\nAccept: */*\r\n", upload ? "POST" : "GET",
        measuring ? want.path : "/v1/models", varied, name, want.port);
    if (want.credential) n += (size_t)snprintf(c->out + n, sizeof c->out - n, "Authorization: %s\r\n", want.credential);
    if (upload) n += (size_t)snprintf(c->out + n, sizeof c->out - n, "Content-Length: %lu\r\n", upload);
    c->out_size = n + (size_t)snprintf(c->out + n, sizeof c->out - n, "\r\n");
    c->state = SEND, c->upload_left = upload, c->sent = now_ns();
    c->out_done = c->have = c->line_size = 0;
    c->head_read = c->body_begun = false;
}

/* A piece of a body. Each event of a stream tells when it was sent. */
static void take(void *who, const char *data, size_t size) {
    struct conn *c = who;
    if (!c->body_begun) record(&first_byte, now_ns() - c->sent);
    c->body_begun = true;
    received += size;
    if (strncmp(want.path, "/sse/", 5)) return;
    for (size_t i = 0; i < size; i++) {
        if (data[i] != '\n') {
            if (c->line_size < sizeof c->line - 1) c->line[c->line_size++] = data[i];
            continue;
        }
        c->line[c->line_size] = 0;
        if (!strncmp(c->line, "data: ", 6)) record(&event_delay, now_ns() - strtoull(c->line + 6, NULL, 10));
        c->line_size = 0;
    }
}

static int ask(struct conn *c) {
    ssize_t n = send(c->fd, c->out, c->out_size, 0);
    if (n != (ssize_t)c->out_size) return n < 0 && errno == EAGAIN ? AGAIN : GONE;
    c->state = ASKED;
    return 1;
}

static int read_consent(struct conn *c) {
    ssize_t n = recv(c->fd, c->in + c->have, HEAD_MAX - c->have, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN ? AGAIN : GONE;
    c->in[c->have += (size_t)n] = 0;
    if (!strstr(c->in, "\r\n\r\n")) return c->have < HEAD_MAX ? 1 : GONE;
    if (strncmp(c->in + 8, " 200", 4)) return GONE;
    c->state = SHAKE;
    return 1;
}

static int send_request(struct conn *c) {
    static char upload[64 * 1024];
    int n;
    while (c->out_done < c->out_size) {
        if ((n = tls_write(c->ssl, c->out + c->out_done, c->out_size - c->out_done)) < 0) return n;
        c->out_done += (size_t)n;
    }
    while (c->upload_left) {
        if ((n = tls_write(c->ssl, upload, c->upload_left < sizeof upload ? c->upload_left : sizeof upload)) < 0) return n;
        c->upload_left -= (size_t)n;
        last_done = now_ns();
    }
    c->state = RECEIVE;
    return 1;
}

static int read_answer(struct conn *c) {
    static char data[BULK];
    int n;
    if (!c->head_read) {
        if (c->have == HEAD_MAX) return GONE;
        if ((n = tls_read(c->ssl, c->in + c->have, HEAD_MAX - c->have)) < 0) return n;
        c->in[c->have += (size_t)n] = 0;
        char *stop = strstr(c->in, "\r\n\r\n");
        if (!stop) return 1;
        size_t size;
        const char *value = header(c->in, "connection", &size);
        c->status = atoi(c->in + 9);
        c->close = value && size == 5 && !strncasecmp(value, "close", 5);
        c->head_read = true;
        body_start(&c->body, c->in, c->status == 204 || c->status == 304, true);
        body_feed(&c->body, stop + 4, c->have - (size_t)(stop + 4 - c->in), take, c);
    } else {
        n = tls_read(c->ssl, data, sizeof data);
        if (n == GONE && c->body.kind == UNTIL_CLOSE) c->body.done = c->close = true;
        else if (n < 0) return n;
        else body_feed(&c->body, data, (size_t)n, take, c);
        last_done = now_ns();
    }
    if (!c->body.done) return 1;
    last_done = now_ns();
    record(&latency, last_done - c->due);
    completed++, in_flight--;
    if (c->status / 100 != 2) refused++;
    c->state = IDLE;
    if (++c->used == want.per_connection || c->close) {
        SSL_shutdown(c->ssl);
        hang_up(c);
    }
    rest(c);
    return AGAIN;
}

static int step(struct conn *c) {
    int n;
    char unasked;
    switch (c->state) {
    case ASK: return ask(c);
    case ASKED: return read_consent(c);
    case SHAKE:
        if ((n = tls_outcome(c->ssl, SSL_do_handshake(c->ssl))) > 0) write_request(c);
        return n;
    case SEND: return send_request(c);
    case RECEIVE: return read_answer(c);
    case IDLE: /* a session ticket, or the proxy closes */
        if (tls_read(c->ssl, &unasked, 1) != AGAIN) hang_up(c);
        return AGAIN;
    default: return AGAIN;
    }
}

static void drive(struct conn *c) {
    int n;
    while ((n = step(c)) > 0) {}
    if (n == GONE) fail(c);
}

static bool may_start(uint64_t now) {
    if (!measuring) return in_flight < want.opening && (started < want.connections || now < finish);
    if (want.requests && started >= want.requests) return false;
    return want.rate ? next_due <= now && next_due < finish : now < finish;
}

static void dispatch(void) {
    for (uint64_t now; idle_count && may_start(now = now_ns());) {
        struct conn *c = idle[idle_first];
        idle_first = (idle_first + 1) % want.connections, idle_count--;
        started++, in_flight++;
        c->due = now;
        if (measuring && want.rate) c->due = next_due, next_due += (uint64_t)(1e9 / want.rate);
        if (c->state == CLOSED) dial(c);
        else write_request(c);
        drive(c);
    }
}

/* Starts requests for so long and waits for the last answer: 20 s, or 10 s of nothing at all while warming up. */
static void run(double seconds) {
    started = completed = refused = failed = dials = 0;
    received = 0;
    next_due = last_done = now_ns();
    finish = next_due + (uint64_t)(seconds * 1e9);
    for (;;) {
        dispatch();
        uint64_t now = now_ns(), wake = measuring && want.rate && next_due < finish && idle_count ? next_due : now + 100000000;
        if (!in_flight && now >= (measuring && want.rate ? next_due : finish) && !may_start(now)) return;
        if (!in_flight && measuring && want.requests && started >= want.requests) return;
        if (in_flight && (measuring ? now > finish + 20000000000u : now > last_done + 10000000000u)) {
            failed += in_flight;
            return;
        }
        if (failed > 200 + completed) return;
        uint64_t wait = wake > now ? wake - now : 0;
        struct timespec t = {.tv_sec = (time_t)(wait / 1000000000u), .tv_nsec = (long)(wait % 1000000000u)};
        struct epoll_event ready[256];
        int count = epoll_pwait2(epoll, ready, 256, &t, NULL);
        for (int i = 0; i < count; i++) drive(ready[i].data.ptr);
    }
}

/* Chains are verified while warming up only: it is a third of what a handshake costs here, and not under test. A leaf with
 * another kind of key than P-256 would be other work. */
static int verify(X509_STORE_CTX *chain, void *unused) {
    (void)unused;
    if (measuring) return 1;
    EVP_PKEY *key = X509_get0_pubkey(X509_STORE_CTX_get0_cert(chain));
    if (EVP_PKEY_get_base_id(key) == EVP_PKEY_EC && EVP_PKEY_get_bits(key) == 256) return X509_verify_cert(chain);
    fputs("the leaf is not ECDSA P-256; ", stderr);
    X509_STORE_CTX_set_error(chain, X509_V_ERR_EE_KEY_TOO_SMALL);
    return 0;
}

static void read_agents(const char *file) {
    char line[512];
    FILE *f = fopen(file, "r");
    if (!f) die(file);
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        agents = realloc(agents, sizeof *agents * (size_t)(agent_count + 1));
        agents[agent_count++] = strdup(line);
    }
    fclose(f);
}

static void print_histogram(const char *name, const struct histogram *h) {
    printf(", \"%s\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"max\": %.1f}", name, quantile(h, 0.5), quantile(h, 0.9),
        quantile(h, 0.99), (double)h->most / 1e3);
}

/* Prints how many connections nobody has closed. */
static int count_open(struct conn *conns) {
    struct epoll_event ready[256];
    int open = 0;
    for (int count; (count = epoll_wait(epoll, ready, 256, 0)) > 0;)
        for (int i = 0; i < count; i++) drive(ready[i].data.ptr);
    for (int i = 0; i < want.connections; i++) open += conns[i].state == IDLE;
    return printf("%d\n", open) < 0;
}

int main(int argc, char **argv) {
    all_descriptors();
    context = tls_context(TLS_client_method());
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_cert_verify_callback(context, verify, NULL);
    SSL_CTX_set1_groups_list(context, "X25519:P-256"); /* the same choice for everybody */
    SSL_CTX_set1_sigalgs_list(context, "ECDSA+SHA256");
    SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256");
    for (int o; (o = getopt(argc, argv, "p:Rt:h:f:m:u:vC:c:o:k:w:s:r:n:b:A:a:")) != -1;) switch (o) {
        case 'p': want.proxy = atoi(optarg); break;
        case 'R': want.reverse = true; break;
        case 't': want.port = atoi(optarg); break;
        case 'h': want.host = optarg; break;
        case 'f': want.first_host = atoi(optarg); break;
        case 'm': want.hosts = atoi(optarg); break;
        case 'u': want.path = optarg; break;
        case 'v': want.varied = true; break;
        case 'C': want.credential = optarg; break;
        case 'c': want.connections = atoi(optarg); break;
        case 'o': want.opening = atoi(optarg); break;
        case 'k': want.per_connection = atol(optarg); break;
        case 'w': want.warm_up = atof(optarg); break;
        case 's': want.seconds = atof(optarg); break;
        case 'r': want.rate = atof(optarg); break;
        case 'n': want.requests = atol(optarg); break;
        case 'b': want.upload = strtoull(optarg, NULL, 10); break;
        case 'A': read_agents(optarg); break;
        case 'a': if (SSL_CTX_load_verify_locations(context, optarg, NULL) != 1) die(optarg); break;
        default: return 2;
    }
    struct conn *conns = calloc((size_t)want.connections, sizeof *conns);
    idle = calloc((size_t)want.connections, sizeof *idle);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    next_host = want.first_host;
    for (int i = 0; i < want.connections; i++) conns[i].fd = -1, rest(&conns[i]);
    run(want.warm_up);
    if (failed || refused) return fprintf(stderr, "warm-up: %ld failed, %ld refused (last status %d)\n", failed, refused, conns[0].status), 1;
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) return 0;
    if (!want.seconds) return count_open(conns);
    measuring = true;
    uint64_t began = now_ns();
    run(want.seconds);
    double elapsed = (double)(last_done - began) / 1e9;
    printf("{\"requests\": %ld, \"refused\": %ld, \"failed\": %ld, \"connections\": %ld, \"next_host\": %d, \"bytes\": %lu, \"seconds\": %.6f",
        completed, refused, failed, dials, next_host, received, elapsed);
    print_histogram("latency", &latency);
    print_histogram("first_byte", &first_byte);
    print_histogram("event_delay", &event_delay);
    puts("}");
    return 0;
}
