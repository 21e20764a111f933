"""What the commands share: one-line faults, exit statuses, help, the compile cache."""

import io
import os
import platform
import select
import shlex
import sys
import tempfile
import textwrap
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from dynajax.runtime import distributed
from dynajax.runtime.exit_status import INTERRUPTED, UNREAD, USAGE
from dynajax.types import UsageError
from dynajax.xla import backend


def start(process: str | None = None) -> None:
    """Sets JAX up for this process; before anything else may use it, a user's module included.

    Args:
      process: see `processes.connect`; None for a run of one process.
    """
    if process is None:
        backend.use_cores()
    else:
        distributed.connect(process)
    use_compilation_cache()


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, so that a second start takes seconds."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
        # A home may be shared by machines, and JAX's own key does not tell processors apart.
        name = f"xla-{jax.__version__}-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(caches / "dynajax" / name))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _home() -> Path:
    """The user's home, or where there is none, as in some containers, the temporary folder."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def _processor() -> str:
    """A short name of the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def called() -> str:
    """How this program was called: "dynajax train", or "python experiments/run.py"."""
    script = Path(sys.argv[0])
    return f"python {script.parent.name}/{script.name}" if script.suffix == ".py" else sys.argv[0]


def command() -> str:
    """What to type to call it again."""
    return " ".join([called(), *map(shlex.quote, sys.argv[1:])])


def again() -> list[str]:
    """The words that call it again from a program."""
    name = sys.argv[0]
    words = [name] if name.endswith(".py") else ["-m", *name.split()]
    return [sys.executable, *words, *sys.argv[1:]]


def help_text(main: Callable[..., Any]) -> str:
    """The docstring of a command's module, and a line for each of its key flags with its default."""
    module = sys.modules[main.__module__]
    name = module.__name__.rpartition(".")[2]
    lines = [(module.__doc__ or "").strip().replace(f"dynajax {name}", called()), ""]
    key_flags = flags.FLAGS.get_key_flags_for_module(module.__name__)
    for flag in sorted(key_flags, key=lambda f: f.name):
        lines += textwrap.wrap(
            _about(flag), 100, initial_indent=f"  --{_form(flag):<13}", subsequent_indent=" " * 17
        )
    return "\n".join(lines)


def _form(flag: flags.Flag) -> str:
    return f"[no]{flag.name}" if flag.boolean else flag.name


def _about(flag: flags.Flag) -> str:
    text = str(flag.help).partition(";\n")[0]  # absl says of a list how to repeat it
    default = ",".join(map(str, d)) if isinstance(d := flag.default, list) else d
    nothing = default is None or default is False or default == ""
    return text if nothing else f"{text} (default: {default})"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parses absl flags and runs `main` with the arguments left over.

    A `UsageError` or a wrong flag ends in one line on stderr and exit status 2.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        if {"-h", "-help", "--help", "--helpshort"} & set(argv[1:]):
            print(help_text(main))
            sys.exit(0)
        try:
            return flags.FLAGS(list(argv))
        except flags.Error as error:
            fail(str(error))

    def guarded(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.ERROR)  # libraries' remarks on how they are built
        try:
            return main(argv[1:])
        except UsageError as error:
            fail(str(error))
        except KeyboardInterrupt:
            distributed.leave(INTERRUPTED)
        except Exception:
            if not distributed.is_initialized():
                raise
            traceback.print_exc()
            distributed.leave(1)

    # What is printed survives any encoding.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # A user's own task lives beside where the command is typed.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        try:
            app.run(guarded, flags_parser=parse)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        # Or Python would say so again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def _unread() -> bool:
    """Whether who read our output has left, as `head` does."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def folder(text: str) -> Path:
    """A path from a flag; ~ is the user's home."""
    return Path(os.path.expanduser(text))


def fail(text: str) -> NoReturn:
    """Ends the program with one line on stderr."""
    print("error: " + " ".join(text.split()), file=sys.stderr)
    distributed.leave(USAGE)


def assignments(flag: str, items: Sequence[str]) -> dict[str, str]:
    """{"learn.utd": "10"} from ["learn.utd=10"].

    Raises:
      UsageError: an item without "=", or a field given twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{flag} {item}: write it as FIELD=VALUE, for example learn.utd=10")
        if name.strip() in found:
            raise UsageError(f"{flag} {item}: {name} is given twice")
        found[name.strip()] = value.strip()
    return found
