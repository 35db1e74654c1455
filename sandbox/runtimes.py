"""How a worker is started: the command line of each runtime, and what of the host it shows.

    python -c 'from sandbox import runtimes; print(runtimes.command("namespaces", "", "numpy", {}))'
"""
import glob
import importlib.util
import json
import os
import sys
import tempfile

IMAGE, PACKAGES = "python:3.11-slim", "sortedcontainers"
RUNTIMES = ("namespaces", "podman", "landlock")  # in the order in which they are tried
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
        if not spec and packages != PACKAGES:
            raise RuntimeError(f"--packages={packages}: {name!r} is not installed here")
        if spec and spec.origin:
            path = os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin
            found = [path, *glob.glob(f"{os.path.dirname(path)}/*.libs")]  # wheels' shared libraries
            pairs += [(path, "/box/" + os.path.basename(path)) for path in found if os.path.exists(path)]
    return list(dict.fromkeys(pairs))


def command(runtime, image, packages, limits, way="apart"):
    """The command line of a worker with that runtime ("none": no isolation) that judges that way."""
    options = {"limits": limits, "way": way, "visible": [],
               "walls": "namespaces" if runtime == "podman" else runtime,
               "path": ["/box"], "warm": [name for name in packages.split(",") if name],
               "folders": tempfile.gettempdir() if runtime == "landlock" else ""}
    own = [os.path.realpath(sys.executable), "-S", "-s", "-B", f"{HERE}/inside"]
    start = []
    if runtime == "podman":
        own = ["python3", *own[1:4], "/box/inside"]
        start = ["podman", "run", "--rm", "--interactive", "--pull=never", "--network=none", "--read-only",
                 "--cap-drop=ALL", f"--user={NOBODY}:{NOBODY}", "--security-opt=no-new-privileges",
                 "--security-opt=seccomp=unconfined",
                 "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--http-proxy=false"]
        start += [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
        start += [f"--volume={path}:{inside}:ro" for path, inside in extras(packages)]
        start += ["--rootfs"] * os.path.isdir(image)  # a root file system, unpacked
        start += [image]
    else:
        options["visible"] = visible(packages)
        if runtime != "namespaces":  # packages are where the host has them
            options["path"] = [os.path.dirname(path) for path, _ in extras(packages)[1:]]
    return start + own + [json.dumps(options)]


def remedy():
    """What would give this machine namespaces, or Landlock, in words."""
    def setting(name):
        try:
            with open(f"/proc/sys/{name}") as file:
                return file.read().strip()
        except OSError:
            return None
    marks = os.path.exists("/.dockerenv"), os.path.exists("/run/.containerenv")
    if any(marks) or "KUBERNETES_SERVICE_HOST" in os.environ:
        return ("start the container with --security-opt seccomp=unconfined --security-opt systempaths="
                "unconfined (Kubernetes: seccompProfile Unconfined, procMount Unmasked)")
    if setting("user/max_user_namespaces") == "0":
        return "sudo sysctl user.max_user_namespaces=10000"
    if setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a profile with `userns,`"
    if setting("kernel/unprivileged_userns_clone") == "0":
        return "sudo sysctl kernel.unprivileged_userns_clone=1"
    return "a kernel of 5.13 or newer that was started with Landlock (lsm=landlock,...)"
