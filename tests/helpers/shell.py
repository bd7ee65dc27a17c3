"""The command ``mhacut`` for shell scripts, run by :class:`helpers.programs.Programs`."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.programs import MAIN, Programs

_COMMAND = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode())
    server.shutdown(socket.SHUT_WR)
    code, out, err = json.load(server.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@contextmanager
def mhacut_in_path(programs: Programs, folder: Path) -> Iterator[str]:
    """Serve a command in ``folder``; yield a PATH that begins with it, and has the tests' own Python next."""
    address = str(folder / "socket")
    (folder / "mhacut").write_text(_COMMAND.format(python=sys.executable, address=address))
    (folder / "mhacut").chmod(0o755)

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile() as asked:
                request = asked.read()
                if not request:
                    return
                place, arguments = json.loads(request)
                done = programs.run(f"import os; os.chdir({place!r})\n{MAIN}", *arguments)
                connection.sendall(json.dumps([done.returncode, done.stdout, done.stderr]).encode())

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        finally:
            with socket.socket(socket.AF_UNIX) as end:
                end.connect(address)
            thread.join()
