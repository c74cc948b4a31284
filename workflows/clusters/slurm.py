"""Dask workers as SLURM jobs, by dask-jobqueue; the scheduler runs where this does.

    python workflows/clusters/slurm.py --jobs 8 --gpu -- archive ingest /nas/flight

Jobs are asked for as there is work, `--jobs` at most, and end when it is done. `--show` prints
the job script and submits nothing; that alone was run where this was written.
"""

from __future__ import annotations

import argparse
import sys

from dask_jobqueue import SLURMCluster
from distributed.security import Security
from run_archive import add_tls, arguments, run, use_tls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cores", type=int, default=8, help="of a job: a worker each")
    parser.add_argument("--gpu", action="store_true", help="a job is one worker with a GPU")
    parser.add_argument("--queue")
    parser.add_argument("--account")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--interface", help="network interface that nodes reach each other by")
    parser.add_argument("--show", action="store_true", help="print the job script")
    add_tls(parser)
    options = arguments(parser)
    use_tls(options.tls)
    workers = 1 if options.gpu else options.cores
    with SLURMCluster(
        cores=workers,  # threads of Dask's, one a worker
        processes=workers,
        job_cpu=options.cores,
        memory=f"{2 * workers + 2} GB",
        queue=options.queue,
        account=options.account,
        walltime=options.walltime,
        interface=options.interface,
        security=None if options.tls is None else Security(),
        job_extra_directives=["--gres=gpu:1"] if options.gpu else [],
        job_script_prologue=[f"export OMP_NUM_THREADS={options.cores // workers}"],
        worker_extra_args=["--resources", "GPU=1"] if options.gpu else [],
    ) as cluster:
        if options.show:
            print(cluster.job_script())
            return 0
        cluster.adapt(minimum_jobs=1, maximum_jobs=options.jobs)
        return run(cluster, options.command)


if __name__ == "__main__":
    sys.exit(main())
