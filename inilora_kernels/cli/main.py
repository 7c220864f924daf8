"""The command line: `inilora`. A command is imported when it is used, since torch alone takes seconds."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
import warnings
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from ..display.names import printable
from ..errors import InitializationError, ProcessError, is_out_of_files, is_out_of_memory
from ..suggestions import did_you_mean
from ..version import __version__

# Seconds for which Ctrl-C does nothing once it was pressed.
_PATIENCE = 2.0

# Each command: its module, its name there, and the first line of its help, so that listing them imports nothing.
COMMANDS = {
    "approximate": ("approximate", "approximate", "Factorize a model's weights and write the factor file."),
    "inspect": ("inspect", "inspect", "Show what is in a factor file, how good it is, and the singular spectrum."),
    "methods": ("methods", "methods", "List the initializations that --method takes, with their formula and source."),
    "plan": ("plan", "plan", "Predict what a run would take, by each solver, on this machine or a GPU."),
    "export": ("adapters", "export", "Write factors as folders that a trainer reads."),
    "convert": ("adapters", "convert", "Make a plain LoRA for the original model of a trained adapter."),
    "merge": ("adapters", "merge", "Write the original model with a trained adapter merged into it."),
    "cache": ("cache", "cache_application", "Look at, check and remove the finished matrices that runs reuse."),
}


class Commands(TyperGroup):
    """The group of all commands, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            if near := did_you_mean(cmd_name, COMMANDS):
                ctx.fail(f"No such command '{cmd_name}'{near}")
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        found = getattr(import_module(f"{__package__}.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(cmd_name)(found)
            found = alone
        return typer.main.get_command(found)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


application = typer.Typer(
    name="inilora",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LoRA factors that start from the pretrained weights: B·A ≈ W, with a certificate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Lossy(io.FileIO):
    """A stream that loses what a full disk or a closed pipe does not take: a message must not end a run."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"inilora {__version__}")
        raise typer.Exit


@application.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # The library's own are UserWarnings; other packages' deprecations do not concern users of a command.
    if category is UserWarning:
        _tell(f"warning: {message}")


def _tell(text: str) -> None:
    lines = (printable(line) for line in text.split("\n"))
    print(f"inilora: {chr(10).join(lines)}", file=sys.stderr)


def stop_once() -> None:
    """Ctrl-C raises KeyboardInterrupt once. Pressed again it must not cut the cleanup short; after that it ends all.

    A second KeyboardInterrupt could come between two lines that release what another thread waits for.
    """
    first: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise KeyboardInterrupt
        if time.monotonic() - first[0] > _PATIENCE:
            os._exit(128 + number)

    # Where Ctrl-C is ignored, as in a shell's background job, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def main() -> None:
    """Run the command line; print one clear line for a warning, and one, with status 2, for whatever is refused."""
    warnings.showwarning = _show_warning
    stop_once()
    for stream in (sys.stdout, sys.stderr):
        # A terminal without σ shows ? instead; that must not cost a result.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = io.TextIOWrapper(
            _Lossy(sys.stderr.fileno(), "w", closefd=False), sys.stderr.encoding, "replace", write_through=True
        )
    try:
        try:
            application()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as ended:
        # typer makes an exit of Ctrl-C, and says nothing.
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
            print("inilora: stopped", file=sys.stderr)
        raise
    except OSError as error:
        # What is read and written raises errors of ours; this one may be of what is printed, to a full disk, say.
        reason = f"cannot write to the standard output: {error.strerror}" if _cannot_print() else _foreseen(error)
        if reason is None:
            raise
        _tell(reason)
        sys.exit(2)
    except ProcessError:
        # The process that failed has said why.
        sys.exit(2)
    except InitializationError as error:
        _tell(str(error))
        sys.exit(2)
    except Exception as error:
        reason = _foreseen(error)
        if reason is None:
            raise
        _tell(reason)
        sys.exit(2)


def _foreseen(error: Exception) -> str | None:
    """What to say of another's error: no memory, no more open files, no peft, or a package that does not start."""
    if is_out_of_memory(error):
        return "out of memory, nothing was written; free some, raise its limit, or lower --concurrency"
    if is_out_of_files(error):
        return "too many open files, nothing was written; raise the limit with `ulimit -n`"
    if isinstance(error, ModuleNotFoundError) and error.name == "peft":
        return "this command needs peft: pip install 'inilora-kernels[peft]'"
    # HF_HUB_DOWNLOAD_TIMEOUT=abc, say, is a ValueError of the import.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    bodies = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    package = bodies[-1].partition(".")[0] if bodies else ""
    if package in ("", "__main__", __name__.partition(".")[0]):
        return None
    reason = " ".join(str(error).split())[:300]
    return f"{package} cannot be imported ({reason}); check its installation, and the environment variables it reads"


def _cannot_print() -> bool:
    """Whether the standard output takes no more; then Python shall not try it again on leaving."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
