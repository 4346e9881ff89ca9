/* The origin server of the benchmark: TLS, HTTP/1.1, one thread. It answers 403 to whoever lacks the credential, so a
 * proxy that does not do its work is seen.
 *
 *   upstream CERT KEY "Bearer CREDENTIAL"      prints its port
 *
 *   GET  /bytes/N          N bytes
 *   GET  /sse/COUNT/MICROS COUNT events, one each MICROS; the data of each is when it was sent, in ns of CLOCK_MONOTONIC
 *   GET  /health           200 without a credential
 *   GET  anything else     a small JSON object
 *   POST                   takes the body, answers as GET
 */
#include "common.h"

struct conn {
    int fd;
    SSL *ssl;
    enum { SHAKE, HEAD, BODY, ANSWER } state;
    char in[HEAD_MAX + 1];
    size_t have;
    struct body body;
    char out[1024];
    size_t out_size, out_done;
    uint64_t bytes_left;            /* of a bulk answer, after `out` */
    uint64_t events, interval, due; /* of an SSE answer */
    bool chunked, close;
    struct conn *previous, *next;   /* those with events to come */
};

static const char SMALL[] = "{\"object\":\"list\",\"data\":[{\"id\":\"model-1\",\"object\":\"model\",\"owned_by\":\"bench\"}]}";
static char bulk[64 * 1024];
static const char *credential;
static struct conn *streams;

static void unlink_stream(struct conn *c) {
    if (c->previous) c->previous->next = c->next;
    else if (streams == c) streams = c->next;
    if (c->next) c->next->previous = c->previous;
    c->previous = c->next = NULL;
}

static void end(struct conn *c) {
    unlink_stream(c);
    SSL_shutdown(c->ssl);
    ERR_clear_error();
    SSL_free(c->ssl);
    close(c->fd);
    free(c);
}

static void say(struct conn *c, const char *status, const char *extra, uint64_t length) {
    c->out_size = (size_t)snprintf(c->out, sizeof c->out,
        "HTTP/1.1 %s\r\ncontent-type: application/json\r\n%scontent-length: %lu\r\n\r\n", status, extra, length);
    c->out_done = 0;
}

static void add_event(struct conn *c, uint64_t now) {
    char event[64];
    int n = snprintf(event, sizeof event, "data: %lu\n\n", now);
    c->out_size = (size_t)snprintf(c->out, sizeof c->out, "%x\r\n%s\r\n%s", n, event, --c->events ? "" : "0\r\n\r\n");
    c->out_done = 0;
}

static void answer(struct conn *c) {
    size_t size;
    unsigned long a, b;
    const char *value = header(c->in, "authorization", &size);
    char *path = strchr(c->in, ' ');
    path = path ? path + 1 : c->in;
    bool known = value && size == strlen(credential) && !memcmp(value, credential, size);
    c->close = (value = header(c->in, "connection", &size)) && size == 5 && !strncasecmp(value, "close", 5);
    c->bytes_left = c->events = 0;
    c->state = ANSWER;
    if (!known && strncmp(path, "/health ", 8)) {
        say(c, "403 Forbidden", "", 0);
    } else if (sscanf(path, "/bytes/%lu ", &a) == 1) {
        say(c, "200 OK", "", a);
        c->bytes_left = a;
    } else if (sscanf(path, "/sse/%lu/%lu ", &a, &b) == 2 && a) {
        uint64_t now = now_ns();
        c->events = a, c->interval = b * 1000, c->due = now + c->interval;
        char first[512];
        add_event(c, now);
        memcpy(first, c->out, c->out_size + 1);
        c->out_size = (size_t)snprintf(c->out, sizeof c->out,
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
            "transfer-encoding: chunked\r\n\r\n%s", first);
        if (c->events) {
            c->previous = NULL, c->next = streams;
            if (streams) streams->previous = c;
            streams = c;
        }
    } else {
        say(c, "200 OK", "", sizeof SMALL - 1);
        memcpy(c->out + c->out_size, SMALL, sizeof SMALL);
        c->out_size += sizeof SMALL - 1;
    }
}

