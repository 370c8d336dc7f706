# The wheels of torch carry the CUDA 13 libraries: the base flavour adds only what the driver needs.
FROM docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# A layer of its own: an edit of the code does not download 5 GB again.
COPY requirements.txt /app/
RUN python3 -m venv /app/venv \
 && /app/venv/bin/pip install --no-cache-dir --disable-pip-version-check -r /app/requirements.txt

COPY *.py LICENSE /app/
COPY support /app/support
COPY weights /app/weights
RUN /app/venv/bin/python -m compileall -q /app/*.py /app/support

# Any uid works (docker run --user): nothing is written outside the mounted folders and /tmp.
# Caches follow HOME, which Apptainer sets to the user's: its /tmp is the host's, shared by all.
ENV HOME=/tmp PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/app/venv/bin/python", "/app/mamgan.py"]
CMD ["--help"]
