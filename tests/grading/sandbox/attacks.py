"""What a hostile program may try against the machine.

Each section is the source of a function `attack`, which returns a value only if it had its way, and raises or ends
otherwise. `SETUP` runs before it: how to reach the kernel. The test adds `FILE`, which only the trainer may read;
`FOLDER`, where it lies; `PROJECT`; `PID` and `PGID`, the trainer's; `PORT`, `UDP` and `SOCKET`, where it listens.
"""

from __future__ import annotations

SETUP = """
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)

def must(result):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

def any_of(*calls):  # system calls by their numbers on x86_64
    done = []
    for call in calls if os.uname().machine == "x86_64" else ():
        try:
            done.append((call, must(libc.syscall(*map(ctypes.c_long, call)))))
        except OSError:
            pass
    assert done
    return done
"""


def _sections(text: str) -> dict[str, str]:
    parts = (part.partition("\n") for part in text.split("\n## ")[1:])
    return {name: source for name, _, source in parts}


ATTACKS = _sections(r"""
## read_passwd
def attack(): return open('/etc/passwd').read()

## read_project
def attack(): return open(PROJECT + '/README.md').read()

## read_folder_of_project
import os
def attack(): return os.listdir(PROJECT)

## read_root
import os
def attack():
    names = set(os.listdir('/'))
    assert names - {'tmp', os.__file__.split('/')[1]}
    return names

## read_secret
def attack(): return open(FILE).read()

## read_by_a_link
import os
def attack():
    os.symlink(FILE, 'link')
    return open('link').read()

## hard_link
import os
def attack():
    os.link(FILE, 'link')
    return open('link').read()

## read_by_changing_folder
import os
def attack():
    os.chdir(FOLDER)
    return open('secret').read()

## write_secret
def attack(): return open(FILE, 'w').write('x')

## truncate_secret
import os
def attack(): return os.truncate(FILE, 0) or 1

## remove_secret
import os
def attack(): return os.unlink(FILE) or 1

## rename_secret
import os
def attack(): return os.rename(FILE, FILE + '2') or 1

## write_beside_it
def attack(): return open(FOLDER + '/new', 'w').write('x')

## folder_beside_it
import os
def attack(): return os.mkdir(FOLDER + '/new') or 1

## mode_of_secret
import os
def attack(): return os.chmod(FILE, 0o777) or 1

## time_of_secret
import os
def attack(): return os.utime(FILE, (1, 1)) or 1

## owner_of_secret
import os
def attack(): return os.chown(FILE, 1, 1) or 1

## attribute_of_secret
import os
def attack(): return os.setxattr(FILE, 'user.x', b'x') or 1

## write_library
import os
def attack(): return open(os.__file__, 'a').write('x')

## truncate_library
import os
def attack(): return os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)

## write_library_folder
import os
def attack(): return open(os.path.dirname(os.__file__) + '/evil.py', 'w').write('x')

## site_packages
import os
def attack():
    names = os.listdir(os.path.dirname(os.__file__) + '/site-packages')
    assert names
    return names

## device
def attack(): return open('/dev/zero', 'rb').read(8)

## device_node
import os
def attack(): return os.mknod('null', 0o20666, os.makedev(1, 3)) or 1

## setuid_file
import os
def attack():
    open('file', 'w').write('x')
    os.chmod('file', 0o4755)
    return 1

## fill_disk
def attack():
    for number in range(10_000):
        open(f'f{number}', 'wb').write(bytes(1 << 20))
    return 1

## fill_inodes
def attack():
    for number in range(100_000):
        open(f'f{number}', 'wb').close()
    return 1

## large_file
def attack():
    with open('file', 'wb') as file:
        for _ in range(100): file.write(bytes(1 << 20))
    return 1

## environment
import os
def attack():
    assert os.environ or os.environb
    return dict(os.environ)

## environment_of_itself
def attack(): return open('/proc/self/environ').read()

## environment_of_trainer
def attack(): return open(f'/proc/{PID}/environ').read()

## memory_of_itself
def attack(): return open('/proc/self/mem', 'rb')

## memory_of_parent
import os
def attack(): return open(f'/proc/{os.getppid()}/mem', 'rb')

## processes
import os
def attack(): return os.listdir('/proc')

## folder_of_trainer
import os
def attack(): return os.readlink(f'/proc/{PID}/cwd')

## open_files
import os
def attack():
    found = []
    for number in range(1024):
        try: os.fstat(number)
        except OSError: continue
        found.append(number)
    assert set(found) - {0, 1, 2, 3}
    return found

## tcp
import socket
def attack(): return socket.create_connection(('127.0.0.1', PORT), 1).sendall(b'x') or 1

## udp
import socket
def attack():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return s.sendto(b'x', ('127.0.0.1', UDP))

## unix
import socket
def attack():
    s = socket.socket(socket.AF_UNIX)
    s.connect(SOCKET)
    return 1

## unix_by_a_pair
import socket
def attack():
    s, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return s.sendto(b'x', SOCKET)

## unix_by_a_stream
import socket
def attack():
    s, _ = socket.socketpair()
    return s.sendto(b'x', SOCKET)

## listen
import socket
def attack():
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    s.listen()
    return 1

## http
import urllib.request
def attack(): return urllib.request.urlopen(f'http://127.0.0.1:{PORT}/', timeout=1).read()

## netlink
import socket
def attack(): return repr(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))

## fork
import os
def attack(): return os.fork()

## fork_bomb
import os
def attack():
    made = 0
    while True:
        try:
            os.fork()
            made += 1
        except OSError:
            if made == 0: raise

## vfork
def attack(): return any_of(
    (58,), (57,), (56, 17, 0, 0, 0, 0), (435, 0, 0),
)

## spawn
import os
def attack(): return os.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})

## daemon
import os, signal, time
def attack():
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except OSError: pass
    if os.fork() == 0:
        os.setsid()
        time.sleep(3600)
    return 1

## shell
import os
def attack():
    assert os.system('true') == 0
    return 1

## subprocess
import subprocess
def attack(): return subprocess.run(['/bin/ls', '/'], capture_output=True).returncode + 1

## su
import os
def attack(): return os.execv('/bin/su', ['su', '-c', 'id'])

## exec_file
import os
def attack():
    open('x', 'w').write('#!/bin/sh')
    return os.execv('x', ['x'])

## exec_memory
import os
def attack(): return os.memfd_create('x')

## thread_bomb
import threading, time
def attack():
    threading.stack_size(32768)
    for _ in range(50_000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return 1

## multiprocessing
import multiprocessing
def attack():
    with multiprocessing.get_context('fork').Pool(2) as pool:
        return pool.map(len, ['a'])

## kill_parent
import os
def attack(): return os.kill(os.getppid(), 9) or 1

## kill_trainer
import os
def attack(): return os.kill(PID, 9) or 1

## kill_all
import os
def attack(): return os.kill(-1, 9) or 1

## kill_group
import os
def attack(): return os.kill(0, 9) or 1

## kill_group_of_trainer
import os
def attack(): return os.killpg(PGID, 9) or 1

## kill_by_handle
import os, signal
def attack(): return signal.pidfd_send_signal(os.pidfd_open(PID), 9) or 1

## kill_by_a_file
import fcntl, os, signal
def attack():
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETOWN, PID)
    fcntl.fcntl(read, 10, 9)
    fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
    os.write(write, b'x')
    return 1

## kill_thread
def attack(): return any_of(
    (200, PID, 9), (234, PID, PID, 9), (129, PID, 9, 0), (297, PID, PID, 9, 0),
)

## limits_of_trainer
import resource
def attack():
    resource.prlimit(PID, resource.RLIMIT_NOFILE, (3, 3))
    return 1

## priority_of_trainer
import os
def attack(): return os.setpriority(os.PRIO_PROCESS, PID, 19) or 1

## cores_of_trainer
import os
def attack(): return os.sched_setaffinity(PID, [0]) or 1

## raise_limits
import resource
def attack():
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return 1

## group_of_trainer
import os
def attack(): return os.setpgid(PID, 0) or 1

## ptrace
def attack(): return must(libc.ptrace(16, PID, 0, 0)) + 1

## ptrace_parent
def attack(): return must(libc.ptrace(16, os.getppid(), 0, 0)) + 1

## foreign_memory
def attack(): return any_of(
    (310, PID, 0, 0, 0, 0, 0), (311, PID, 0, 0, 0, 0, 0), (440, 3, 0, 0, 0, 0),
)

## foreign_files
def attack(): return any_of(
    (438, 3, 3, 0), (434, PID, 0), (312, PID, PID, 0, 0, 0),
)

## namespaces
def attack(): return must(libc.unshare(0x10000000)) + 1

## namespaces_by_clone
def attack(): return any_of(
    (56, 0x10000011, 0, 0, 0, 0), (56, 0x10010900, 0, 0, 0, 0), (308, 3, 0),
)

## mount
def attack(): return must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)) + 1

## unmount
def attack(): return must(libc.umount2(b'/tmp', 2)) + 1

## mount_anew
def attack(): return any_of(
    (428, -100, 0, 1), (430, 0, 0), (442, -100, 0, 0, 0, 0), (155, 0, 0),
)

## chroot
import os
def attack(): return os.chroot('/') or 1

## become_root
import os
def attack():
    os.setresuid(0, 0, 0)
    return 1

## keys
def attack(): return any_of(
    (248, 0, 0, 0, 0, 0), (250, 0, -1, 0), (249, 0, 0, 0, 0),
)

## shared_memory
def attack(): return any_of(
    (29, 0, 4096, 0o1600), (64, 0, 1, 0o1600), (68, 0, 0o1600),
)

## large_interfaces
def attack(): return any_of(
    (321, 0, 0, 0), (425, 1, 0), (298, 0, 0, -1, -1, 0), (323, 0), (319, 0, 0), (304, 0, 0, 0),
    (300, 0, 0), (254,), (175, 0, 0, 0), (246, 0, 0, 0, 0),
)

## machine
def attack(): return any_of(
    (169, 0xFEE1DEAD, 672274793, 0, 0), (170, 0, 0), (164, 0, 0), (227, 0, 0), (167, 0, 0),
)

## undo_filters
def attack(): return any_of(
    (157, 22, 1, 0, 0, 0), (157, 4, 1, 0, 0, 0), (157, 1, 0, 0, 0, 0), (317, 1, 0, 0),
)

## other_numbers
def attack(): return any_of(
    (0x40000000 + 39,), (0x40000000 + 57,),
)

## terminal
import fcntl, termios
def attack(): return fcntl.ioctl(0, termios.TIOCSTI, b'x')

## four_gigabytes
def attack(): return len(bytearray(4 << 30))

## map_four_gigabytes
import mmap
def attack(): return len(mmap.mmap(-1, 4 << 30))

## many_pipes
import os
def attack():
    held = [os.pipe() for _ in range(1000)]
    return len(held)

## huge_value
def attack(): return 'x' * (100 << 20)

## deep_value
def attack():
    value = []
    for _ in range(100_000): value = [value]
    return value

## cyclic_value
def attack():
    value = []
    value.append(value)
    return value

## deep_recursion
import sys
def attack():
    sys.setrecursionlimit(10**9)
    def f(x): return [f(x)]
    return repr(f(1))

## leave
import os
def attack(): os._exit(0)

## leave_politely
import sys
def attack(): sys.exit(0)

## raw_interrupts
import ctypes, mmap
def attack():
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(bytes.fromhex('b814000000cd80c3'))  # getpid by the 32-bit interface
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(at)()
""")

LATE = _sections(r"""
## endless_loop
def attack():
    while True: pass

## sleep
import time
def attack(): time.sleep(3600)

## ignore_signals
import signal, time
def attack():
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except OSError: pass
    while True:
        try: time.sleep(3600)
        except BaseException: pass

## hang_at_the_end
import atexit, threading
def wait():
    while True: pass
threading.Thread(target=wait).start()
def attack():
    while True: pass

## hang_in_c
def attack(): return 7 ** (10 ** 9)

## hang_in_a_value
class C(dict):
    def keys(self):
        while True: pass
def attack():
    while True: C().keys()
""")
"""Attacks on time: `attack` must end as out of time."""
