#!/usr/bin/env bash
# uvicorn: after SIGTERM it shuts down in good order, and then the process is killed before `run` returns.
#
# `Server.run` (and `uvicorn.run`) catch the signal, finish requests and the application's lifespan, put back
# the handlers that were there before, and raise the signal once more. The default handler of SIGTERM ends
# the process there: neither what follows `run` nor a `finally` around it is run, `atexit` neither, and
# temporary folders stay. The exit status is that of a killed process. It looks right with Ctrl-C, whose
# signal becomes a KeyboardInterrupt that `finally` sees. Who sets a handler of SIGTERM before `run`,
# even one that does nothing, gets control back.
#
# Seen with uvicorn 0.54.0, Python 3.11, Linux x86-64: exit status -15 and no clean-up; with a handler 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "uvicorn==0.54.0"
cd "$folder"
cat > serve.py <<'PYTHON'
import signal
import sys

import uvicorn


async def app(scope, receive, send):
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        print(kind, flush=True)
        if kind == "lifespan.shutdown":
            return


if "handler" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: None)
try:
    uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical")).run()
    print("after run", flush=True)
finally:
    print("clean-up", flush=True)
PYTHON
venv/bin/python - <<'PYTHON'
import signal
import subprocess
import sys


def end(*arguments: str) -> tuple[int, list[str]]:
    """How a server ends that is sent SIGTERM once it has started, and what it said."""
    server = subprocess.Popen(
        [sys.executable, "serve.py", *arguments], stdout=subprocess.PIPE, text=True
    )
    said = [server.stdout.readline().strip()]
    server.send_signal(signal.SIGTERM)
    said += server.communicate(timeout=30)[0].split("\n")[:-1]
    print(arguments or "default", server.returncode, said)
    return server.returncode, said


assert end() == (-signal.SIGTERM, ["lifespan.startup", "lifespan.shutdown"])
assert end("handler") == (
    0, ["lifespan.startup", "lifespan.shutdown", "after run", "clean-up"]
)  # fmt: skip
PYTHON
