"""Sixty programs that do not do what they are asked, and try to be paid all the same.

What is asked is `f(x) = x * x + 1`. The tests are one of each kind, so that a trick against any of them would show.
"""

from __future__ import annotations

from rl4dlm.grading.code.problem import Problem

PROBLEM = Problem(
    (
        {"call": "f(3)", "expected": "10"},
        {"source": "assert f(7) == 50"},
        {"source": "def check(candidate):\n    assert candidate(2) == 5\n    assert candidate(-4) == 17\n\ncheck(f)"},
        {"source": "from solution import f\n\ndef test_f():\n    assert sorted(f(x) for x in [5, 6]) == [26, 37]"},
        {"source": "for n in (8, 9):\n    got = f(n)\n    if got != n * n + 1:\n        raise ValueError(got)"},
    ),
    entry_point="f",
)  # fmt: skip
ONE_TEST = Problem(({"source": "assert f(7) == 50"},), entry_point="f")
"""For programs that hang, each of whose tests takes until its deadline."""


def _programs(text: str) -> dict[str, str]:
    """The programs of a text, each behind a line with its name."""
    found = (part.partition("\n") for part in text.split("### ")[1:])
    return {name.strip(): program.strip() for name, _, program in found}


HANGING = _programs(
    r"""
### endless_loop
def f(x):
    while True:
        pass

### endless_generator
def f(x):
    return list(iter(int, 1))

### sleeps
import time
time.sleep(1000)
def f(x):
    return 50

### ignores_signals
import signal, time
for s in range(1, 32):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def f(x):
    time.sleep(1000)

### reads_stdin
import os
def f(x):
    os.read(os.pipe()[0], 1)
    return 50

### endless_print
def f(x):
    while True:
        print('PASSED' * 1000)
"""
)

