# syntax=docker/dockerfile:1
# Image of nodes without GPU: head, sandboxes and rollout workers, and the miniature on CPU. Build it
# from the root of the checkout:
#
#   docker build -f deploy/cpu.Dockerfile --build-arg TORCH_INDEX_URL=INDEX_OF_CPU_WHEELS \
#       --build-arg COMMIT="$(git describe --always --dirty --abbrev=40)" \
#       -t registry.example.org/rstar-cluster:0.1.0-cpu .
#
# TORCH_INDEX_URL: index of torch's CPU wheels. The lines that install are those of deploy/install.sh,
# a test compares them, and one for the clouds: clients of their buckets, and what the autoscaler on
# the head buys machines with.
ARG UBUNTU_IMAGE=ubuntu:noble-20250127

FROM ${UBUNTU_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential procps rsync python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
ARG TORCH_INDEX_URL=
WORKDIR /src
RUN python3 -m venv /opt/venv
COPY requirements ./requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/python -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --no-deps -r requirements/torch.txt \
    && /opt/venv/bin/python -m pip install --no-deps -r requirements/cpu.txt \
    && /opt/venv/bin/python -m pip install -r requirements/clouds.txt -c requirements/cpu.txt
COPY . .
RUN /opt/venv/bin/python -m pip install --no-deps --no-build-isolation . \
    && /opt/venv/bin/python -c 'import torch, vllm, ray'

FROM base
# A login shell, as Ray's launcher starts them, sets a path of its own.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 rstar \
    && echo "export PATH=/opt/venv/bin:\$PATH" >/etc/profile.d/rstar.sh
ARG COMMIT=
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/rstar \
    RSTAR_COMMIT=${COMMIT} \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/rstar
CMD ["rstar", "--help"]
