"""A service manager with a descriptor store, as systemd has one (sd_notify(3), FDSTORE=1; sd_listen_fds(3)).

    service_manager.py SOCKET COMMAND...

Runs COMMAND with SOCKET as its NOTIFY_SOCKET and starts it again whenever it ends, with what it had stored. Says on standard output
what happens. Ends with COMMAND when standard input is closed.
"""

import array
import fcntl
import os
import select
import signal
import socket
import sys
import time


def say(*words):
    print(*words, flush=True)


def start(command, path, stored):
    # Out of the way of the numbers that they are to have.
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for _, fd in stored]
    pid = os.fork()
    if pid == 0:
        for number, fd in enumerate(given):
            os.dup2(fd, 3 + number, inheritable=True)
        os.closerange(3 + len(given), 4096)
        os.environ["NOTIFY_SOCKET"] = path
        if given:
            os.environ["LISTEN_PID"] = str(os.getpid())
            os.environ["LISTEN_FDS"] = str(len(given))
            os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in stored)
        os.execvp(command[0], command)
    for fd in given:
        os.close(fd)
    say("started", pid, len(given))
    return pid


def same(one, other):
    """Whether two descriptors are of one open file: kcmp(2), as systemd asks it."""
    import ctypes

    pid = os.getpid()
    return ctypes.CDLL(None, use_errno=True).syscall(312, pid, pid, 0, one, other) == 0


def hear(inbox, stored):
    text, ancillary, _, _ = inbox.recvmsg(65536, socket.CMSG_SPACE(256 * 4))
    fds = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds.extend(numbers)
    fields = dict(line.split("=", 1) for line in text.decode().splitlines())
    name = fields.get("FDNAME", "stored")
    if fields.get("FDSTORE") == "1":
        for fd in fds:
            # What is stored already is not stored again, whatever it is called.
            if any(same(fd, other) for _, other in stored):
                os.close(fd)
            else:
                stored.append((name, fd))
        say("stored", name)
        return
    if fields.get("FDSTOREREMOVE") == "1":
        for entry in [entry for entry in stored if entry[0] == name]:
            stored.remove(entry)
            os.close(entry[1])
        say("removed", name)
    for fd in fds:
        os.close(fd)
    for word in ("READY", "STOPPING"):
        if word in fields:
            say(word.lower())


def main():
    path, command = sys.argv[1], sys.argv[2:]
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    inbox.bind(path)
    stored = []
    pid = start(command, path, stored)
    ending = False
    while True:
        ready, _, _ = select.select([inbox] if ending else [inbox, sys.stdin], [], [], 0.01)
        while inbox in ready:
            hear(inbox, stored)
            ready, _, _ = select.select([inbox], [], [], 0)
        if sys.stdin in ready and not sys.stdin.read(1):
            ending = True
            os.kill(pid, signal.SIGTERM)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            say("ended", os.waitstatus_to_exitcode(status), len(stored))
            if ending:
                return
            # As RestartSec= has it.
            time.sleep(0.1)
            pid = start(command, path, stored)


main()
