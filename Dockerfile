# syntax=docker/dockerfile:1

# An exported network behind HTTP, on the CPU, without PyTorch:
#   docker build --target serve -t npprune-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/ckpt/NAME:/model:ro" npprune-serve
FROM python:3.12-slim AS serve

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# Every wheel by its hash; `.ci/pin` writes the file anew.
COPY requirements-serve.txt /src/
RUN useradd --no-create-home --uid 10001 npprune \
    && pip install --require-hashes --only-binary=:all: -r /src/requirements-serve.txt

WORKDIR /srv
COPY pyproject.toml README.md LICENSE /src/
COPY recipes /src/recipes
COPY npprune /src/npprune
# The networks' libraries stay out: reading a file needs none of them.
RUN pip install --no-deps /src && rm -rf /src
COPY examples/serve.py ./

USER npprune
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--provider", "cpu"]
CMD ["/model/model.onnx"]


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
