"""What separates a program's processes from the machine, level by level.

Owns the order in which the kernel's means are put together: a private root and namespaces, Landlock, an identity
without rights, limits, seccomp. Each step raises where the kernel refuses it; nothing goes on with less.

Three processes are concerned. The *server* is prepared once (`prepare_server`). For each program it forks a *keeper*
into namespaces of its own (`fork_keeper`, `prepare_keeper`), which never runs what a program says. The keeper forks a
*part*'s process, which does, after `seal`: no new process, no signal to others, no more than its limits.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from rl4dlm.grading.sandbox import kernel, landlock, seccomp

if TYPE_CHECKING:  # its module imports what would make every fork dearer
    from rl4dlm.grading.sandbox.limits import Limits

NAMESPACES, LANDLOCK = "namespaces", "landlock"
LEVELS = (NAMESPACES, LANDLOCK)
# No level for programs of a model: processes with limits, and nothing between them and the machine. Functions of our
# own, which read hostile text but do not run it, work so where there is nothing better, also without Linux.
LIMITS = "limits"
FOLDERS = ("/tmp", "/folder")  # the writable one, within the private root; the second where the first is in use
_NOBODY = 65534
_LAST = 5.0  # seconds beyond all its parts' time after which a process without a keeper ends
_PACKAGES = ("site-packages", "dist-packages")  # within the standard library's folder; not for programs
_PER_PROGRAM = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
)


class Prepared(NamedTuple):
    """What the server found and made, for the keepers.

    Attributes:
        level: of `LEVELS`, or `LIMITS`.
        landlock: version of Landlock's interface.
        owner: user and group, as which keepers run in their user namespaces.
        proc: an open `/proc`, which its own view of files has not; -1 at the level `landlock`.
        rules: Landlock's rules at the level `landlock`, else -1.
        folder: the writable one, at the level `namespaces`.
        tasks: processes and threads that the user has elsewhere, which count towards a program's; 0 where they do not;
            -1 where the kernel does not limit the user's: then a program has one thread.
        kept: capabilities, as a mask.
    """

    level: str
    landlock: int
    owner: tuple[int, int]
    proc: int = -1
    folder: str = FOLDERS[0]
    rules: int = -1
    tasks: int = 0
    kept: int = 0


def prepare_server(level: str, packages: tuple[str, ...] = ()) -> Prepared:
    """Prepares the process that forks keepers.

    Args:
        level: of `LEVELS`, or `LIMITS`.
        packages: folders that may be read, too.

    Raises:
        OSError: the kernel does not offer what the level needs.
    """
    if level == LIMITS:
        os.umask(0o077)
        os.chdir("/")
        return Prepared(level, 0, (os.getuid(), os.getgid()))
    if not kernel.supported():
        raise OSError(f"the sandbox needs Linux on x86_64 or aarch64, this is {sys.platform} on {kernel.MACHINE}")
    version = landlock.abi()
    if version == 0:
        raise OSError("the kernel has no Landlock, or it is switched off")
    readable = _python_paths()
    os.umask(0o077)
    if level == LANDLOCK:
        entries = [f"{path}/{name}" for path in readable for name in os.listdir(path) if name not in _PACKAGES]
        rules = landlock.ruleset(version, [*entries, *packages])
        seccomp.template(kernel.MACHINE)
        kept = _become_nobody((*readable, *packages))
        os.chdir("/")
        tasks = _tasks() if _limited() else -1
        return Prepared(level, version, (os.getuid(), os.getgid()), rules=rules, tasks=tasks, kept=kept)
    seccomp.template(kernel.MACHINE)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    taken = any(path.startswith(FOLDERS[0] + "/") for path in (*readable, *packages))
    folder = FOLDERS[taken]
    _private_root(proc, readable, packages, folder)
    _become_nobody(("/", *readable, *packages))
    return Prepared(level, version, (os.getuid(), os.getgid()), proc, folder, tasks=0 if _limited() else -1)


def fork_keeper(prepared: Prepared) -> int:
    """Forks into namespaces of the process's own, where the level has them; the child gets 0."""
    return kernel.clone(_PER_PROGRAM) if prepared.level == NAMESPACES else os.fork()


