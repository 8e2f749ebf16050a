# The server in an image of its own: Debian's Python, what it links to, pronghorn and its packages; no shell, no package
# manager, no model. `docker build -t pronghorn .`; see docs/serving.md.

FROM debian:trixie-slim AS build
ARG PYTHON=3.13
ARG RUNTIME="libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libuuid1 libssl3t64 libzstd1 \
    libpython$PYTHON-minimal libpython$PYTHON-stdlib python$PYTHON-minimal"
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update -q && apt-get install -qy --no-install-recommends ca-certificates g++ python3-dev python3-venv

# A root of links into /usr, as Debian's packages expect it, and a user who owns nothing but the cache.
WORKDIR /image
RUN mkdir -p etc/ssl/certs usr/bin usr/lib usr/lib64 home/pronghorn tmp && chmod 1777 tmp \
    && ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64 \
    && echo 'pronghorn:x:65532:65532:pronghorn:/home/pronghorn:/nologin' > etc/passwd \
    && echo 'pronghorn:x:65532:' > etc/group && mkdir /cache \
    && cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
RUN apt-get download -q $RUNTIME && for deb in *.deb; do dpkg -x "$deb" . && rm "$deb"; done \
    && ln -s python$PYTHON usr/bin/python3 \
    && rm -r usr/share usr/lib/*/gconv usr/lib/python$PYTHON/pydoc_data

COPY . /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /venv \
    && /venv/bin/pip install -q --no-compile --target usr/local/lib/python$PYTHON/dist-packages "/src[serve,structured]"
# What no server needs: tests, types, headers, scripts; the Hub's client, which tokenizers asks for and never imports.
RUN cd usr/local/lib/python$PYTHON/dist-packages && rm -rf bin huggingface_hub* hf_xet* \
    && find . -depth \( -name tests -o -name '*.pyi' -o -name '*.h' -o -name '*.a' \) -exec rm -r {} + \
    && find . -name '*.so*' -exec strip --strip-unneeded {} + \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -s /image /image/usr/lib/python$PYTHON "$PWD"
# Whatever is not there would only be missed in use.
RUN chroot /image /usr/bin/python3 -c "import pronghorn.llm, pronghorn.serve.main, llguidance, ssl, tokenizers"

FROM scratch
COPY --from=build /image /
COPY --from=build --chown=65532:65532 /cache /cache
ENV PRONGHORN_CACHE=/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532
WORKDIR /home/pronghorn
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python3", "-m", "pronghorn"]
CMD ["serve", "--host", "0.0.0.0"]