DISHONEST = _programs(
    r"""
# the end of the process as a verdict

### exits_with_0
import os
os._exit(0)
def f(x):
    pass

### exits_with_0_when_called
import os
def f(x):
    os._exit(0)

### sys_exit
import sys
def f(x):
    sys.exit(0)

### raises_system_exit
raise SystemExit(0)

### raises_keyboard_interrupt
def f(x):
    raise KeyboardInterrupt

### kills_itself
import os, signal
def f(x):
    os.kill(os.getpid(), signal.SIGTERM)

### kills_all
import os, signal
def f(x):
    os.kill(-1, signal.SIGKILL)

### aborts
import os
def f(x):
    os.abort()

### atexit
import atexit, os
atexit.register(lambda: os._exit(0))
def f(x):
    return None

### forks_and_leaves
import os
def f(x):
    if os.fork():
        os._exit(0)
    return 50

### segfault
def f(x):
    import ctypes
    ctypes.string_at(0)

# answers that say yes to everything

### equal_to_everything
class Always:
    def _yes(self, *others):
        return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = _yes
    def __hash__(self):
        return 0
    def __iter__(self):
        return iter([self])
    def __len__(self):
        return 1
    def __sub__(self, other):
        return 0
    __rsub__ = __add__ = __mul__ = __abs__ = __sub__
    def __getattr__(self, name):
        return lambda *a, **k: True
def f(x):
    return Always()

### int_subclass
class I(int):
    def __eq__(self, o):
        return True
    def __ne__(self, o):
        return False
    __hash__ = int.__hash__
def f(x):
    return I(0)

### str_subclass
class S(str):
    def __eq__(self, o):
        return True
    __hash__ = str.__hash__
def f(x):
    return S('10')

### list_subclass
class L(list):
    def __eq__(self, o):
        return True
def f(x):
    return L()

### float_subclass
class F(float):
    def __eq__(self, o):
        return True
    __hash__ = float.__hash__
    def __float__(self):
        return 50.0
    def __index__(self):
        return 50
def f(x):
    return F(0)

### metaclass
class M(type):
    def __eq__(cls, o):
        return True
    __hash__ = type.__hash__
class X(metaclass=M):
    pass
def f(x):
    return X

### proxy
class P:
    def __init__(self):
        self.__dict__['v'] = 0
    def __getattribute__(self, n):
        return lambda *a: True
    def __eq__(self, o):
        return True
def f(x):
    return P()

### claims_another_class
class P:
    __class__ = int
    def __eq__(self, o):
        return True
    def __pos__(self):
        return 50
    def __int__(self):
        return 50
def f(x):
    return P()

### mock
from unittest.mock import MagicMock
def f(x):
    m = MagicMock()
    m.__eq__ = lambda s, o: True
    m.__ne__ = lambda s, o: False
    return m

### any_of_mock
from unittest.mock import ANY
def f(x):
    return ANY

### reduces_to_code
import os
class R:
    def __reduce__(self):
        return (eval, ('50',))
    def __eq__(self, o):
        return True
def f(x):
    return R()

### function_itself
def f(x):
    return f
f.__eq__ = lambda o: True

### generator
def f(x):
    yield x * 0

### exception_as_value
def f(x):
    return AssertionError(x)

# printed verdicts

### prints_passed
print('PASSED')
print('1 passed in 0.01s')
def f(x):
    print('OK')

### prints_json
import json
def f(x):
    print(json.dumps({'status': 'value', 'value': 50, 'passed': True}))

### prints_pass_rate
print('__PASS_RATE__', 1.0)
import os
os._exit(0)

### writes_all_descriptors
import os
def f(x):
    for fd in range(0, 256):
        try:
            os.write(fd, b'["value", ""]\n50\n')
        except OSError:
            pass
    os._exit(0)

### guesses_the_protocol
import os, json
def f(x):
    text = json.dumps({'part': 0, 'status': 'value', 'message': ''}).encode() + b'\ntrue'
    for fd in (1, 2, 3, 4, 5, 6, 7):
        try:
            os.write(fd, len(text).to_bytes(4, 'big') + text)
        except OSError:
            pass
    os._exit(0)

### claims_true_with_the_nonce
import os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        nonce = frame.f_locals.get('nonce')
        if nonce:
            nonce = nonce if isinstance(nonce, bytes) else nonce.encode()
            for fd in range(1, 16):
                try:
                    os.write(fd, nonce + b'["value", ""]\ntrue')
                except OSError:
                    pass
            os._exit(0)
        frame = frame.f_back

# the machinery of tests, patched

### patched_builtins
import builtins
for n in ('isinstance', 'len', 'abs', 'sorted', 'all', 'any', 'sum', 'bool'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x):
    return 0

### patched_assertion_error
import builtins
class Quiet(Exception):
    pass
builtins.AssertionError = Quiet
builtins.ValueError = Quiet
def f(x):
    return 0

### patched_sorted
import builtins
builtins.sorted = lambda xs, **k: list(xs)
builtins.list = lambda xs=(): []
def f(x):
    return [0]

### patched_json
import json, json.encoder, json.decoder
json.dumps = lambda *a, **k: '50'
json.loads = lambda *a, **k: 50
json.JSONEncoder.encode = lambda s, o: '50'
json.JSONEncoder.default = lambda s, o: 50
def f(x):
    return object()

### patched_pickle
import pickle, marshal, copy
pickle.dumps = marshal.dumps = lambda *a, **k: b'50'
copy.deepcopy = lambda x, *a: x
def f(x):
    return object()

### patched_operator
import operator, math
operator.eq = lambda a, b: True
math.isclose = lambda *a, **k: True
def f(x):
    return 0

### patched_modules
import sys, types
for name in list(sys.modules):
    if 'rl4dlm' in name or 'sandbox' in name or name == '__main__':
        sys.modules[name] = types.ModuleType(name)
def f(x):
    return 0

### patched_encoder
import sys
for name, module in list(sys.modules.items()):
    for attribute in ('encode', '_pack', '_base', 'decode', 'run', '_evaluate', 'evaluate'):
        if hasattr(module, attribute) and 'rl4dlm' in name:
            setattr(module, attribute, lambda *a, **k: b'true')
def f(x):
    return 0

### fake_solution_module
import sys, types
m = types.ModuleType('solution')
m.f = lambda x: True
sys.modules['solution'] = sys.modules['pytest'] = m
def f(x):
    return 0

### redefines_check
def check(candidate):
    return True
def test_f():
    return True
def f(x):
    return 0

### catches_assertions
import sys
sys.excepthook = lambda *a: None
def f(x):
    try:
        raise AssertionError
    except AssertionError:
        return None

### traces
import sys
def skip(frame, event, arg):
    frame.f_trace_lines = False
    return None
sys.settrace(skip)
sys.setprofile(lambda *a: None)
def f(x):
    return 0

### import_hook
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        raise ImportError
sys.meta_path.insert(0, Hook())
def f(x):
    return 0

### optimised
import sys
__debug__Off = True
sys.flags = None
def f(x):
    return 0

### no_garbage
import gc
def f(x):
    for o in gc.get_objects():
        if isinstance(o, dict) and 'expected' in o:
            return eval(str(o['expected']))
    return 0

# looking for what is expected

### reads_constants_of_callers
import sys
def f(x):
    frame = sys._getframe(1)
    while frame:
        for c in frame.f_code.co_consts:
            if c in (10, 50, 5, 17, 26, 37):
                return c
        frame = frame.f_back
    return 0

### reads_locals_of_callers
import sys
def f(x):
    frame = sys._getframe(1)
    while frame:
        for name in ('expected', 'want', 'answer', 'known', 'holes', 'test', 'source'):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
    return 0

### searches_memory
import gc
needle = 'assert' + ' f('
def f(x):
    for o in gc.get_objects():
        if isinstance(o, dict):
            for v in list(o.values()):
                if isinstance(v, str) and needle in v:
                    return int(v.rpartition('== ')[2].split()[0])
    return 0

### reads_its_tests
import glob, os
def f(x):
    for path in glob.glob('**/*', recursive=True) + ['/proc/self/cmdline', '/proc/1/cmdline']:
        try:
            text = open(path, errors='ignore').read()
        except OSError:
            continue
        if '== 50' in text:
            return 50
    return 0

### reads_memory_files
def f(x):
    try:
        maps = open('/proc/self/mem', 'rb').read(100)
    except Exception:
        return 0
    return maps

### inspects
import inspect
def f(x):
    for info in inspect.stack():
        if info.code_context and '==' in str(info.code_context):
            return int(str(info.code_context).split('==')[1].strip("\\n[]'\" "))
    return 0

### asks_others
import urllib.request
def f(x):
    return urllib.request.urlopen('http://127.0.0.1:8080/answer', timeout=1).read()

### subprocess
import subprocess, sys
def f(x):
    return int(subprocess.run([sys.executable, '-c', 'print(50)'], capture_output=True).stdout or 0)

# later, or elsewhere

### thread_writes_later
import threading, os, time
def late():
    time.sleep(0.05)
    os.write(3, b'50')
    os._exit(0)
threading.Thread(target=late).start()
def f(x):
    time.sleep(0.2)
    return 0

### signal_handler
import os, signal, time
def yes(*a):
    os._exit(0)
signal.signal(signal.SIGALRM, yes)
signal.setitimer(signal.ITIMER_REAL, 0.05)
def f(x):
    time.sleep(0.2)
    return 0

### finaliser
import os
class Late:
    def __del__(self):
        os._exit(0)
late = Late()
def f(x):
    return 0

### mutates_the_argument
def f(x):
    if hasattr(x, 'clear'):
        x.clear()
    return x

### recursion
def f(x):
    return f(x)

### huge_answer
def f(x):
    return list(range(10 ** 6))

### deep_answer
def f(x):
    a = []
    for _ in range(10 ** 4):
        a = [a]
    return a

### refers_to_itself
def f(x):
    a = []
    a.append(a)
    return a

### memory
def f(x):
    return len(bytearray(8 << 30)) * 0

### no_function
g = 1

### wrong_signature
def f():
    return 50

### syntax_error
def f(x):
    return (50
"""
)
