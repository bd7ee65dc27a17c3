"""Programs as processes of their own, none of which imports torch and timm anew.

A server imports them once. Each program runs in a fork of it and ends as any Python process ends, with exit
functions and exit code. For tests of signals, of pipes, of how programs end; what is about imports or about
the start of Python needs an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

IMPORTS = "import timm, torch, mhacut, mhacut.data, mhacut.finetuning.training"
MAIN = "from runpy import run_module; run_module('mhacut', run_name='__main__', alter_sys=True)"
"""The command ``mhacut``."""
BY_TWO = f"""
import atexit, os, signal, sys
second = os.fork()
first = second != 0
if first:
    atexit.register(os.kill, second, signal.SIGTERM)  # as torchrun does
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if first else "1"
os.environ |= {{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}}
os.environ |= {{"MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv.pop(1)}}
{MAIN}
"""
"""The same by two processes that meet at the port named first; exit code and pid are of the first of them."""


@dataclass
class Program:
    pid: int
    stdout: IO[str]
    stderr: IO[str]
    server: socket.socket

    def end(self, timeout: float = 60) -> int:
        self.server.settimeout(timeout)
        try:
            return os.waitstatus_to_exitcode(int(self.server.recv(64)))
        except TimeoutError:
            os.killpg(self.pid, signal.SIGKILL)
            self.server.settimeout(None)
            self.server.recv(64)
            raise


class Programs:
    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self, script: str, *arguments: object) -> Program:
        if self._server is None:
            code = f"{IMPORTS}\nfrom helpers import programs\nexec(programs.serve({self._theirs.fileno()}))"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._server = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[self._theirs.fileno()], env=environment
            )
        (stdout, their_stdout), (stderr, their_stderr) = os.pipe(), os.pipe()
        asked = {"script": script, "arguments": list(map(str, arguments)), "folder": os.getcwd()}
        request = json.dumps(asked).encode()
        socket.send_fds(self._socket, [request], [their_stdout, their_stderr])
        os.close(their_stdout)
        os.close(their_stderr)
        self._socket.settimeout(60)
        pid = int(self._socket.recv(64))
        return Program(pid, os.fdopen(stdout), os.fdopen(stderr), self._socket)

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        program = self.start(script, *arguments)
        with program.stdout, program.stderr:
            code = program.end()
            return subprocess.CompletedProcess([], code, program.stdout.read(), program.stderr.read())

    def close(self) -> None:
        self._socket.close()
        self._theirs.close()
        if self._server is not None:
            self._server.wait(60)


def serve(descriptor: int) -> str:
    """Fork for each request; return its script in the fork."""
    with socket.socket(fileno=descriptor) as requests:
        while True:
            request, descriptors, _, _ = socket.recv_fds(requests, 2**20, 2)
            if not request:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                break
            for ours in descriptors:
                os.close(ours)
            requests.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            with suppress(BrokenPipeError):
                requests.send(str(status).encode())
    os.setsid()
    for number, (name, ours) in enumerate(zip(("stdout", "stderr"), descriptors, strict=True), start=1):
        os.dup2(ours, number)
        os.close(ours)
        # Python remembers whether a stream is a file, in which one can seek.
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    asked = json.loads(request)
    os.chdir(asked["folder"])
    sys.argv[1:] = asked["arguments"]
    return asked["script"]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]
