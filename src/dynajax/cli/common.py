"""Functions that all commands use: start-up, flag parsing, help, one-line errors, exit statuses."""

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import platform
import select
import shlex
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from dynajax.runtime import distributed
from dynajax.runtime.exit_status import BROKEN_PIPE, USAGE, ended_by
from dynajax.types import UsageError
from dynajax.xla import backend

#: Help of a flag that only the program itself passes, and that `--help` does not list.
INTERNAL = "internal"
#: Programs that compile in fewer seconds are not kept in the cache.
SHORTEST_CACHED = 0.05


def start(process: str | None = None) -> None:
    """Set up JAX for this process. Call it before anything uses JAX, including a user's module.

    Args:
      process: the argument of `distributed.connect`; None for a run of one process.
    """
    if process is None:
        backend.use_cores()
    else:
        distributed.connect(process)
    use_compilation_cache()
    # Tracing makes many objects that stay. Collecting garbage as often as by default, and among the
    # imported modules too, takes a third of the time to trace the programs of a run.
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


def refuse_flags(names: Iterable[str], reason: str) -> None:
    """Refuse flags that have no effect.

    Raises:
      UsageError: one of them is given; the text continues "it has no effect" with the reason.
    """
    for flag in (flags.FLAGS[name] for name in names):
        if flag.present:
            value = flag.value[0] if isinstance(flag.value, list) else flag.value
            shown = f"--{flag.name}" if flag.boolean else f"--{flag.name}={value}"
            raise UsageError(f"{shown}: it has no effect {reason}; leave it out")


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second start takes seconds."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
        # Several machines may share a home folder, and JAX's cache key ignores the processor type.
        name = f"xla-{jax.__version__}-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(caches / "dynajax" / name))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_CACHED)


def _home() -> Path:
    """Return the user's home folder, or the temporary folder if there is none (some containers)."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def _processor() -> str:
    """Return a short name of the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def program_name() -> str:
    """Return how this program was called: "dynajax train", or "python experiments/run.py"."""
    script = Path(sys.argv[0])
    return f"python {script.parent.name}/{script.name}" if script.suffix == ".py" else sys.argv[0]


def command_line() -> str:
    """Return the shell command that started this program."""
    return " ".join([program_name(), *map(shlex.quote, sys.argv[1:])])


def restart_command() -> list[str]:
    """Return the arguments of `subprocess.run` that start this program again."""
    name = sys.argv[0]
    program = [name] if name.endswith(".py") else ["-m", *name.split()]
    return [sys.executable, *program, *sys.argv[1:]]


def help_text(main: Callable[..., Any]) -> str:
    """Return the docstring of a command's module, and a line for each of its flags."""
    module = sys.modules[main.__module__]
    name = module.__name__.rpartition(".")[2]
    lines = [(module.__doc__ or "").strip().replace(f"dynajax {name}", program_name()), ""]
    key_flags = flags.FLAGS.get_key_flags_for_module(module.__name__)
    key_flags = [flag for flag in key_flags if flag.help != INTERNAL]
    for flag in sorted(key_flags, key=lambda f: f.name):
        label = f"[no]{flag.name}" if flag.boolean else flag.name
        lines += textwrap.wrap(
            _flag_help(flag), 100, initial_indent=f"  --{label:<13}", subsequent_indent=" " * 17
        )
    return "\n".join(lines)


