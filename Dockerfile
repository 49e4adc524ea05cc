# Three images from one file, `docker build --target scheduler | executor | executor-gpu .`, and `smg`, another's gateway.
# The scheduler's, which is the gateway's too, has no torch: it stays small, and an import that should not be there fails.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/pagewire/bin:$PATH \
    PAGEWIRE_HOME=/models
# /models and /keys are the user's before volumes are laid over them: a new volume takes its owner from here
RUN groupadd --gid 10001 pagewire && useradd --uid 10001 --gid pagewire --create-home pagewire \
    && install --directory --owner pagewire --group pagewire /models \
    && install --directory --owner pagewire --group pagewire --mode 700 /keys
STOPSIGNAL SIGTERM


# Pagewire itself, apart from what it depends on: a change in the sources makes nothing else anew
FROM base AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools
# Minutes, and so before the rest is there. A machine without kernels serves slowly; an image without them is not made
COPY executor/__init__.py executor/
COPY executor/native executor/native
RUN python -m executor.native.build && ls executor/native/built/*.so
COPY . .
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheel .


FROM base AS scheduler-dependencies
WORKDIR /src
RUN python -m venv /opt/pagewire
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; o = p['optional-dependencies']; print(*p['dependencies'], *o['gateway'], *o['smg'], *o['tracing'], sep='\n')" \
       > scheduler.txt \
    && pip install -c constraints.txt -r scheduler.txt


FROM base AS scheduler
COPY --from=scheduler-dependencies /opt/pagewire /opt/pagewire
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl && pip check
USER pagewire
EXPOSE 50051 50052
ENTRYPOINT ["pagewire"]
CMD ["scheduler", "--help"]


FROM scheduler-dependencies AS executor-dependencies
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['executor'], sep='\n')" \
       > executor.txt
# torch comes alone: its index is asked for nothing else, and what it holds outranks PyPI's CUDA build of the same version
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps -c constraints.txt --retries 2 --extra-index-url ${TORCH_INDEX} torch
RUN pip install -c constraints.txt -r executor.txt


FROM base AS executor
COPY --from=executor-dependencies /opt/pagewire /opt/pagewire
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl && pip check
USER pagewire
ENTRYPOINT ["pagewire"]
CMD ["executor", "--help"]


# PyPI's torch brings the CUDA libraries with it; the machine gives the driver
FROM scheduler-dependencies AS executor-gpu-dependencies
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['executor'], sep='\n')" \
       > executor.txt \
    && pip install -c constraints.txt -r executor.txt


FROM base AS executor-gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/tmp/triton
# Triton makes its bridge to the driver in C, where it runs
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=executor-gpu-dependencies /opt/pagewire /opt/pagewire
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl && pip check
USER pagewire
ENTRYPOINT ["pagewire"]
CMD ["executor", "--help"]


# Nothing of Pagewire's: the SMG gateway, for the profile of that name
FROM base AS smg
COPY constraints.txt ./
RUN python -m venv /opt/smg && /opt/smg/bin/pip install -c constraints.txt smg==1.13.0
USER pagewire
EXPOSE 30000
ENTRYPOINT ["/opt/smg/bin/smg"]
CMD ["launch", "--help"]
