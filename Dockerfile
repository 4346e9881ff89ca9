# Sallyport as an image: nothing but Python, the locked packages and proxy/. Runs as nobody in particular, on a
# read-only root, without capabilities:
#   docker run --read-only --cap-drop ALL --tmpfs /tmp -v sallyport:/var/lib/sallyport -p 127.0.0.1:8080:8080 sallyport

FROM python:3.13-slim AS build
COPY requirements.lock /tmp/
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes --only-binary=:all: --requirement /tmp/requirements.lock
COPY proxy/ /opt/venv/lib/python3.13/site-packages/proxy/
# -I: no PYTHON* variable and no folder can put other code in; -B: the root is read-only; -u: logs leave at once.
RUN python -m compileall -q /opt/venv/lib/python3.13/site-packages/proxy \
    && printf '%s\n' '#!/opt/venv/bin/python -IBu' 'import sys' 'from proxy.cli import main' 'sys.exit(main())' \
        > /opt/venv/bin/sallyport \
    && chmod 0755 /opt/venv/bin/sallyport

FROM python:3.13-slim
COPY --from=build /opt/venv /opt/venv
COPY rules/ /etc/sallyport/rules/
# A volume takes over owner and mode. /var/lib/sallyport holds keys; /var/lib/sallyport-public is for sandboxes to read.
RUN install -d -o 65532 -g 65532 -m 0700 /var/lib/sallyport \
    && install -d -o 65532 -g 65532 -m 0755 /var/lib/sallyport-public
ENV PATH=/opt/venv/bin:$PATH \
    SALLYPORT_LISTEN=0.0.0.0:8080 \
    SALLYPORT_RULES=/etc/sallyport/rules \
    SALLYPORT_CERTS=/var/lib/sallyport/certs \
    SALLYPORT_STATE=/var/lib/sallyport/state
# 65532 has no entry in /etc/passwd, owns nothing else, and is not an account of the host.
USER 65532:65532
# A sallyport.yaml mounted here is found; its paths are relative to here.
WORKDIR /etc/sallyport
VOLUME /var/lib/sallyport
EXPOSE 8080 9090
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --start-interval=1s CMD ["/opt/venv/bin/python", "-I", "-c", \
    "import http.client, os; c = http.client.HTTPConnection(os.environ.get('SALLYPORT_ADMIN', '127.0.0.1:9090'), timeout=2); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["sallyport"]
CMD ["run"]
