"""The walls around a clone: what it may see, call and use. Linux on x86_64 and aarch64.

    python -c 'from sandbox.inside import confine; print(len(confine.call_filter()))'
"""
import contextlib
import ctypes
import errno
import gc
import os
import platform
import resource
import signal
import struct
import sys
import types

NOBODY = 65534
LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a clone must inherit held
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_THREAD, CLONE_FILES = 0x10000, 0x400
# System calls that no program needs, as numbers: processes, other processes, mounts and namespaces,
# sockets except for socketpair, messages that carry descriptors, memory that no limit counts
# (System V, memfd, keys, io, inotify, xattr, pages lent to pipes), file locks, priorities,
# administration of the machine.
REFUSED = {
    "x86_64": """
        57 58 59 322 101 310 311 312 272 308 165 166 155 161 133 259 303 304 41 42 43 49 50 288 29 30 31 64 68
        240 319 248 249 250 206 209 253 254 294 300 301 188 189 190 256 279 216 321 298 323 317 175 313 176
        246 320 169 167 168 163 179 164 227 159 305 170 171 172 173 103 135 154 153 134 180 212
        46 307 54 73 141 251 142 144 203 314 275 276 278""",
    "aarch64": """
        221 281 117 270 271 272 97 268 40 39 41 51 33 264 265 198 203 202 200 201 242 194 196 195 190 186 180
        279 217 218 219 0 2 26 27 262 263 5 6 7 238 239 234 280 241 282 277 105 273 106 104 294 142 224 225 89
        60 170 112 171 266 161 162 116 92 58 42 18
        211 269 208 32 140 30 118 119 122 274 76 77 75""",
}
# Calls that succeed and do nothing: they would make the host write its disks, and nothing in /tmp needs them
IDLE = {"x86_64": "26 74 75 162 277 306", "aarch64": "227 82 83 81 84 267"}  # msync, fsync, sync, syncfs, ...
# Calls of many meanings: (numbers on x86_64 and aarch64, position of the argument, the values that
# it may have).
LIMITED = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030, 1032)),  # duplicates, flags, the size of a pipe
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # terminals, FIONREAD, FIONBIO
    "prctl": ((157, 167), 0, (3, 15, 16, 0x53564D41)),  # PR_GET_DUMPABLE, names of threads and of memory
    "socketpair": ((53, 199), 0, (1,)),  # AF_UNIX
    "close_range": ((436, 436), 2, (0, 4)),  # no descriptor table of one's own, which no limit would count
}
# Column above, audit's name, clone()
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
NO_CAPABILITIES = struct.pack("II", 0x20080522, 0)
# Numbers from 424 are the same everywhere: none is allowed except faccessat2 and those above
NEWER, NEEDED = 424, (439,)


