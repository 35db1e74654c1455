"""How a worker is started: the command line of each runtime, and what of the host it shows.

    python -c 'from sandbox import runtimes; print(runtimes.command("unshare", "", "numpy", {}))'
"""
import importlib.util
import json
import os
import sys
from pathlib import Path

IMAGE, PACKAGES = "python:3.11-slim", "sortedcontainers"
RUNTIMES = ("bwrap", "podman", "unshare")
# All that a worker has: the order of sets is the same in each, and no clone has to look up C functions anew.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1",
               "OPENBLAS_NUM_THREADS": "1"}
HERE = os.path.dirname(os.path.realpath(__file__))
NOBODY = 65534


def visible(packages):
    """What a container shows, as pairs (host's path, path inside): this Python's files, a few
    devices, `packages`."""
    paths = [os.path.realpath(sys.executable), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib",
             "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
             "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [(path, path) for path in paths if os.path.exists(path)] + extras(packages)


def extras(packages):
    """Such pairs for the worker's files and for those packages, by import name, that are installed."""
    pairs = [(f"{HERE}/inside", "/box/inside")]
    for name in filter(None, packages.split(",")):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            path = os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin
            found = [path, f"{os.path.dirname(path)}/{name}.libs"]  # a wheel's shared libraries
            pairs += [(path, "/box/" + os.path.basename(path)) for path in found if os.path.exists(path)]
    return pairs


def command(runtime, image, packages, limits):
    """The command line of a worker in a container of that runtime (None: in no container)."""
    options = {"limits": limits, "isolated": runtime is not None, "root": [], "path": ["/box"],
               "warm": [name for name in packages.split(",") if name]}
    root = os.geteuid() == 0
    own = [os.path.realpath(sys.executable), "-S", "-s", "-B", "/box/inside"]
    if runtime is None:
        own[-1] = f"{HERE}/inside"
        options["path"] = [os.path.dirname(path) for path, _ in extras(packages)[1:]]
        start = []
    elif runtime == "bwrap":
        start = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
                 "--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent", "--new-session",
                 "--cap-drop", "ALL"]
        # Real root needs no user namespace here; it becomes nobody inside, once Python runs.
        start += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
        parents = {str(parent) for _, inside in visible(packages) for parent in Path(inside).parents}
        for parent in sorted(parents - {inside for _, inside in visible(packages)} - {"/"}):
            start += ["--perms", "0755", "--dir", parent]  # else they would be root's alone
        for path, inside in visible(packages):
            start += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, inside]
        start += ["--proc", "/proc", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    elif runtime == "unshare":
        start = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts",
                 "--mount-proc"]
        start += [] if root else ["--user", "--map-root-user"]
        options["root"] = visible(packages)
        own[-1] = f"{HERE}/inside"
    else:
        own[0] = "python3"
        start = ["podman", "run", "--rm", "--interactive", "--network=none", "--read-only", "--cap-drop=ALL",
                 f"--user={NOBODY}:{NOBODY}", "--security-opt=no-new-privileges",
                 "--security-opt=seccomp=unconfined",
                 "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--http-proxy=false"]
        start += [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
        start += [f"--volume={path}:{inside}:ro" for path, inside in extras(packages)]
        start += ["--rootfs"] * os.path.isdir(image)  # a root file system, unpacked
        start += [image]
    return start + own + [json.dumps(options)]
