"""Walls of namespaces: a root of its own, read-only, without network and /proc; each program in a pid
namespace, with an empty /tmp. Needs user namespaces, and Linux 5.12.

    python -m sandbox --runtime=namespaces --data=programs.jsonl --out=verdicts.jsonl
"""
import os
import platform
import signal
import struct

from .confine import LIBC, MACHINES, NoWalls, leave_root, system

NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x40000000
NEWUSER, NEWPID = 0x10000000, 0x20000000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2


class Namespaces(NoWalls):
    """options: `visible`, pairs (host's path, path inside), or nothing where a container shows no more than
    it should; `limits`."""

    def __init__(self, options):
        limits = options["limits"]
        self.disk = f"size={limits['disk']}m,nr_inodes={limits['files'] * 16},mode=777".encode()
        self.tmp = None
        if options["visible"]:
            outer = NEWNS | NEWUTS | NEWIPC | NEWNET
            if LIBC.unshare(outer):  # not the host's root, or one without its rights
                enter_user_namespace(outer, 0)
            build_root(options["visible"])
        leave_root(NOBODY, [path for _, path in options["visible"]])
        LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
        enter_user_namespace(NEWNS, NOBODY)
        lock_down()
        self.number = MACHINES[platform.machine()][2]
        self.alone = True  # the kernel counts processes by user namespace, unless root is behind it

    def clone(self, is_judge):
        """fork(), into a new pid namespace, and a mount namespace for a judge."""
        flags = NEWPID | NEWNS * is_judge | signal.SIGCHLD
        return system(LIBC.syscall(self.number, flags, 0, 0, 0, 0), "clone")

    def renew(self):
        if not self.tmp or state_of_tmp() != self.tmp:
            self.mount_tmp()
            self.tmp = state_of_tmp()

    def close(self, is_judge):
        if is_judge:
            self.mount_tmp()
        os.chdir("/tmp")

    def mount_tmp(self):
        """An empty /tmp in the place of the old one."""
        LIBC.umount2(b"/tmp", MNT_DETACH)
        flags = 0x406  # nosuid, nodev, noatime
        system(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, self.disk), "mount of /tmp")


def enter_user_namespace(more, inside):
    """Enter new namespaces, where this user is named `inside`."""
    user, group = os.geteuid(), os.getegid()
    system(LIBC.unshare(NEWUSER | more), "unshare")
    maps = {"setgroups": "deny", "uid_map": f"{inside} {user} 1", "gid_map": f"{inside} {group} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(paths):
    """A root of binds of `paths`, pairs of (host's, here), where the container still shows the
    host's files."""
    system(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    # In /sys, which no bind needs
    system(LIBC.mount(b"tmpfs", b"/sys", b"tmpfs", 6, b"mode=755"), "mount of a new root")
    for path, new in paths + [("/proc", "/proc")]:
        new = "/sys" + new
        if os.path.isdir(path):
            os.makedirs(new, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            open(new, "w").close()
        source = os.path.realpath(path).encode()
        system(LIBC.mount(source, new.encode(), None, MS_BIND | MS_REC, None), f"bind of {path}")
    os.symlink("/tmp/.in", "/sys/dev/stdin")  # where a script's input is
    os.makedirs("/sys/tmp", exist_ok=True)
    os.chdir("/sys")
    system(LIBC.pivot_root(b".", b"."), "pivot_root")
    system(LIBC.umount2(b".", MNT_DETACH), "umount")  # the host's root, stacked on the new one
    os.chdir("/")


def lock_down():
    """Make all files read-only and hide /proc, for all clones to come."""
    read_only = struct.pack("QQQQ", 3, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    recursive = 0x8000
    system(LIBC.syscall(442, -100, b"/", recursive, read_only, len(read_only)),
           "mount_setattr (needs Linux 5.12)")
    for path in ("/proc", "/sys"):
        if os.path.isdir(path):
            system(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", 7, b"size=4k,nr_inodes=2"), f"hiding {path}")
    # No core file of a clone, wherever the host sends those
    system(LIBC.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def state_of_tmp():
    """What differs if anything was made in /tmp, or done to it."""
    status, space = os.stat("/tmp"), os.statvfs("/tmp")
    return status.st_ctime_ns, status.st_mode, status.st_nlink, space.f_ffree, space.f_bfree
