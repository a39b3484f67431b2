# Three images from one file:
#   docker build --target api .          no torch
#   docker build --target worker .       torch for CPUs
#   docker build --target worker-gpu .   torch for CUDA
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 gradstream && install -d -o gradstream -g gradstream /outputs /run/gradstream /home/gradstream/.cache
WORKDIR /app
COPY constraints.txt ./

FROM base AS wheel
COPY pyproject.toml README.md ./
COPY api api
COPY engine engine
COPY shared shared
COPY worker worker
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS api
COPY api/requirements.txt ./
RUN pip install -c constraints.txt -r requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
COPY configs configs
USER gradstream
EXPOSE 5555

FROM base AS worker-gpu
RUN pip install -c constraints.txt torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install -c constraints.txt /wheels/*.whl
COPY configs configs
USER gradstream

FROM base AS worker
# An index with torch for CPUs only makes this image smaller: --build-arg TORCH_INDEX=URL
ARG TORCH_INDEX=""
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install -c constraints.txt /wheels/*.whl
COPY configs configs
USER gradstream
