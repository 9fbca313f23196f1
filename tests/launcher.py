"""Starts tests/training_example.py again and again, in one or several processes.

A server, so that all of them share one import of JAX: every line of stdin is a request

    {"processes": [[flag, ...], ...], "devices": 2, "signals": [[seconds, process, number], ...]}

A signal whose seconds are null is sent half a second after the first process has ended.

The answer is a line of stdout: exit code (negative: the signal that killed it), what was written
and seconds until its end, for each process.  `Launcher` is the other end.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Launcher:
    """Runs the example; use it in a `with` statement."""

    def __init__(self, flags=()):
        self.flags = [*flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.communicate(timeout=60)

    def __call__(self, *processes, devices=2, signals=(), traceback=False):
        """One argument per process: its flags."""
        processes = [[*self.flags, *flags] for flags in processes]
        request = {"processes": processes, "devices": devices, "signals": signals}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        ended = [Ended(*answer) for answer in json.loads(self.server.stdout.readline())]
        for process in ended:
            assert traceback or "Traceback" not in process.stderr, process.stderr
        return ended

    def together(self, count, *flags, devices=2, own=None, signals=()):
        """Several processes that are one run; `own` maps a process to flags of its own."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        shared = [f"--coordinator={address}", f"--num_processes={count}", *flags]
        processes = [[*shared, f"--process_id={i}", *(own or {}).get(i, ())] for i in range(count)]
        return self(*processes, devices=devices, signals=signals)


def _start(flags, devices, out, err):
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["training_example.py", *flags]
    jax.config.update("jax_num_cpu_devices", devices)
    training_example.launch()
    os._exit(0)


def _serve(request):
    began, folder = time.monotonic(), tempfile.TemporaryDirectory()
    files = [
        [open(Path(folder.name, f"{name}{i}"), "w+") for name in ("out", "err")]
        for i in range(len(request["processes"]))
    ]
    sys.stdout.flush()
    pids = [
        _start(flags, request["devices"], *pair)
        for flags, pair in zip(request["processes"], files, strict=True)
    ]
    running, ended = dict(enumerate(pids)), {}
    signals = sorted(s for s in request["signals"] if s[0] is not None)
    waiting = [s[1:] for s in request["signals"] if s[0] is None]
    while running:
        now = time.monotonic() - began
        while signals and signals[0][0] <= now:
            _, number, kind = signals.pop(0)
            if number in running:
                os.kill(running[number], kind)
        if now > 200:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        for number, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[number] = os.waitstatus_to_exitcode(status), time.monotonic() - began
                del running[number]
                signals += [[now + 0.5, *rest] for rest in waiting]
                waiting = []
        time.sleep(0.005)
    answers = []
    for number, pair in enumerate(files):
        code, seconds = ended[number]
        texts = []
        for file in pair:
            file.seek(0)
            texts.append(file.read())
            file.close()
        answers.append([code, *texts, seconds])
    folder.cleanup()
    return answers


if __name__ == "__main__":
    import jax
    import orbax.checkpoint  # noqa: F401 - once for all
    import tensorboardX  # noqa: F401
    import training_example

    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
