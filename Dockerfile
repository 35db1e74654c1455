# The project on a GPU machine: torch's wheel brings CUDA, so the machine needs only its driver and Docker's
# GPU support. The options after --gpus are for the sandbox's namespaces, and for torchrun's shared memory.
#
#   docker build -t qrpo .
#   docker run --gpus=all --security-opt seccomp=unconfined --security-opt systempaths=unconfined --ipc=host \
#       -v "$PWD/out:/qrpo/out" qrpo bash run.sh
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
WORKDIR /qrpo
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
ENV PYTHON=python
CMD ["bash", "run.sh", "test"]
