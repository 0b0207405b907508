# syntax=docker/dockerfile:1
# GPU image. Build: docker build -t moe-train .
# Run one node: docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/opt/moe_train/runs" moe-train
#
# For drivers older than 580: --build-arg CUDA=12
#                           --build-arg CUDA_IMAGE=nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04
#
# torch, NCCL and TransformerEngine are pinned by constraints.txt (torch's wheel brings its own NCCL);
# the CUDA toolkit of the base image only compiles TransformerEngine and Apex, whose major version
# has to be torch's. It carries the cuDNN and NCCL headers that TransformerEngine is built with.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# hadolint ignore=DL3006
FROM ${CUDA_IMAGE}

# A100, H100/H200 and B200; fewer architectures build faster.
ARG CUDA_ARCHITECTURES="8.0;9.0;10.0"
# NVIDIA Apex from NVIDIA's own repository. The package called `apex` on the public index is an
# unrelated web toolkit and must never be installed.
ARG APEX_REPOSITORY=https://github.com/NVIDIA/apex.git
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG BUILD_JOBS=8
# 12 or 13: which of the pinned sets, see launch/choose_cuda.sh.
ARG CUDA=13

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential ca-certificates cmake git make ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 trainer \
    && install --directory --owner trainer --group trainer /opt/moe_train
USER 10001
WORKDIR /opt/moe_train

ENV VIRTUAL_ENV=/opt/moe_train/.venv \
    PATH=/opt/moe_train/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Slow layers first: they change with the pinned versions only, not with the sources.
COPY --chown=trainer:trainer constraints.txt constraints-cu12.txt ./
RUN python3 -m venv .venv \
    && if [ "${CUDA}" = 12 ]; then cp constraints-cu12.txt .venv/pinned.txt; \
       else cp constraints.txt .venv/pinned.txt; fi \
    && pip install --constraint .venv/pinned.txt torch numpy packaging setuptools wheel ninja pybind11

# Both are compiled against the torch just installed, hence without build isolation.
RUN MAX_JOBS=${BUILD_JOBS} NVTE_FRAMEWORK=pytorch TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-build-isolation --constraint .venv/pinned.txt \
        "transformer-engine[core_cu${CUDA},pytorch]"
RUN git init --quiet /tmp/apex \
    && git -C /tmp/apex fetch --quiet --depth 1 "${APEX_REPOSITORY}" "${APEX_COMMIT}" \
    && git -C /tmp/apex checkout --quiet FETCH_HEAD \
    && MAX_JOBS=${BUILD_JOBS} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
        pip install --no-build-isolation /tmp/apex \
    && rm -rf /tmp/apex

COPY --chown=trainer:trainer . .
RUN if [ "${CUDA}" = 12 ]; then gpu=gpu-cu12; else gpu=gpu; fi \
    && pip install --constraint .venv/pinned.txt --editable ".[${gpu},hf]" \
    && mkdir --parents runs

# The planner needs no GPU: an image that cannot plan the 30B reference config fails to build.
# No HEALTHCHECK: a training container ends by its exit code and writes runs/*/status.json.
RUN moe-train plan experiment=moe_30b_8x64gb --world 8

ENTRYPOINT ["launch/torchrun.sh"]
