FROM python:3.12-slim

# git: a run records its commit.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

RUN useradd --create-home dtrain
USER dtrain
WORKDIR /home/dtrain
ENTRYPOINT ["dtrain"]
CMD ["--help"]
