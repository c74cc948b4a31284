"""Dask on Kubernetes, by Dask's operator (https://kubernetes.dask.org); not run where written.

    helm install --repo https://helm.dask.org --create-namespace -n dask-operator \
        --generate-name dask-kubernetes-operator
    python workflows/clusters/kubernetes.py --image registry/archive --workers 8 \
        -- archive ingest s3://bucket/flight --archive s3://bucket/a.zarr

The image needs this package with the extra `s3` (FROM python:3.11-slim, RUN pip install
'archive-pipeline[s3]'); flights and archive must be where the pods see them: a volume, a bucket.
"""

from __future__ import annotations

import argparse
import sys

from dask_kubernetes.operator import KubeCluster, make_cluster_spec
from run_archive import arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", required=True)
    parser.add_argument("--namespace")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="each worker has a GPU")
    options = arguments(parser)
    command = ["dask", "worker", "--nthreads", "1"]
    limits = {"memory": "3Gi"}
    if options.gpu:
        command += ["--resources", "GPU=1"]
        limits["nvidia.com/gpu"] = "1"
    spec = make_cluster_spec(
        name="archive",
        image=options.image,
        n_workers=options.workers,
        worker_command=command,
        resources={"limits": limits, "requests": limits},
        env={"OMP_NUM_THREADS": "1"},
    )
    with KubeCluster(custom_cluster_spec=spec, namespace=options.namespace) as cluster:
        return run(cluster, options.command)


if __name__ == "__main__":
    sys.exit(main())
