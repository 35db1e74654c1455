"""Run a command with what a container engine leaves it: no namespaces, no mounts, a container's capabilities.

    python tests/like_container.py [--namespaces] [--no-landlock] [--user=UID] COMMAND...

--namespaces: user namespaces are allowed, as in some pods: root, but without CAP_SYS_ADMIN. --no-landlock: as
under an old kernel. --user: as an ordinary user. Linux on x86_64 and aarch64; what it drops, only root has.
"""
import ctypes
import errno
import os
import platform
import struct
import sys

MOUNTS = [*range(428, 434), 442]  # open_tree to fspick, mount_setattr: the same numbers everywhere
REFUSED = {  # unshare, mount, umount2, setns, pivot_root
    "x86_64": [272, 165, 166, 308, 155, *MOUNTS], "aarch64": [97, 40, 39, 268, 41, *MOUNTS]}
CLONE = {"x86_64": 56, "aarch64": 220}
CONTAINER = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}  # chown, dac_override, fowner, ..., setfcap
LOAD, EQUAL, ANY_BIT, GIVE = 0x20, 0x15, 0x45, 0x06
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def container_filter(namespaces, landlock):
    machine = platform.machine()
    code = [(LOAD, 0, 0, 0)]
    for number in [] if namespaces else REFUSED[machine]:
        code += [(EQUAL, 0, 1, number), (GIVE, 0, 0, EPERM)]
    for number in [] if landlock else (444, 445, 446):
        code += [(EQUAL, 0, 1, number), (GIVE, 0, 0, ENOSYS)]
    code += [(EQUAL, 0, 1, 435), (GIVE, 0, 0, ENOSYS)]  # clone3
    if not namespaces:
        code += [(EQUAL, 0, 3, CLONE[machine]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, 0x7E020000),
                 (GIVE, 0, 0, EPERM)]
    return code + [(GIVE, 0, 0, ALLOW)]


def main():
    arguments, user = sys.argv[1:], None
    options = set()
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        user = int(option[7:]) if option.startswith("--user=") else user
        options.add(option)
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        for capability in set(range(41)) - CONTAINER:
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    code = container_filter("--namespaces" in options, "--no-landlock" not in options)
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    if libc.prctl(22, 2, program, 0, 0):
        sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main()
