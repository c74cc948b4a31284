"""Workers without images: their deaths, their GPUs, a scheduler that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import distributed  # noqa: F401  what `dask.config.set` undoes would else be all of its settings
import psutil
import pytest

from archive_pipeline.jobs import cluster
from archive_pipeline.locks import is_locked, locked
from archive_pipeline.stages import stage, timed

POISON = 7


@contextmanager
def dask_processes(
    *workers: str, scheduler: Sequence[str] = (), protocol: str = "tcp"
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A scheduler and workers with these options as processes; yields its address and process."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # these tests' functions
    environ = {**os.environ, "PYTHONPATH": paths}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environ}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0"]
    command += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--host", "127.0.0.1"]
    command += ["--protocol", protocol, *scheduler]
    processes = [subprocess.Popen(command, **quiet)]
    try:
        lines = processes[0].stderr
        assert lines is not None
        address = next(line.split()[-1] for line in lines if "Scheduler at:" in line)
        for options in workers:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", address]
            command += ["--nthreads", "1", "--no-dashboard", *options.split()]
            processes.append(subprocess.Popen(command, **{**quiet, "stderr": subprocess.DEVNULL}))
        yield address, processes[0]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=60)


def _die_of_poison(number: int) -> int:
    if number == POISON:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return number


def test_only_the_task_that_kills_its_workers_fails() -> None:
    with cluster.connect(None, 2, 40) as pool:
        results = dict(pool.run(_die_of_poison, list(range(40))))
        assert isinstance(results.pop(POISON), cluster.WorkerDied)
        assert results == {n: n for n in range(40) if n != POISON}
        # suspected after so many deaths, and blamed after as many more alone
        assert pool.lost == 2 * cluster.DEATHS
        assert pool.retries >= pool.lost


def _square(number: int) -> int:
    time.sleep(0.1)
    return number * number


@pytest.mark.slow
def test_workers_that_cannot_start_for_a_while_come_back(tmp_path: Path) -> None:
    import dask

    trouble = tmp_path / "trouble"
    preload = tmp_path / "preload.py"
    preload.write_text(f"import os\nassert not os.path.exists({str(trouble)!r})\n")
    with (
        dask.config.set({"distributed.worker.preload": [str(preload)]}),
        cluster.connect(None, 1, 10) as pool,
    ):
        results = pool.run(_square, list(range(10)))
        first = next(results)
        trouble.touch()
        for child in psutil.Process().children(recursive=True):
            if any("spawn_main" in part for part in child.cmdline()):
                child.kill()
        nannies = pool.client.cluster.workers
        (nanny,) = nannies.values()
        while nanny in nannies.values() and nanny.status.name != "closed":
            time.sleep(0.1)
        trouble.unlink()
        assert dict([first, *results]) == {n: n * n for n in range(10)}


# Somebody else on this machine: tries a port in every way, without the key that the run has.
STRANGER = """if True:
    import socket, ssl, sys, tempfile
    from concurrent.futures import ThreadPoolExecutor
    from distributed import Client
    from distributed.security import Security

    def tls(certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate:
            own = Security.temporary()
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(own.tls_client_key + own.tls_client_cert)
                file.flush()
                context.load_cert_chain(file.name)
        return context

    def answer(port, context):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.settimeout(2)
            try:
                if context is not None:
                    connection = context.wrap_socket(connection)
                connection.sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
                return connection.recv(99)
            except OSError as error:  # TLS' refusals, too
                return type(error).__name__

    def answers(port):
        return port, answer(port, None), answer(port, tls(False)), answer(port, tls(True))

    def connection(how):
        url, security = how
        try:
            Client(url, security=security, timeout="3s")
            return "connected"
        except (OSError, TypeError):  # the latter of a client without certificates
            return "refused"

    address = sys.argv[1]
    ways = [
        (address, None), (address.replace("tls:", "tcp:"), None), (address, Security.temporary())
    ]
    with ThreadPoolExecutor() as pool:  # most are waited for, each for seconds
        for found in pool.map(answers, map(int, sys.argv[2:])):
            print(*found)
        print(*pool.map(connection, ways), sep="\\n")
"""


def _listening() -> set[int]:
    """TCP ports at which this process and its children listen."""
    this = psutil.Process()
    return {
        one.laddr.port
        for process in (this, *this.children(recursive=True))
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }


def test_strangers_reach_no_port_of_a_local_cluster() -> None:
    before = _listening()
    with cluster.connect(None, 2, 40) as pool:
        results = pool.run(_square, list(range(100)))
        next(results)
        pool.client.wait_for_workers(2)
        ports = _listening() - before
        assert len(ports) == 5  # the scheduler's, and of each worker its own and its nanny's
        address = pool.client.scheduler.address
        assert int(address.rpartition(":")[2]) in ports
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER, address, *map(str, ports)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert stranger.returncode == 0, stranger.stderr
        *answers, first, second, third = stranger.stdout.strip().splitlines()
        assert len(answers) == len(ports)
        for line in answers:
            _, plain, without, other = line.split()
            # silence or a closed connection; what TLS says to who has no key, or another one
            assert plain in ("TimeoutError", "ConnectionResetError", "b''")
            assert {without, other} <= {"SSLError", "SSLEOFError", "ConnectionResetError"}
        assert first == second == third == "refused"
        assert sum(1 for _ in results) == 99  # the run went on


@pytest.mark.slow
def test_a_scheduler_that_talks_tls(tmp_path: Path) -> None:
    import dask
    from distributed.security import Security

    made = Security.temporary()
    pem, key = tmp_path / "cluster.pem", tmp_path / "cluster.key"
    pem.write_text(made.tls_client_cert)
    key.write_text(made.tls_client_key)
    options = [f"--tls-ca-file={pem}", f"--tls-cert={pem}", f"--tls-key={key}"]
    names = {"ca-file": pem, "client.cert": pem, "client.key": key}
    tls = {f"distributed.comm.tls.{name}": str(path) for name, path in names.items()}
    with dask_processes(" ".join(options), scheduler=options, protocol="tls") as (address, _):
        assert address.startswith("tls://")
        with (
            dask.config.set(tls),
            cluster.connect(address, None, 1) as pool,
        ):
            assert list(pool.run(_square, [3])) == [(3, 9)]
        with (
            pytest.raises(cluster.ClusterError, match=r"distributed\.comm\.tls"),
            cluster.connect(address, None, 1),
        ):
            pass


class _Awkward(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def _fail(number: int) -> int:
    if number == 0:
        raise _Awkward("cannot ", "be unpickled")
    if number == 1:
        return _fail(number)  # a traceback that cannot be
    raise FileNotFoundError(2, "No such file", "name")


def test_exceptions_of_all_kinds_come_back() -> None:
    with cluster.connect(None, 1, 3) as pool:
        results = dict(pool.run(_fail, [0, 1, 2]))
    assert str(results[0]) == "_Awkward: cannot be unpickled"
    assert isinstance(results[1], RecursionError)
    assert isinstance(results[2], FileNotFoundError)
    assert results[2].filename == "name"


def _environment(_: int) -> str | None:
    time.sleep(0.1)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_local_workers_see_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with cluster._local_cluster(2, 2, False) as client, cluster.Pool(client, gpu=True) as pool:
        client.wait_for_workers(2)
        found = {result for _, result in pool.run(_environment, list(range(20)))}
    assert found == {"3", "5"}


def _worker(_: int) -> str:
    from distributed import get_worker

    time.sleep(0.1)
    return str(get_worker().name)


@pytest.mark.slow
def test_tasks_go_to_the_workers_that_have_gpus() -> None:
    with dask_processes("--resources GPU=1 --name with", "--name without") as (address, _):
        with cluster.connect(address, None, 20, "auto") as pool:
            pool.client.wait_for_workers(2, timeout=60)
            assert pool.size == 2
            assert {worker for _, worker in pool.run(_worker, list(range(10)))} == {"with"}
            others = {worker for _, worker in pool.run(_worker, list(range(10)), gpu=False)}
            assert others == {"with", "without"}
        with cluster.connect(address, None, 20, "cpu") as pool:
            assert len({worker for _, worker in pool.run(_worker, list(range(10)))}) == 2


@pytest.mark.slow
def test_a_scheduler_that_is_lost_or_never_was_is_named() -> None:
    with dask_processes("") as (address, scheduler):
        with cluster.connect(address, None, 50) as pool:
            results = pool.run(_worker, list(range(50)))
            next(results)
            scheduler.kill()
            with pytest.raises(cluster.ClusterError, match=f"{address}: .* was lost"):
                list(results)
        with (
            pytest.raises(cluster.ClusterError, match=f"{address}: no Dask scheduler"),
            cluster.connect(address, None, 50),
        ):
            pass


@pytest.mark.slow
def test_a_cluster_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with dask_processes("") as (address, _), cluster.connect(address, None, 1) as pool:
        monkeypatch.setattr(_worker, "__module__", "not_installed_there")
        monkeypatch.setitem(sys.modules, "not_installed_there", sys.modules[__name__])
        with pytest.raises(cluster.ClusterError, match=f"{address}: .*same packages"):
            list(pool.run(_worker, [0]))


def test_stages_share_the_time_among_them() -> None:
    with timed() as seconds, stage("outer"):
        time.sleep(0.02)
        with stage("inner"):
            time.sleep(0.06)
        with stage("inner"):
            time.sleep(0.02)
    assert seconds.keys() == {"outer", "inner"}
    assert 0.08 <= seconds["inner"] < 0.5
    assert 0.02 <= seconds["outer"] < 0.08
    with stage("nobody asks"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="locks of open files are Linux's")
def test_locks_exclude_processes_and_end_with_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from archive_pipeline.locks import locked\n"
        f"with locked(Path({str(path)!r}), 5): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert is_locked(path, 5)
    with locked(path, 6):  # another byte, another lock
        assert not is_locked(path, 4)
    started = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {other.pid}"])
    with locked(path, 5):
        assert time.monotonic() - started > 0.2
        assert is_locked(path, 5)
    other.communicate()
    assert not is_locked(path, 5)
    with locked(path, 5, shared=True), locked(path, 5, shared=True):
        assert is_locked(path, 5)
    with locked(tmp_path / "none", 5):
        assert not is_locked(tmp_path / "none", 5)
