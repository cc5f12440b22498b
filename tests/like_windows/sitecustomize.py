"""Takes away from a process what Windows lacks, so that the commands can be tried without it on Linux.

Python imports this module at its start if the folder is in PYTHONPATH. Symbolic links are refused, as without the
privilege to create them; nothing forks; there are no signal masks, no SIGHUP, SIGKILL and SIGUSR1, and no /proc; open
files cannot be deleted or replaced, and ``rename`` never replaces a file; names cannot contain <>:"|?*; and text
without an encoding is an error, because Windows would use the code page.

psutil keeps /proc, as it asks the system on Windows.
"""

import builtins
import contextlib
import io
import multiprocessing.context
import os
import signal
import sys
import warnings
from multiprocessing import popen_fork
from pathlib import Path

GENUINE = {"kill": os.kill, "replace": os.replace, "stat": os.stat, "unlink": os.unlink}


def refuse(number, text, *names):
    raise OSError(number, text, *names)


def no_symlink(source, target, *_, **__):
    refuse(1314, "A required privilege is not held by the client", str(target))


def is_of_psutil():
    """Return whether psutil is the caller, which does not need /proc on Windows."""
    frame = sys._getframe(2)
    return "psutil" in frame.f_globals.get("__name__", "")


def no_proc(function):
    def wrapped(path, *arguments, **keywords):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc") and not is_of_psutil():
            refuse(2, "No such file or directory", str(path))
        if isinstance(path, str | os.PathLike) and {*'<>:"|?*'} & {*Path(os.fsdecode(path)).name}:
            refuse(22, "Invalid argument", str(path))
        return function(path, *arguments, **keywords)

    return wrapped


def is_open(path):
    """Return whether this process has a file open."""
    try:
        wanted = GENUINE["stat"](path)
    except OSError:
        return False
    for descriptor in range(256):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), wanted):
                return True
    return False


def unlink(path, *arguments, **keywords):
    if not keywords and is_open(path):
        raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
    GENUINE["unlink"](path, *arguments, **keywords)


def replace(source, target, **keywords):
    if is_open(source) or is_open(target):
        raise PermissionError(13, "Access is denied", str(source), None, str(target))
    GENUINE["replace"](source, target, **keywords)


def rename(source, target, **keywords):
    if os.path.exists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", str(source), None, str(target))
    replace(source, target, **keywords)


def kill(pid, number):
    if not is_of_psutil():
        refuse(87, f"os.kill({pid}, {number}) ends the process or disturbs the whole console", None)
    GENUINE["kill"](pid, number)


def kill_child(process):
    """End a child as Windows does, instead of the method that needs SIGKILL."""
    if process.returncode is None:
        GENUINE["kill"](process.pid, 9)


def hide(module, *names):
    """Hide attributes of a module from the package; libraries look at sys.platform instead."""
    genuine = {name: getattr(module, name) for name in names}

    def find(name):
        if name in genuine and "mnist_lightning" not in sys._getframe(1).f_globals.get("__name__", ""):
            return genuine[name]
        raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")

    for name in names:
        delattr(module, name)
    module.__getattr__ = find


os.symlink = no_symlink
os.stat, os.lstat, os.listdir, os.mkdir = map(no_proc, (os.stat, os.lstat, os.listdir, os.mkdir))
builtins.open = io.open = no_proc(io.open)
os.unlink = os.remove = unlink
os.replace, os.rename = replace, rename
os.kill = kill
popen_fork.Popen.kill = popen_fork.Popen.terminate = kill_child
multiprocessing.context.DefaultContext.get_all_start_methods = lambda self: ["spawn"]
hide(os, "fork", "forkpty", "killpg", "geteuid", "getuid", "sched_getaffinity")
hide(signal, "pthread_sigmask", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "setitimer")
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module="mnist_lightning")
