"""What every clone is held by, whatever the walls around it: limits, and a filter on system calls. Linux
on x86_64 and aarch64. The walls are in namespaces.py and landlock.py; those of --unsafe are here.

    python -c 'from sandbox.inside import confine; print(len(confine.call_filter(False)[0]), "bytes")'
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

LIBC = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a clone must inherit held
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
# Calls that succeed and do nothing: they would make the host write its disks, and no program needs them
IDLE = {"x86_64": "26 74 75 162 277 306", "aarch64": "227 82 83 81 84 267"}  # msync, fsync, sync, syncfs, ...
# What only matters where no pid namespace and no read-only mount is around: signals that carry data or go
# to a thread, timers that send signals, owners, extended attributes, truncate() by path
EXPOSED = {
    "x86_64": "129 297 200 222 92 93 94 260 188 189 190 197 198 199 76",
    "aarch64": "138 240 130 107 54 55 5 6 7 14 15 16 45",
}
# Nor may modes and times change there, but no copy should fail for it: chmod, utime and their kin do nothing
EXPOSED_IDLE = {"x86_64": "90 91 268 132 235 261 280", "aarch64": "52 53 88"}
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


LOAD, EQUAL, AT_LEAST, ANY_BIT, GIVE = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of a filter
ALLOW, KILL, REFUSE, UNKNOWN, SUCCEED = ((GIVE, 0, 0, code) for code in (
    0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x50000))
OWN_PID = 0x7A5A5A5A  # stands in a filter for the pid of the clone that installs it


def argument(position, half=0):
    """The instruction that loads an argument of the call, or its upper half."""
    return LOAD, 0, 0, 16 + 8 * position + 4 * half


def rules_for_exposed():
    """{number: code} of calls where no namespace is around: signals only to oneself, and none that looks
    like the host's; no open() that truncates what it may only read (before Linux 6.2 Landlock lets it)."""
    column, machine = MACHINES[platform.machine()][0], platform.machine()
    rules = {int(number): [REFUSE] for number in EXPOSED[machine].split()}
    rules |= {int(number): [SUCCEED] for number in EXPOSED_IDLE[machine].split()}
    for numbers, position in (((62, 129), 1), ((234, 131), 2)):  # kill, tgkill: position of the signal
        rules[numbers[column]] = [argument(0), (EQUAL, 0, 3, OWN_PID), argument(position),
                                  (EQUAL, 1, 0, signal.SIGKILL), (EQUAL, 0, 1, signal.SIGSTOP), REFUSE, ALLOW]
    for number, position in ((2, 1), (257, 2)) if column == 0 else ((56, 2),):  # open, openat: of the flags
        rules[number] = [argument(position), (ANY_BIT, 0, 2, os.O_TRUNC), (ANY_BIT, 1, 0, os.O_ACCMODE),
                         REFUSE, ALLOW]
    return rules


