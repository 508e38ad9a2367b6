"""Runs many ``risam`` commands with one import of torch: ``python docs_server.py SOCKET``.

Each command is a fork of a process that has imported everything and computed nothing, with the
caller's folder, environment and standard streams. The caller is :data:`CLIENT`, put on the path as
``risam``. Python code is run alike, by ``risam-python FILE``.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback

CLIENT = """#!{python} -SE
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
asked = {{"name": os.path.basename(sys.argv[0]), "args": sys.argv[1:], "cwd": os.getcwd(),
         "env": dict(os.environ)}}
data = json.dumps(asked).encode()
fds = array.array("i", [0, 1, 2])
server.sendmsg([len(data).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
server.sendall(data)
os.close(1)  # the command alone holds it, so that a reader sees its end
answer = server.recv(1)
os._exit(answer[0] if answer else 1)
"""


def main() -> None:
    """Serve until killed."""
    import risam_cli.cli
    import risam_cli.evaluation.report.assemble
    import risam_cli.evaluation.scoring
    import risam_cli.export.run_export
    import risam_cli.runs.run
    import risam_cli.weights.build

    for name, (module, _) in risam_cli.cli.COMMANDS.items():
        assert name
        __import__(f"risam_cli.commands.{module}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen(64)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                code = _serve(connection)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    try:
                        stream.flush()
                    except OSError:
                        code = 1
                os.close(1)
                connection.sendall(bytes([code & 255]))
                os._exit(code & 255)
        connection.close()


def _serve(connection: socket.socket) -> int:
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    left, data = int.from_bytes(head, "big"), b""
    while len(data) < left:
        data += connection.recv(left - len(data))
    asked = json.loads(data)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = [asked["name"], *asked["args"]]
    if asked["name"] == "risam-python":
        sys.argv.pop(0)
        runpy.run_path(asked["args"][0], run_name="__main__")
        return 0
    import risam_cli.cli

    risam_cli.cli._main_pid = os.getpid()
    return risam_cli.cli.main(asked["args"])


if __name__ == "__main__":
    main()
