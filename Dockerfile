# Three images from one file: docker build --target gateway|engine-gpu|trainer .
#
# gateway     the gateway and every command that talks to one; no torch, no vLLM
# engine-gpu  the gateway with vLLM for an NVIDIA GPU: `docker compose up` serves with it
# trainer     training and evaluation on an NVIDIA GPU
#
# The libraries that CUDA needs come with the Python packages; the host gives the driver.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    LORIKEET_HOME=/data LORIKEET_HOST=0.0.0.0
RUN useradd --uid 10001 --create-home lorikeet && install -d -o lorikeet -g lorikeet -m 700 /data
WORKDIR /srv/lorikeet
VOLUME /data

FROM base AS gateway
COPY locks/gateway.txt locks/
RUN pip install --no-deps --require-hashes -r locks/gateway.txt
COPY pyproject.toml README.md LICENSE lorikeet.py ./
COPY configs configs
COPY loadtests loadtests
COPY trainer trainer
COPY adapters adapters
COPY gateway gateway
RUN pip install --no-deps .
USER lorikeet
EXPOSE 8080
ENTRYPOINT ["lorikeet"]
CMD ["--help"]

FROM base AS engine-gpu
# libnuma1 for vLLM; a C compiler for the kernels that Triton builds when the engine starts
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 && rm -rf /var/lib/apt/lists/*
COPY locks/gpu.txt locks/
RUN pip install --no-deps --require-hashes -r locks/gpu.txt
COPY pyproject.toml README.md LICENSE lorikeet.py ./
COPY configs configs
COPY loadtests loadtests
COPY trainer trainer
COPY adapters adapters
COPY gateway gateway
RUN pip install --no-deps .
USER lorikeet
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
ENTRYPOINT ["lorikeet"]
CMD ["serve"]

FROM base AS trainer
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY locks/trainer.txt locks/
RUN pip install --no-deps --require-hashes -r locks/trainer.txt
COPY pyproject.toml README.md LICENSE lorikeet.py ./
COPY configs configs
COPY loadtests loadtests
COPY adapters adapters
COPY gateway gateway
COPY trainer trainer
RUN pip install --no-deps .
USER lorikeet
ENTRYPOINT ["lorikeet"]
CMD ["train", "--help"]
