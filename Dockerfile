# Not the slim image: networks on the CPU train with code compiled for their processor, and torch.compile and Triton,
# which a long retrain on a GPU uses, need a compiler as well.
FROM python:3.12

LABEL org.opencontainers.image.title="block-search" \
      org.opencontainers.image.description="Hyperparameter search for the CIFAR-10 block network"

# PYTHONSAFEPATH: `python -m search` takes the installed package, whatever lies in the folder it is started from.
ENV PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# A fixed number, so that the owner of volumes and bind mounts stays the same. Docker gives a new volume the owner of
# the folder it is mounted on: the folders must be there, and this user's.
RUN useradd --uid 10001 --user-group --create-home search \
    && install --directory --owner=search --group=search /work /work/studies /data

WORKDIR /opt/block-search

# Dependencies first, with those of `--artifacts s3://`: several GB that are installed again only when pyproject.toml
# changes. torch's wheels bring CUDA.
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      print(*project['dependencies'], *project['optional-dependencies']['s3'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . ./
RUN pip install --no-cache-dir --no-deps .

# Kept with every study: docker compose build --build-arg COMMIT=$(git rev-parse --short=12 HEAD)
ARG COMMIT=unknown
ENV SEARCH_COMMIT=$COMMIT

USER 10001:10001
WORKDIR /work
ENTRYPOINT ["python", "-m", "search"]
CMD ["--help"]
