"""The recipes of workflows/clusters that can run on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FRAMES, ROOT, Run, command_line
from distributed.security import Security

CLUSTERS = ROOT / "workflows" / "clusters"

# An SSH server on loopback that runs what it is told, as whoever runs the test.
SERVER = """
import asyncio, subprocess, asyncssh

class Anybody(asyncssh.SSHServer):
    def begin_auth(self, username):
        return False

async def handle(process):
    child = await asyncio.create_subprocess_shell(
        process.command, stdin=-1, stdout=-1, stderr=-1, start_new_session=True
    )
    try:
        await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
        process.exit(await child.wait())
    finally:
        if child.returncode is None:
            child.kill()

async def main():
    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=Anybody, server_host_keys=[key], process_factory=handle
    )
    print(server.get_port(), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True])
def test_ssh_over_loopback(tls: bool, flight: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("asyncssh")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=environ
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    url = tmp_path / "a.zarr"
    ingest = command_line("ingest", flight, "--archive", url, "--ratio", 16, "--json")
    recipe = [sys.executable, str(CLUSTERS / "ssh.py"), "127.0.0.1", "--workers", "2"]
    recipe += ["--port", port, "--any-host-key"]
    if tls:
        made = Security.temporary()
        (tmp_path / "cluster.pem").write_text(made.tls_client_cert)
        (tmp_path / "cluster.key").write_text(made.tls_client_key)
        recipe += ["--tls", str(tmp_path)]
    try:
        done = subprocess.run(
            [*recipe, "--", *ingest],
            capture_output=True,
            text=True,
            timeout=300,
            env=environ,
        )
    finally:
        server.kill()
        server.communicate()
    assert done.returncode == 0, done.stderr
    assert ("tls://" in done.stderr, "tcp://" in done.stderr) == (tls, not tls)
    result = json.loads(done.stdout)
    assert (result["ingested"], result["workers"]) == (FRAMES, 2)
    assert run("check", "--archive", url).code == 0


@pytest.mark.slow
def test_slurm_job_script() -> None:
    pytest.importorskip("dask_jobqueue")
    command = [sys.executable, str(CLUSTERS / "slurm.py"), "--show", "--gpu", "--cores", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --gres=gpu:1" in done.stdout
    assert "#SBATCH --cpus-per-task=6" in done.stdout
    assert "--nthreads 1" in done.stdout
    assert "--resources GPU=1" in done.stdout
