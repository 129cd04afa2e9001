# ogdm_jax for NVIDIA GPUs. CUDA comes with JAX's wheels, so the image needs none; the machine needs the driver
# (580 or newer for cuda13, 525 or newer for cuda12) and the NVIDIA Container Toolkit.
#
#   docker build -t ogdm .                                  (--build-arg CUDA=cuda12 for an older driver)
#   docker run --rm --gpus all ogdm doctor                  says which devices JAX finds
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" ogdm train
#
# This file has not been built where it was written, which has no Docker daemon: tests/test_docker.py
# holds that its paths exist and that its extras are JAX's own.
FROM python:3.12-slim
ARG CUDA=cuda13
WORKDIR /opt/ogdm_jax
COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY ogdm_jax ogdm_jax
RUN pip install --no-cache-dir . "jax[${CUDA}]"
WORKDIR /work
ENTRYPOINT ["ogdm"]
CMD ["doctor"]
