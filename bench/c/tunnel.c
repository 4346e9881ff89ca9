/* Lets a client that knows no proxies use one: whoever connects here is connected through it, bytes both ways.
 *
 *   tunnel PROXY-PORT HOST:PORT PROXY-AUTHORIZATION      prints its port */
#include "common.h"

struct end {
    int fd;
    struct end *peer;
    bool asked; /* the proxy has not said yes yet */
    char data[64 * 1024];
    size_t from, to;
};

static char request[1024];

static void finish(struct end *e) {
    if (e->fd < 0) return;
    close(e->fd), close(e->peer->fd);
    e->fd = e->peer->fd = -1; /* both stay: an event of this round may still name them */
}

/* The answer to CONNECT, byte by byte: what follows it is the client's. */
static int read_consent(struct end *e) {
    char c;
    for (ssize_t n; (n = recv(e->fd, &c, 1, 0)) != 0;) {
        if (n < 0) return errno == EAGAIN ? AGAIN : GONE;
        e->data[e->to++] = c;
        if (e->to < 4 || memcmp(e->data + e->to - 4, "\r\n\r\n", 4)) continue;
        if (memcmp(e->data + 8, " 200", 4)) return GONE;
        e->asked = false, e->to = 0;
        return 1;
    }
    return GONE;
}

static int move(struct end *e) {
    if (e->asked) return read_consent(e);
    for (;;) {
        while (e->from < e->to) {
            ssize_t n = send(e->peer->fd, e->data + e->from, e->to - e->from, 0);
            if (n < 0) return errno == EAGAIN ? AGAIN : GONE;
            e->from += (size_t)n;
        }
        ssize_t n = recv(e->fd, e->data, sizeof e->data, 0);
        if (n <= 0) return n < 0 && errno == EAGAIN ? AGAIN : GONE;
        e->from = 0, e->to = (size_t)n;
    }
}

static void drive(struct end *e) {
    int n;
    if (e->fd < 0 || e->peer->asked) return;
    while ((n = move(e)) > 0) {}
    if (n == GONE) finish(e);
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: tunnel PROXY-PORT HOST:PORT PROXY-AUTHORIZATION\n"), 2;
    all_descriptors();
    snprintf(request, sizeof request, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s%s%s\r\n", argv[2], argv[2],
        *argv[3] ? "Proxy-Authorization: " : "", argv[3], *argv[3] ? "\r\n" : "");
    int port, listener = listen_loopback(0, &port), epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(epoll, listener, NULL);
    printf("%d\n", port);
    fflush(stdout);
    for (;;) {
        struct epoll_event ready[64];
        int count = epoll_wait(epoll, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            struct end *e = ready[i].data.ptr;
            if (e) { /* readable here, or room for what the other has; after the consent, what waited meanwhile */
                drive(e);
                drive(e->peer);
                drive(e);
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
                struct end *client = calloc(1, sizeof *client), *proxy = calloc(1, sizeof *proxy);
                client->fd = fd, client->peer = proxy, proxy->peer = client, proxy->asked = true;
                no_delay(fd);
                if ((proxy->fd = dial_loopback(atoi(argv[1]))) < 0) die("connect");
                send(proxy->fd, request, strlen(request), 0); /* loopback connects at once */
                watch(epoll, fd, client);
                watch(epoll, proxy->fd, proxy);
            }
        }
    }
}
