# dynajax on a CPU.
#
#   docker build -t dynajax .
#   docker run --rm -v "$PWD/runs:/dynajax/runs" dynajax train --env=cheetah-run --fix=scale,target
FROM python:3.12-slim

# EGL and OSMesa draw videos without a display.
RUN apt-get update && apt-get install -y --no-install-recommends libegl1 libosmesa6 \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dynajax
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY experiments experiments
COPY launch launch
RUN pip install --no-cache-dir -c constraints.txt -e .

# Run directories are written to /dynajax/runs.
WORKDIR /dynajax
ENTRYPOINT ["dynajax"]
CMD ["--help"]
