"""A worker for each GPU of this machine, by dask-cuda; not run where this was written.

    python workflows/clusters/cuda.py -- archive ingest /nas/flight

`archive ingest` alone does that, too. dask-cuda also binds each worker to the cores and the
network card that are next to its GPU.
"""

from __future__ import annotations

import argparse
import sys

from dask_cuda import LocalCUDACluster
from run_archive import arguments, run


def main() -> int:
    options = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    with LocalCUDACluster(threads_per_worker=1, resources={"GPU": 1}) as cluster:
        return run(cluster, options.command)


if __name__ == "__main__":
    sys.exit(main())
