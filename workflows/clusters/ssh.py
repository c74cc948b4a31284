"""Dask on machines that SSH reaches, the scheduler on the first of them.

    python workflows/clusters/ssh.py node1 node2 --workers 8 -- archive ingest /nas/flight

Logs in as `ssh HOST` does (keys, agent, ~/.ssh/config), without passwords.
"""

from __future__ import annotations

import argparse
import sys

from distributed import SSHCluster
from distributed.security import Security
from run_archive import add_tls, arguments, run, use_tls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="+", metavar="HOST")
    parser.add_argument("--workers", type=int, default=1, help="worker processes on each host")
    parser.add_argument("--gpu", action="store_true", help="each worker has a GPU")
    parser.add_argument("--python", default=sys.executable, help="the hosts' Python")
    parser.add_argument("--port", type=int, default=22)
    parser.add_argument("--any-host-key", action="store_true", help="trust unknown hosts")
    add_tls(parser)
    options = arguments(parser)
    use_tls(options.tls)
    connect = {"port": options.port}
    if options.any_host_key:
        connect["known_hosts"] = None
    worker = {"nthreads": 1, "n_workers": options.workers}
    if options.gpu:
        worker["resources"] = {"GPU": 1}
    with SSHCluster(
        [options.hosts[0], *options.hosts],
        connect_options=connect,
        worker_options=worker,
        security=Security(),
        remote_python=options.python,
    ) as cluster:
        return run(cluster, options.command)


if __name__ == "__main__":
    sys.exit(main())