def call_filter(exposed):
    """The seccomp program of a clone, for install(). Refused calls fail with EPERM, unknown ones with ENOSYS.
    exposed: whether no namespace is around the clone. A tuple, made once: each page that a clone writes to is
    copied, which is most of what a clone costs."""
    column, machine, clone = MACHINES[platform.machine()]
    calls = {NEWER - 1: [ALLOW]} | {number: [ALLOW] for number in NEEDED}
    calls |= {int(number): [REFUSE] for number in REFUSED[platform.machine()].split()}
    calls |= {int(number): [SUCCEED] for number in IDLE[platform.machine()].split()}
    for numbers, position, values in LIMITED.values():
        tests = [(EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
        calls[numbers[column]] = [argument(position), *tests, REFUSE, ALLOW]
    calls[clone] = [argument(0), (ANY_BIT, 0, 1, CLONE_THREAD), (ANY_BIT, 1, 0, CLONE_FILES), REFUSE, ALLOW]
    # RLIMIT_CPU stays what it is, in silence: at the hard limit the kernel ends a process as the host would
    calls[(160, 164)[column]] = [argument(0), (EQUAL, 0, 1, 0), SUCCEED, ALLOW]  # setrlimit
    calls[(302, 261)[column]] = [argument(0), (EQUAL, 0, 6, 0), argument(1), (EQUAL, 0, 5, 0),  # prlimit64
                                 argument(2), (EQUAL, 0, 4, 0), argument(2, 1), (EQUAL, 1, 2, 0),
                                 REFUSE, ALLOW, SUCCEED]
    if exposed:
        calls |= rules_for_exposed()
    rules = {0: [ALLOW]}  # each holds from its number up to the next
    for number, code in sorted(calls.items()):
        rules |= {number: code, number + 1: [UNKNOWN if number + 1 >= NEWER else ALLOW]}

    def search(rules):
        """By halves: the kernel tries a filter on every call there is when a clone installs it."""
        if all(code == rules[0][1] for _, code in rules):
            return rules[0][1]
        low, high = rules[:len(rules) // 2], rules[len(rules) // 2:]
        code = search(low)
        return [(AT_LEAST, len(code), 0, high[0][0]), *code, *search(high)]

    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), KILL, (LOAD, 0, 0, 0), *search(sorted(rules.items()))]
    lines = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(lines, len(lines))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    return buffer, program, [8 * n + 4 for n, line in enumerate(code) if line[3] == OWN_PID]


def install(call_filter):
    """Hold this process by a filter from now on."""
    buffer, program, own_pids = call_filter
    for position in own_pids:
        struct.pack_into("I", buffer, position, os.getpid())
    system(LIBC.prctl(22, 2, program, 0, 0), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# ---- limits ----

def set_limits(limits, isolated, alone):
    """Called once by the supervisor, for all clones; where the hard limit is lower, that one counts. alone:
    whether nothing else runs as this user (in its namespace): itself, two clones, threads."""
    values = {"AS": limits["memory"] << 20, "FSIZE": limits["disk"] << 20,
              "NOFILE": limits["files"], "CORE": 0}
    if isolated:
        values |= {"MEMLOCK": 0, "SIGPENDING": 64, "MSGQUEUE": 0, "STACK": 64 << 20}
    if alone:
        values["NPROC"] = limits["threads"] + 3
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # programs may raise the stack: the memory is limited
        resource.setrlimit(kind, (value, hard if name == "STACK" else value))
    sys.setrecursionlimit(1050)  # the 1000 a program may count on, and what stands below it here


def wall_off(box, is_judge):
    """Called by a fresh clone before it takes its job: a session of its own, no rights, few system
    calls."""
    os.setsid()
    box["walls"].close(is_judge)
    if box["isolated"]:
        system(LIBC.prctl(1, 9, 0, 0, 0), "PR_SET_PDEATHSIG")  # SIGKILL when the supervisor ends
        system(LIBC.capset(NO_CAPABILITIES, bytes(24)), "capset")
    if box["filter"]:
        install(box["filter"])
    gc.enable()


class NoWalls:
    """--unsafe: what runs is held by limits and the filter only, and sees the host's files."""

    folder = "/tmp"  # of the programs
    alone = False

    def __init__(self, options):
        pass

    def clone(self, is_judge):
        """fork(). The interpreter must have one thread only."""
        return os.fork()

    def renew(self):
        """Called by the supervisor before each program: nothing is left of the last."""

    def close(self, is_judge):
        """Called by a clone, to shut itself in."""
        os.chdir(self.folder)

    def remove(self):
        """Called by the supervisor at its end."""


def leave_root(user, paths):
    """Root becomes `user`, if that one can read what programs need. Else the clones keep root's name, as
    the owner of those files, but none of its rights."""
    if os.getuid():
        return
    system_wide = "/usr/", "/lib", "/etc/", "/dev/"  # all may read them
    paths = [os.path.dirname(os.__file__), *(path for path in paths if not path.startswith(system_wide))]
    try:
        os.setgroups([])
        os.setegid(user)
        os.seteuid(user)
        for path in paths:
            while os.path.isdir(path):
                path = max((entry.path for entry in os.scandir(path)), default="/dev/null")
            with contextlib.suppress(FileNotFoundError):
                open(path, "rb").close()
    except OSError:
        os.seteuid(0)
        os.setegid(0)
        return
    os.seteuid(0)
    os.setgid(user)
    os.setuid(user)


# ---- what a clone needs to begin ----

def module_space(name="solution"):
    """The namespace of a fresh module (dataclasses and pickle look it up in sys.modules)."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


def compile_preamble(source):
    try:
        return compile(source, "<preamble>", "exec", dont_inherit=True)
    except SyntaxError:  # perhaps it ends at the head of the function that the program is to fill
        return compile(source + "\n    pass", "<preamble>", "exec", dont_inherit=True)


def silence():
    null = os.open("/dev/null", os.O_RDWR)  # opened here: the flags of an open file are shared
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if null > 2:
        os.close(null)


def take(size, source=0):
    """Exactly `size` bytes of a pipe, the host's if no other is named; EOFError where it has closed."""
    data = bytearray()
    while len(data) < size:
        more = os.read(source, size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
