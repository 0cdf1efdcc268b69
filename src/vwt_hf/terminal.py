"""How commands and scripts print and fail: safe text, tables, and one line in place of a traceback.

Nothing here imports torch, so that help comes at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks import require_whole
from .printable import printable, shown
from .whole_saves import stream_into

PLAIN = {"→": "->", "×": "x", "−": "-", "·": "*", "≤": "<=", "≥": ">=", "Δ": "delta", "…": "..."}
"""What is printed for a character that the output's encoding lacks; for any other, its code."""


def run_command(prog: str, work: Callable[[], object]) -> int:
    """Does `work` for a terminal: any error is one line on stderr that begins with `prog`, never a traceback.

    Returns:
        The exit status: 0; 2 after an error; 130 after an interrupt; 141 if the output was closed.

    Raises:
        SystemExit: `work` did, as argparse does after help.
    """
    with _forgiving(sys.stdout), _forgiving(sys.stderr), warnings.catch_warnings():
        # Without the line of code that `warnings` shows, which is of no use on a terminal.
        warnings.showwarning = lambda message, *where: _print_line(prog, f"warning: {message}")
        # Of other packages' code, which Python compiles when it first imports them.
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            try:
                work()
            finally:
                # Here a closed output is noticed, and not while Python ends.
                print(end="", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
            return 141
        except SystemExit as end:
            if not isinstance(end.code, str):
                raise
            _print_line(prog, end.code)
            return 2
        except (Exception, KeyboardInterrupt) as error:  # libraries raise nearly anything for bad input
            if _was_interrupted(error):
                _print_line(prog, "interrupted")
                return 130
            expected = isinstance(error, (ImportError, OSError, ValueError)) and str(error)
            _print_line(prog, str(error) if expected else f"{type(error).__name__}: {error}")
            return 2
    return 0


def require_alone() -> None:
    """Refuses to be one of several processes that a launcher started, for commands that do not share their work.

    Raises:
        ValueError: there are several. Each would do all work, slow the others down, and write the same files.
    """
    number = os.environ.get("WORLD_SIZE", "")
    # A cluster may set WORLD_SIZE for every shell of a job; launchers set LOCAL_RANK, too.
    if number.isdigit() and int(number) > 1 and "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"this was started in {number} processes (WORLD_SIZE), each of which would do the whole work; expected "
            "one. Start it without a launcher such as `accelerate launch`."
        )


def do_all(*steps: Callable[[], object]) -> None:
    """Does each step, also after one has failed, and raises the first error; later ones are warnings."""
    errors: list[BaseException] = []
    for step in steps:
        try:
            step()
        except (Exception, KeyboardInterrupt) as error:
            errors.append(error)
    for later in errors[1:]:
        if not isinstance(later, (BrokenPipeError, KeyboardInterrupt)):
            warnings.warn(str(later), stacklevel=2)
    if errors:
        raise errors[0]


def _was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C caused an error: while transformers is imported, it hides the interrupt in an error of its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


@contextlib.contextmanager
def _forgiving(stream: Any) -> Iterator[None]:
    """Has `stream` replace characters that its encoding lacks, instead of raising."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="vwt_hf")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lacking), error.end


codecs.register_error("vwt_hf", _in_plain)


def _print_line(prog: str, message: object) -> None:
    # Some of transformers' messages run over many lines.
    print(f"{prog}: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Rows as text, each column as wide as its longest cell; with `right`, cells are aligned at their ends."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = str.rjust if right else str.ljust
    return "\n".join("   ".join(map(pad, row, widths)).rstrip() for row in cells)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the columns in which some row has a value, with n/a where a row has none."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]

    def line(cells: Iterator[Any]) -> str:
        return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |\n"

    below = (line("n/a" if row[name] is None else row[name] for name in columns) for row in rows)
    return line(iter(columns)) + "|" + "---|" * len(columns) + "\n" + "".join(below)


def options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of options, for a function with arguments of the same names."""
    return {name: getattr(args, name) for name in names}


def require_whole_options(args: argparse.Namespace, *names: str) -> None:
    """Raises `ValueError` unless these options are `None`, whole numbers of at least 1, or lists of them."""
    for name, value in options(args, *names).items():
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                require_whole(f"--{name.replace('_', '-')}", number)


def vwt_option(text: str) -> Any:
    """The type of the option `--vwt`: a setting as JSON."""
    wanted = 'expected true, false, or fields, as \'{"method": "local", "keep_ratio": 0.7}\'; a vocabulary stands '
    wanted += "in quotes, as '\"me/my-words\"'"
    try:
        setting = json.loads(text)
    except (ValueError, RecursionError):
        more = ""
        if text.isidentifier() and text not in ("True", "False", "None"):
            more = f', and a method as \'{{"method": "{text}"}}\', if it is one'
        elif text.startswith(("'", "{")) and '"' not in text:
            more = ". It holds no double quotes, which shells of Windows take out: write "
            more += r""""{\"keep_ratio\": 0.5}" in cmd.exe, and '{\"keep_ratio\": 0.5}' in PowerShell before 7.3"""
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON; {wanted}{more}") from None
    if setting is not None and not isinstance(setting, (bool, dict, str)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no setting; {wanted}")
    return setting


def add_picture(parser: argparse.ArgumentParser, kind: str, usual: str) -> None:
    """Adds the option `--output` for a picture of some `kind`, which goes to the file `usual` if none is named."""
    told = f"for the {kind} (default: {usual})"
    parser.add_argument("--output", type=png_file, default=usual, metavar="FILE.png", help=told)


def png_file(text: str) -> str:
    """The type of an option that names a picture, which is a PNG whatever its name."""
    if Path(text).suffix.lower() not in ("", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is to be a PNG picture; expected a name that ends in .png")
    _require_kind(text, "PNG picture", b"\x89PNG")
    return text


def json_file(text: str) -> Path:
    """The type of an option that names a file for JSON."""
    _require_kind(text, "file of JSON", b"{", b"[")
    return Path(text)


def _require_kind(text: str, kind: str, *begins: bytes) -> None:
    """Refuses a file to be written that would take the place of one of another kind, which is most likely a slip."""
    file = Path(text)
    if not file.is_file() or stream_into(file):
        return
    with contextlib.suppress(OSError), file.open("rb") as opened:  # whether it can be written is seen later
        content = opened.read(1000).lstrip()
        if content and not content.startswith(begins):
            raise argparse.ArgumentTypeError(
                f"{text!r} is there and is no {kind}, and would be replaced by one; name another file, or delete it"
            )