def prepare_keeper(prepared: Prepared, limits: Limits) -> None:
    """What the keeper does first: its identity, an empty folder of bounded size, and no way to another path."""
    rules = prepared.rules
    if prepared.level == LIMITS:
        _limit(resource.RLIMIT_AS, limits.memory_bytes)
        return
    if prepared.level == NAMESPACES:
        _write_maps(prepared.proc, *prepared.owner)
        os.close(prepared.proc)
        options = f"size={limits.folder_bytes},nr_inodes=1024,mode=0700"
        kernel.mount("tmpfs", prepared.folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        os.chdir(prepared.folder)
        rules = landlock.ruleset(prepared.landlock, ("/",), (prepared.folder,))
    kernel.drop_capabilities(prepared.kept)
    landlock.restrict(rules)
    os.close(rules)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone, and ends it if that has happened.

    Args:
        parent: id that `os.getppid` must give: 0 for a parent outside the pid namespace.
    """
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def seal(limits: Limits, prepared: Prepared, parts: int = 1) -> None:
    """The last step before what a program says is run. Open files must be closed before.

    Args:
        parts: that the process may come to run; `more_time` grants the processor's time for each but the first.
    """
    soft_cpu = max(1, int(limits.cpu_seconds + 0.999))
    wanted = {
        resource.RLIMIT_CPU: (soft_cpu, soft_cpu * parts + 1),
        resource.RLIMIT_AS: (limits.memory_bytes,) * 2,
        resource.RLIMIT_FSIZE: (limits.file_bytes,) * 2,
        resource.RLIMIT_NOFILE: (limits.open_files,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    if prepared.level == LIMITS:
        wanted[resource.RLIMIT_NPROC] = (0, 0)  # which does not hold the superuser
        for kind, (soft, _) in wanted.items():
            _limit(kind, soft)
        signal.setitimer(signal.ITIMER_REAL, limits.program_seconds + _LAST)  # if no one is left to end it
        return
    wanted |= {
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_NPROC: (limits.threads + 2 + max(0, prepared.tasks),) * 2,
    }
    for kind, (soft, hard) in wanted.items():
        highest = resource.getrlimit(kind)[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    seccomp.install(seccomp.program(os.getpid(), threads=prepared.tasks >= 0))


def _limit(kind: int, size: int) -> None:
    """A limit where the system has it: not every one that Python knows is there on every system."""
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def more_time(limits: Limits) -> None:
    """Lets a sealed process use the processor for as long again as a part may."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (min(most, int(time.process_time() + limits.cpu_seconds + 0.999)), most))


def _python_paths() -> tuple[str, ...]:
    """Folders of the standard library. Shared libraries are loaded before, and found by their names."""
    paths = {os.path.realpath(os.path.dirname(os.__file__))}
    paths |= {os.path.realpath(path) for path in sys.path if path.endswith("lib-dynload")}
    paths = {path for path in paths if os.path.isdir(path)}
    return tuple(sorted(path for path in paths if not any(path.startswith(other + "/") for other in paths)))


def _private_root(proc: int, readable: tuple[str, ...], packages: tuple[str, ...], folder: str) -> None:
    """A root of this process's own that holds `readable` and `packages`, read-only, and an empty folder, no more."""
    user, group = os.getuid(), os.getgid()
    try:
        if user != 0:
            raise PermissionError
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWNET)
    except PermissionError:  # an ordinary user, or a superuser without rights, as in many containers
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWNET)
        _write_maps(proc, user, group)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = "/proc"  # a folder that is always there and hides nothing that is needed; no one else sees the mount
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1024,mode=0755")
    os.umask(0o022)
    seen = {os.path.realpath(path) for path in packages}
    below = tuple(path + "/" for path in readable)
    for path in (*readable, *(path for path in packages if not path.startswith(below))):
        os.makedirs(root + path, exist_ok=True)
        kernel.mount(path, root + path, None, kernel.MS_BIND)
        _read_only(root + path)
        for name in _PACKAGES:
            if os.path.isdir(f"{root}{path}/{name}") and os.path.realpath(f"{path}/{name}") not in seen:
                kernel.mount("tmpfs", f"{root}{path}/{name}", "tmpfs", kernel.MS_RDONLY, "size=4k,mode=0755")
    os.makedirs(root + folder, exist_ok=True)
    os.chdir(root)
    kernel.call("pivot_root", b".", b".")
    kernel.unmount(".")
    os.chdir("/")
    _read_only("/")
    os.umask(0o077)


def _read_only(target: str) -> None:
    """Remounts a bind mount. What the original forbids must stay forbidden, or the kernel refuses."""
    kept = os.statvfs(target).f_flag
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    for flag, bit in ((os.ST_NOEXEC, kernel.MS_NOEXEC), (os.ST_NOATIME, 1024), (os.ST_NODIRATIME, 2048)):
        flags |= bit if kept & flag else 0
    if kept & os.ST_RELATIME:
        flags |= 1 << 21
    kernel.mount(None, target, None, flags)


def _become_nobody(readable: tuple[str, ...]) -> int:
    """Gives up the superuser's identity and rights.

    Returns:
        What right is kept, as a mask: to read files of others, where Python lies in a folder that is closed to them.
        Landlock then says which files.
    """
    if os.getuid() != 0:
        return 0
    kept = 0 if all(_readable_by_all(path) for path in readable) else kernel.READ_ANYWHERE
    if kept & ~kernel.capabilities():
        return 0  # without it no one else can read what programs need
    with contextlib.suppress(PermissionError):  # a container may have only this one user
        kernel.prctl(kernel.PR_SET_KEEPCAPS, bool(kept))
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        if kept:
            kernel.drop_capabilities(kept)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # an identity that changed hides /proc/self, which maps are written to
    return kept if os.getuid() != 0 else 0


def _readable_by_all(path: str) -> bool:
    """Whether every folder on the way may be passed by everyone, and the last be read."""
    while True:
        if not os.stat(path).st_mode & 0o001 and os.path.isdir(path):
            return False
        parent = os.path.dirname(path)
        if parent == path:
            return True
        path = parent


def _write_maps(proc: int, user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        handle = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)


def _limited() -> bool:
    """Whether the kernel limits how many processes and threads this user has: the superuser's it does not."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            kernel.drop_capabilities()
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            os.fork()
        except OSError:
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _tasks() -> int:
    """Processes and threads of this user."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