def system(result, what):
    """The result of a C call; OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def call_filter():
    """The seccomp program of a clone, ready for prctl(). Refused calls fail with EPERM, unknown
    ones with ENOSYS."""
    column, machine, clone = MACHINES[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = ((give, 0, 0, code) for code in (
        0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS))
    calls = {NEWER - 1: [allow]} | {number: [allow] for number in NEEDED}
    calls |= {int(number): [refuse] for number in REFUSED[platform.machine()].split()}
    calls |= {int(number): [(give, 0, 0, 0x50000)] for number in IDLE[platform.machine()].split()}
    for numbers, position, values in LIMITED.values():
        tests = [(equal, len(values) - n, 0, value) for n, value in enumerate(values)]
        calls[numbers[column]] = [(load, 0, 0, 16 + 8 * position), *tests, refuse, allow]
    calls[clone] = [(load, 0, 0, 16), (bits, 0, 1, CLONE_THREAD), (bits, 1, 0, CLONE_FILES), refuse, allow]
    rules = {0: [allow]}  # each holds from its number up to the next
    for number, code in sorted(calls.items()):
        rules |= {number: code, number + 1: [unknown if number + 1 >= NEWER else allow]}

    def search(rules):
        """By halves: the kernel tries a filter on every call there is when a clone installs it."""
        if all(code == rules[0][1] for _, code in rules):
            return rules[0][1]
        low, high = rules[:len(rules) // 2], rules[len(rules) // 2:]
        code = search(low)
        return [(at_least, len(code), 0, high[0][0]), *code, *search(high)]

    code = [(load, 0, 0, 4), (equal, 1, 0, machine), kill, (load, 0, 0, 0), *search(sorted(rules.items()))]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    program.buffer = buffer  # keeps it alive
    return program


def clone(isolated, is_judge):
    """fork(), into a new pid namespace, and a mount namespace for a judge. The interpreter must
    have one thread only."""
    if not isolated:
        return os.fork()
    flags = CLONE_NEWPID | CLONE_NEWNS * is_judge | signal.SIGCHLD
    return system(LIBC.syscall(MACHINES[platform.machine()][2], flags, 0, 0, 0, 0), "clone")


def set_limits(limits, isolated):
    """Called once by the supervisor, for all clones. NPROC counts its user namespace: itself, two
    clones, threads."""
    values = {"AS": limits["memory"] << 20, "FSIZE": limits["disk"] << 20,
              "NOFILE": limits["files"], "CORE": 0}
    if isolated:
        values |= {"NPROC": limits["threads"] + 3, "MEMLOCK": 0, "SIGPENDING": 64, "MSGQUEUE": 0}
        stack = resource.getrlimit(resource.RLIMIT_STACK)[1]  # programs may raise it: the memory is limited
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, stack))
    for name, value in values.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.setrecursionlimit(1050)  # the 1000 a program may count on, and what stands below it here


def wall_off(box, is_judge):
    """Called by a fresh clone before it takes its job: a session of its own, no rights, few system
    calls."""
    os.setsid()
    if not is_judge:  # a judge serves many programs
        resource.setrlimit(resource.RLIMIT_CPU, box["seconds"])
    if box["isolated"]:
        if is_judge:
            mount_tmp(box)
        system(LIBC.prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")  # die with the supervisor
        system(LIBC.capset(NO_CAPABILITIES, bytes(24)), "capset")
    os.chdir("/tmp")
    if box["filter"]:
        system(LIBC.prctl(22, 2, box["filter"], 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    gc.enable()


def mount_tmp(box):
    """An empty /tmp in the place of the old one."""
    LIBC.umount2(b"/tmp", 2)  # MNT_DETACH
    flags = 0x406  # nosuid, nodev, noatime
    system(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, box["disk"]), "mount of /tmp")


def state_of_tmp():
    """What differs if anything was made in /tmp, or done to it."""
    status, space = os.stat("/tmp"), os.statvfs("/tmp")
    return status.st_ctime_ns, status.st_mode, status.st_nlink, space.f_ffree, space.f_bfree



def module_space(name="solution"):
    """The namespace of a fresh module (dataclasses and pickle look it up in sys.modules)."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)



def silence():
    null = os.open("/dev/null", os.O_RDWR)  # opened here: the flags of an open file are shared
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if null > 2:
        os.close(null)



def build_root(paths):
    """A root of binds of `paths`, pairs of (host's, here), where the container still shows the
    host's files."""
    system(LIBC.mount(b"none", b"/", None, 0x44000, None), "private mounts")  # MS_REC | MS_PRIVATE
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
        system(LIBC.mount(source, new.encode(), None, 0x5000, None), f"bind of {path}")  # MS_BIND | MS_REC
    os.makedirs("/sys/tmp")
    os.chdir("/sys")
    system(LIBC.pivot_root(b".", b"."), "pivot_root")
    system(LIBC.umount2(b".", 2), "umount")  # MNT_DETACH: the host's root, stacked on the new one
    os.chdir("/")


def lock_down(paths):
    """Give up what root the container has, then make its files read-only and hide /proc: for all
    clones to come."""
    if paths:
        build_root(paths)
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # this root may be the name of an ordinary user, who has no other
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
    user, group = os.geteuid(), os.getegid()
    system(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    read_only = struct.pack("QQQQ", 3, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    recursive = 0x8000
    system(LIBC.syscall(442, -100, b"/", recursive, read_only, len(read_only)),
           "mount_setattr (needs Linux 5.12)")
    for path in ("/proc", "/sys"):
        if os.path.isdir(path):
            system(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", 7, b"size=4k,nr_inodes=2"), f"hiding {path}")
    # No core file of a clone, wherever the host sends those
    system(LIBC.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def take(size):
    """Exactly `size` bytes of the host's pipe; exits where it has closed."""
    data = bytearray()
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return bytes(data)
