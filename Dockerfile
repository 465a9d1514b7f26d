# For a machine with NVIDIA GPUs and their container toolkit; CUDA itself comes with JAX. How it is run: docs/machines.md.
FROM python:3.12-slim
ARG EXTRAS=cuda,openmoji,evaluate
COPY . /sbv2_jax
RUN pip install --no-cache-dir "/sbv2_jax[${EXTRAS}]"
# Runs are made where the host's folder is mounted, and what was compiled or fetched is kept with them.
ENV XDG_CACHE_HOME=/runs/.cache HF_HOME=/runs/.cache/huggingface
WORKDIR /runs
CMD ["sbv2-train", "--help"]
