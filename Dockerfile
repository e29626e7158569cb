# syntax=docker/dockerfile:1
# npprune on a GPU: docker build -t npprune . && docker run --gpus all -v "$PWD:/data" npprune demo
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04 AS npprune

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/npprune/bin:$PATH

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/npprune \
    && useradd --create-home --uid 10001 npprune

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY recipes ./recipes
COPY npprune ./npprune
RUN pip install . && rm -rf /src

USER npprune
WORKDIR /data
ENTRYPOINT ["npprune"]
CMD ["--help"]
