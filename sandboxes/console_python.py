"""The Python of a console: it runs one call after the other in the same ``__main__``, and echoes a last expression.

Sent to the sandbox as text, so it imports only the standard library. Code of the calls lives in this process and may
rebind whatever it finds. So what the loop needs is held apart: functions written in C, and builtins of its own.

Each call runs in a fork of the process that has the state. Where the call ends well, the fork has the state from then
on; where it is killed, the state from before it is still there. A process with threads cannot be forked: its calls run
in itself.
"""

import builtins

globals()["__builtins__"] = dict(vars(builtins))  # what the functions below find, whatever becomes of the module

import _ast  # noqa: E402
import _signal  # type: ignore[import-not-found]  # noqa: E402
import io  # noqa: E402
import linecache  # noqa: E402
import posix  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
import types  # noqa: E402
import warnings  # noqa: E402
from typing import Any  # noqa: E402

REQUESTS, REPORTS = 3, 4

fork, waitpid, exitcode, leave, getpid = (
    posix.fork,
    posix.waitpid,
    posix.waitstatus_to_exitcode,
    posix._exit,
    posix.getpid,
)
read, write, listdir, open_file, close_file = posix.read, posix.write, posix.listdir, posix.open, posix.close
NEW_FILE = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL
handle, mask, alarm, setitimer = _signal.signal, _signal.pthread_sigmask, _signal.alarm, _signal.setitimer
SIGINT, IGNORE, RAISE, SET_MASK = _signal.SIGINT, _signal.SIG_IGN, _signal.default_int_handler, _signal.SIG_SETMASK
TIMERS = (_signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF)
Expr, Expression, ONLY_AST = _ast.Expr, _ast.Expression, _ast.PyCF_ONLY_AST
display, excepthook, print_exception = sys.__displayhook__, sys.__excepthook__, traceback.print_exception
modules, lines, streams, Buffer = sys.modules, linecache.cache, (sys.stdout, sys.stderr), io.BytesIO
scope: dict[str, Any] = {}
folder = posix.getcwd()


def exactly(size: int) -> bytes:
    """Read ``size`` bytes of a request, or end where there are none."""
    data = b""
    while len(data) < size:
        more = read(REQUESTS, size - len(data))
        if not more:
            leave(0)
        data += more
    return data


def report(text: str) -> None:
    write(REPORTS, text.encode())


def rest() -> None:
    """Undo what a call set up that would come between the calls."""
    handle(SIGINT, IGNORE)
    alarm(0)
    for timer in TIMERS:
        setitimer(timer, 0)


def loop() -> None:
    """Run the calls that come, until there are no more."""
    handle(SIGINT, IGNORE)
    while True:
        ident = int.from_bytes(exactly(4), "big")
        code = exactly(int.from_bytes(exactly(4), "big")).decode()
        runner = 0
        try:
            if len(listdir("/proc/self/task")) == 1:
                runner = fork()
        except OSError:  # no place for another process: it runs here
            pass
        if runner:
            report(f"fell {ident} {fate(runner)}")
        else:
            report(f"done {ident} {call(ident, code)}")


def fate(runner: int) -> int:
    """Wait for the end of a runner that does not go on as the holder: then this process is ended first."""
    while True:
        try:
            return exitcode(waitpid(runner, 0)[1])
        except InterruptedError:
            pass
        except ChildProcessError:
            return 1


def call(ident: int, code: str) -> int:
    """Run one call, and return 0 or 1. An interrupt ends it, and meets nothing else."""
    own, failed = getpid(), 1
    try:
        try:
            mask(SET_MASK, ())
            report(f"run {ident}")
            handle(SIGINT, RAISE)
            failed = run(ident, code)
        finally:
            rest()
    except BaseException as error:  # noqa: BLE001  the outermost frame of hostile code
        rest()
        say(error)
    flush()
    if getpid() != own:  # the call forked, and this is the other process
        leave(0)
    return failed


def run(ident: int, code: str) -> int:
    name = f"<call {ident}>"
    lines[name] = (len(code), None, code.splitlines(True), name)
    try:
        tree: Any = compile(code, name, "exec", ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], Expr) else None
        program = compile(tree, name, "exec", dont_inherit=True)
        value = compile(Expression(last.value), name, "eval", dont_inherit=True) if last else None
        shown, failed = None, 0
        try:
            exec(program, scope)
            if value is not None:
                shown = eval(value, scope)
                show(shown)
        except Exception as error:  # noqa: BLE001  what hostile code drew before is shown too, and not once more
            say(error)
            failed = 1
        pictures(shown)
    except SystemExit as error:
        if error.code not in (None, 0):
            say(error)
            return 1
    except BaseException as error:  # noqa: BLE001  the outermost frame of hostile code
        say(error)
        return 1
    return failed


def say(error: BaseException) -> None:
    """Print a traceback without the frames of this loop."""
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals is globals():
            trace = trace.tb_next
        error.__traceback__ = trace
        try:
            print_exception(type(error), error, trace)
        except BaseException:  # noqa: BLE001  it may have broken what prints
            excepthook(type(error), error, trace)
    except BaseException:  # noqa: BLE001  it may have broken what prints
        try:  # noqa: SIM105  contextlib may be broken too
            write(2, f"{type(error).__name__}\n".encode())
        except BaseException:  # noqa: BLE001  it may have broken what prints
            pass


def flush() -> None:
    stream: Any
    for stream in (sys.__dict__.get("stdout"), sys.__dict__.get("stderr"), *streams):
        try:  # noqa: SIM105  contextlib may be broken too
            stream.flush()
        except BaseException:  # noqa: BLE001  it may have broken what prints
            pass


def show(value: object) -> None:
    """Echo a value, and save it where it is a picture."""
    display(value)
    png = getattr(type(value), "_repr_png_", None)
    data = png(value) if png else None
    if isinstance(data, bytes):
        save(data)


def pictures(shown: object) -> None:
    """Save the figures that a call has open, and one that it shows, and close them."""
    module: Any = modules.get("matplotlib.figure")
    pyplot: Any = modules.get("matplotlib.pyplot")
    if module is None:
        return
    try:
        figures = [pyplot.figure(number) for number in pyplot.get_fignums()] if pyplot is not None else []
        if isinstance(shown, module.Figure) and not [one for one in figures if one is shown]:
            figures.append(shown)
        for figure in figures:
            sink = Buffer()
            figure.savefig(sink, format="png")
            save(sink.getvalue())
    finally:  # one that cannot be saved would fail every later call
        if pyplot is not None:
            pyplot.close("all")


def save(data: bytes) -> None:
    number = 1
    while True:
        path = f"{folder}/picture-{number}.png"
        try:
            target = open_file(path, NEW_FILE, 0o644)
            break
        except FileExistsError:
            number += 1
    while data:
        data = data[write(target, data) :]
    close_file(target)
    print(f"[picture: {path}]")


def main() -> None:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    global scope
    scope = module.__dict__
    modules["__main__"] = module
    sys.argv = [""]
    sys.path.insert(0, folder)
    warnings.filterwarnings("ignore", ".*non-interactive.*cannot be shown")
    loop()


if __name__ == "__main__":
    main()