/* Reads a head, and what came of the body with it. */
static int read_head(struct conn *c) {
    char *stop;
    while (!(stop = c->have ? memmem(c->in, c->have, "\r\n\r\n", 4) : NULL)) {
        if (c->have == HEAD_MAX) return GONE;
        int n = tls_read(c->ssl, c->in + c->have, HEAD_MAX - c->have);
        if (n < 0) return n;
        c->have += (size_t)n;
    }
    char *rest = stop + 4, saved = *rest;
    size_t size, n = c->have - (size_t)(rest - c->in);
    c->in[c->have] = 0;
    *rest = 0;
    bool none = !strncmp(c->in, "GET ", 4);
    const char *expect = header(c->in, "expect", &size);
    if (expect) SSL_write(c->ssl, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    body_start(&c->body, c->in, none, false);
    answer(c); /* before the body takes the buffer; it is sent after it */
    *rest = saved;
    size_t taken = body_feed(&c->body, rest, n, NULL, NULL);
    memmove(c->in, rest + taken, n - taken);
    c->have = n - taken;
    c->state = c->body.done ? ANSWER : BODY;
    return 1;
}

static int read_body(struct conn *c) {
    static char data[BULK];
    while (!c->body.done) {
        int n = tls_read(c->ssl, data, sizeof data);
        if (n < 0) return n;
        size_t taken = body_feed(&c->body, data, (size_t)n, NULL, NULL);
        if ((size_t)n - taken > HEAD_MAX) return GONE;
        memcpy(c->in, data + taken, c->have = (size_t)n - taken);
    }
    c->state = ANSWER;
    return 1;
}

static int write_answer(struct conn *c) {
    while (c->out_done < c->out_size) {
        int n = tls_write(c->ssl, c->out + c->out_done, c->out_size - c->out_done);
        if (n < 0) return n;
        c->out_done += (size_t)n;
    }
    while (c->bytes_left) {
        int n = tls_write(c->ssl, bulk, c->bytes_left < sizeof bulk ? c->bytes_left : sizeof bulk);
        if (n < 0) return n;
        c->bytes_left -= (size_t)n;
    }
    if (c->events) return AGAIN;
    if (c->close) return GONE;
    c->state = HEAD;
    return 1;
}

static int step(struct conn *c) {
    int n;
    switch (c->state) {
    case SHAKE:
        if ((n = tls_outcome(c->ssl, SSL_accept(c->ssl))) > 0) c->state = HEAD;
        return n;
    case HEAD: return read_head(c);
    case BODY: return read_body(c);
    default: return write_answer(c);
    }
}

static void drive(struct conn *c) {
    int n;
    while ((n = step(c)) > 0) {}
    if (n == GONE) end(c);
}

static void send_events(void) {
    uint64_t now = now_ns();
    for (struct conn *c = streams, *next; c; c = next) {
        next = c->next;
        if (c->due > now || c->out_done < c->out_size) continue;
        c->due += c->interval;
        add_event(c, now_ns());
        if (!c->events) unlink_stream(c);
        drive(c);
    }
}

static int choose_http1(SSL *ssl, const unsigned char **out, unsigned char *size, const unsigned char *in, unsigned n, void *u) {
    static const unsigned char ours[] = "\x08http/1.1";
    (void)ssl, (void)u;
    int found = SSL_select_next_proto((unsigned char **)out, size, ours, 9, in, n);
    return found == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_NOACK;
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: upstream CERT KEY CREDENTIAL\n"), 2;
    all_descriptors();
    credential = argv[3];
    uint32_t state = 1; /* as varied as text: what looks for secrets in it has to look */
    for (size_t i = 0; i < sizeof bulk; i++) {
        state = state * 1664525u + 1013904223u;
        bulk[i] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n"[(state >> 24) & 63];
    }
    SSL_CTX *context = tls_context(TLS_server_method());
    SSL_CTX_set_alpn_select_cb(context, choose_http1, NULL);
    SSL_CTX_set_session_id_context(context, (const unsigned char *)"bench", 5);
    if (SSL_CTX_use_certificate_chain_file(context, argv[1]) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, argv[2], SSL_FILETYPE_PEM) != 1) die("certificate");
    int port, listener = listen_loopback(0, &port), epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(epoll, listener, NULL);
    printf("%d\n", port);
    fflush(stdout);
    for (;;) {
        struct epoll_event ready[256];
        int count = epoll_wait(epoll, ready, 256, streams ? 1 : -1);
        for (int i = 0; i < count; i++) {
            if (ready[i].data.ptr) {
                drive(ready[i].data.ptr);
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
                struct conn *c = calloc(1, sizeof *c);
                c->fd = fd;
                no_delay(fd);
                SSL_set_fd(c->ssl = SSL_new(context), fd);
                watch(epoll, fd, c);
                drive(c);
            }
        }
        if (streams) send_events();
    }
}