def _flag_help(flag: flags.Flag) -> str:
    """Return the help text of a flag with its default."""
    text = str(flag.help).partition(";\n")[0]  # absl appends how to repeat a multi-flag
    default = ",".join(map(str, d)) if isinstance(d := flag.default, list) else d
    nothing = default is None or default is False or default == ""
    return text if nothing else f"{text} (default: {default})"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parse the absl flags and call `main` with the remaining arguments.

    A `UsageError` or a wrong flag prints one line on stderr and exits with status 2.
    """
    # Python has no stream if the file descriptor was closed, as by `>&-`.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not encode every character
    warnings.formatwarning = _format_warning
    # A user's own task is a module in the working directory.
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        fail("the working directory was deleted; change to another one, and run the command again")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        try:
            app.run(
                lambda argv: _call(main, argv), flags_parser=lambda argv: _parse_flags(main, argv)
            )
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        _discard_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard_output()
        place = f"{error.filename}: " if error.filename else "the output or the run's folder: "
        fail(f"{place}{error.strerror}; free some space, and run the command again")


def _discard_output() -> None:
    """Discard what is left to print, so that Python does not report the same error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a warning for the user as one line, without its place in the code."""
    if issubclass(category, UserWarning):
        return f"warning: {' '.join(str(message).split())}\n"
    return _python_format(message, category, filename, lineno, line)


_python_format = warnings.formatwarning


def _parse_flags(main: Callable[..., Any], argv: Sequence[str]) -> list[str]:
    """Parse the flags and return the other arguments; print the help if it is requested."""
    if {"-h", "-help", "--help", "--helpshort"} & set(argv[1:]):
        print(help_text(main))
        sys.exit(0)
    try:
        return flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        hint = _setting_hint(error.flagname) if "set" in flags.FLAGS else ""
        text = str(error).partition(" Did you mean")[0] if hint else str(error)
        fail(text + (hint or " (--help lists the flags)"))
    except flags.Error as error:
        fail(str(error))


def _setting_hint(name: str) -> str:
    """Return how to set the field of this name, if there is one."""
    from dynajax import settings
    from dynajax.agents import AGENTS

    paths = {p for agent in AGENTS for p in settings.all_settings(settings.base(agent))}
    found = sorted(path for path in paths if name in (path, path.rpartition(".")[2]))
    return (
        f" (settings are given as --set {' or --set '.join(f'{p}=VALUE' for p in found)})"
        if found
        else ""
    )


def _call(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int | None:
    """Call `main`, and turn exceptions into an exit status where that helps the user.

    With --verbosity=1 or more, the error that an error line stands for keeps its traceback.
    """
    is_verbose = flags.FLAGS.verbosity > 0
    logging.set_verbosity(logging.ERROR)  # hides messages of libraries about their build
    try:
        return main(argv[1:])
    except UsageError as error:
        hint = ""
        if error.__cause__ is not None and is_verbose:
            traceback.print_exception(error.__cause__)
        elif error.__cause__ is not None:
            hint = " (--verbosity=1 shows the traceback)"
        fail(str(error) + hint)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        distributed.leave(ended_by(signal.SIGINT))
    except Exception:
        if not distributed.is_initialized():
            raise
        traceback.print_exc()
        distributed.leave(1)


def _reader_has_left() -> bool:
    """Return whether the program that reads our output has ended, as `head` does."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def end_at_once(text: str, status: int) -> NoReturn:
    """Print a line and end the process without waiting for programs that still run on a device."""
    # The streams may be closed, or their reader may have ended.
    with contextlib.suppress(OSError, ValueError):
        print(text)
        sys.stdout.flush()
        sys.stderr.flush()
    # `os._exit` skips the exit handlers of multiprocessing, which end what a task leaves running.
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def fail(text: str) -> NoReturn:
    """Print one line on stderr and exit with the status of a usage error."""
    print("error: " + " ".join(text.split()), file=sys.stderr)
    distributed.leave(USAGE)


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not flags.

    Raises:
      UsageError: there is one.
    """
    if arguments:
        raise UsageError(f"{arguments[0]}: flags only, such as --env={arguments[0]}")


def parse_assignments(flag: str, items: Sequence[str]) -> dict[str, str]:
    """Return {"learn.utd": "10"} for ["learn.utd=10"].

    Raises:
      UsageError: an item has no "=", or a field is given twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            example = "learn.discount=0.99,0.97" if flag == "--vary" else "learn.utd=10"
            raise UsageError(f"{flag} {item}: write it as FIELD=VALUE, for example {example}")
        if name.strip() in found:
            raise UsageError(f"{flag} {item}: {name} is given twice")
        found[name.strip()] = value.strip()
    return found
