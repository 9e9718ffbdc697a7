# syntax=docker/dockerfile:1
#
#     docker build -t zo_hf .
#     docker run --rm --gpus all -v zo_hf-cache:/cache -v "$PWD/out:/out" zo_hf
#     docker run --rm --gpus all -v zo_hf-cache:/cache -v "$PWD/out:/out" zo_hf --output_dir /out/opt …
#
# Without arguments it runs the demo; any argument goes to recipes/opt_sst2.py instead.
# The user in the container has id 1000: /out must be writable for it (or add --user "$(id -u)").
#
# CUDA 12.6 runs with the widest range of drivers. For GPUs that need a newer one:
#     docker build --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime -t zo_hf .
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}

# The image's Python belongs to the distribution, so packages go into a virtual environment, which needs python3-venv. Triton
# compiles what launches its kernels, with a C compiler and Python's headers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# run.py installs here exactly as it does on a desk, but with the torch of the image, which it holds in place.
ENV ZO_HF_VENV=/opt/venv \
    ZO_HF_SYSTEM_TORCH=1 \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LOGNAME=zo \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    HF_HOME=/cache/huggingface

# What decides which packages are installed comes first, so that a change of the code does not repeat it.
WORKDIR /opt/zo_hf
COPY pyproject.toml constraints.txt run.py README.md LICENSE ./
COPY zo_hf/__init__.py zo_hf/version.py zo_hf/
RUN PIP_NO_CACHE_DIR=1 python3 run.py install demo peft quantization
COPY . .
RUN python -c "import torch, zo_hf.cli.main; assert not torch.__file__.startswith('/opt/venv'), torch.__file__"

# id 1000 may be taken already in the image
RUN (getent passwd 1000 >/dev/null || useradd --uid 1000 --create-home zo) \
    && mkdir -p /cache /out \
    && chown 1000 /cache /out \
    && chmod 1777 /cache /out
USER 1000
WORKDIR /out
VOLUME /cache

ENTRYPOINT ["python3", "/opt/zo_hf/run.py", "launch", "/opt/zo_hf/recipes/opt_sst2.py"]
CMD ["--offline", "--config", "/opt/zo_hf/recipes/last_norm.yaml"]
