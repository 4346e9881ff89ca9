/* What the generator and the upstream share: time, sockets, TLS reads and writes, HTTP/1.1 bodies. */
#pragma once
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 8192, BULK = 256 * 1024, AGAIN = -1, GONE = -2 };

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "failed");
    ERR_print_errors_fp(stderr);
    exit(1);
}

/* Nanoseconds of CLOCK_MONOTONIC, which every process of the machine shares. */
static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void all_descriptors(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
}

static inline void no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline int listen_loopback(int port, int *bound) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof a;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&a, sizeof a) || listen(fd, 4096) || getsockname(fd, (void *)&a, &size)) die("listen");
    *bound = ntohs(a.sin_port);
    return fd;
}

static inline int dial_loopback(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    no_delay(fd);
    if (connect(fd, (void *)&a, sizeof a) && errno != EINPROGRESS) return close(fd), -1;
    return fd;
}

/* Edge-triggered both ways, once for the life of the socket: whoever is woken goes on until AGAIN. */
static inline void watch(int epoll, int fd, void *who) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = who};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e)) die("epoll_ctl");
}

static inline int tls_outcome(SSL *ssl, int result) {
    if (result > 0) return result;
    int why = SSL_get_error(ssl, result);
    if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) return AGAIN;
    ERR_clear_error();
    return GONE;
}

static inline int tls_read(SSL *ssl, void *data, size_t size) { return tls_outcome(ssl, SSL_read(ssl, data, (int)size)); }

static inline int tls_write(SSL *ssl, const void *data, size_t size) {
    return tls_outcome(ssl, SSL_write(ssl, data, (int)size));
}

static inline SSL_CTX *tls_context(const SSL_METHOD *method) {
    SSL_CTX *context = SSL_CTX_new(method);
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    return context;
}

/* The value of a header in a head that ends with NUL; case-insensitive. `size` gets its length. */
static inline const char *header(const char *head, const char *name, size_t *size) {
    size_t n = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line && line[2] != '\r'; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, n) || line[2 + n] != ':') continue;
        const char *value = line + 3 + n;
        while (*value == ' ') value++;
        *size = strcspn(value, "\r");
        return value;
    }
    return NULL;
}

/* A body on the wire, decoded piece by piece (RFC 9112 section 6 and 7.1). */
struct body {
    enum { LENGTH, CHUNKED, UNTIL_CLOSE } kind;
    enum { SIZE, EXTENSION, DATA, DATA_END, TRAILER } state;
    uint64_t left;    /* bytes of the length, or of this chunk */
    bool empty_line;  /* of the trailer: nothing but CR so far */
    bool done;
};

static inline void body_start(struct body *b, const char *head, bool has_none, bool to_close) {
    size_t size;
    const char *value;
    *b = (struct body){.kind = LENGTH, .state = SIZE};
    if (has_none) b->done = true;
    else if ((value = header(head, "transfer-encoding", &size)) && size == 7 && !strncasecmp(value, "chunked", 7)) b->kind = CHUNKED;
    else if ((value = header(head, "content-length", &size))) b->left = strtoull(value, NULL, 10);
    else if (to_close) b->kind = UNTIL_CLOSE;
    if (b->kind == LENGTH && !b->left) b->done = true;
}

static inline int hex(char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* Takes bytes until the body is done; how many it took. `sink` sees the decoded ones. */
static inline size_t body_feed(struct body *b, const char *data, size_t size, void (*sink)(void *, const char *, size_t),
                               void *who) {
    const char *p = data, *end = data + size;
    while (p < end && !b->done) {
        if (b->kind != CHUNKED || b->state == DATA) {
            size_t n = (size_t)(end - p);
            if (b->kind != UNTIL_CLOSE && n > b->left) n = b->left;
            if (sink) sink(who, p, n);
            p += n;
            if (b->kind == UNTIL_CLOSE) continue;
            if ((b->left -= n) == 0 && b->kind == LENGTH) b->done = true;
            else if (b->left == 0) b->state = DATA_END;
            continue;
        }
        char c = *p++;
        if (b->state == SIZE && hex(c) >= 0) b->left = b->left * 16 + (unsigned)hex(c);
        else if (b->state == DATA_END) b->state = c == '\n' ? SIZE : DATA_END;
        else if (b->state == TRAILER && c == '\n') b->done = b->empty_line, b->empty_line = true;
        else if (b->state == TRAILER) b->empty_line = b->empty_line && c == '\r';
        else if (c != '\n') b->state = EXTENSION;
        else b->state = b->left ? DATA : TRAILER, b->empty_line = true;
    }
    return (size_t)(p - data);
}
