"""Walls of Landlock, where no namespaces are to be had: a program opens what it is shown, and files of a
folder of its own. Linux 5.13 or newer. README.md says what is weaker than with namespaces.

    python -m sandbox --runtime=landlock --data=programs.jsonl --out=verdicts.jsonl
"""
import contextlib
import os
import platform
import signal
import struct

from .confine import LIBC, MACHINES, NoWalls, leave_root, system

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 2, 4, 8, 1 << 14
# What a program may do in its folder: files and folders, but no device, socket, pipe or link by name
OWN = WRITE_FILE | READ_FILE | READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | TRUNCATE
KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}  # version: how many kinds of access it knows; later ones 16
FIRST_USER = 0x70000000  # users that nobody has: a worker's is this plus its pid


class Landlock(NoWalls):
    """options: `visible`, pairs of which the first is a path to show; `folders`, where to make one to
    write in."""

    def __init__(self, options):
        version = system(LIBC.syscall(CREATE_RULESET, None, 0, 1), "Landlock")
        self.known = (1 << KNOWN.get(version, 16)) - 1
        self.paths = [path for path, _ in options["visible"]]
        self.top = f"{options['folders']}/sandbox-{os.getpid()}-{os.urandom(8).hex()}"
        os.mkdir(self.top, 0o700)
        self.folders = [f"{self.top}/program", f"{self.top}/judge"]
        self.folder = self.folders[0]
        for folder in self.folders:
            os.mkdir(folder)
        user = FIRST_USER + os.getpid()
        if os.getuid() == 0:
            self.give_to(user)
            leave_root(user, self.paths)
        self.alone = os.getuid() == user
        if os.getuid() == 0:
            self.give_to(0)
        self.rulesets = [self.ruleset(folder) for folder in self.folders]
        system(LIBC.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")
        self.number = MACHINES[platform.machine()][2]

    def give_to(self, user):
        for folder in (self.top, *self.folders):
            os.chown(folder, user, user)

    def ruleset(self, folder):
        handled = struct.pack("Q", self.known)
        ruleset = system(LIBC.syscall(CREATE_RULESET, handled, len(handled), 0), "Landlock")
        for path in [*self.paths, folder]:
            access = OWN if path == folder else READ_FILE | READ_DIR
            if path.startswith("/dev/"):
                access = READ_FILE | WRITE_FILE
            if not os.path.isdir(path):
                access &= READ_FILE | WRITE_FILE | TRUNCATE
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", access & self.known, place)
            system(LIBC.syscall(ADD_RULE, ruleset, 1, rule, 0), f"Landlock for {path}")
            os.close(place)
        return ruleset

    def clone(self, is_judge):
        """fork(), without what Python does after one."""
        return system(LIBC.syscall(self.number, signal.SIGCHLD, 0, 0, 0, 0), "clone")

    def renew(self):
        empty(self.folders[0])

    def close(self, is_judge):
        system(LIBC.syscall(RESTRICT_SELF, self.rulesets[is_judge], 0), "Landlock")
        os.chdir(self.folders[is_judge])
        os.environ["HOME"] = os.environ["TMPDIR"] = self.folders[is_judge]

    def remove(self):
        with contextlib.suppress(OSError):  # the host removes it, too
            empty(self.top)
            os.rmdir(self.top)


def empty(folder):
    """Remove all that a folder holds, however deep and whatever its modes."""
    count, mark = 0, os.urandom(8).hex()
    while names := os.listdir(folder):
        for name in names:
            path = f"{folder}/{name}"
            if not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                count += 1
                os.rename(f"{path}/{inner}", f"{folder}/{mark}.{count}")
            os.rmdir(path)
