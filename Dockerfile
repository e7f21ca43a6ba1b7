# A convenience, not a requirement: the package installs beside any stock PyTorch. Not built in CI.
#   docker build -t tp-overlap-kernels . && docker run --gpus all --ipc=host tp-overlap-kernels
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ make python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make .venv/.installed
CMD ["make", "bench"]
