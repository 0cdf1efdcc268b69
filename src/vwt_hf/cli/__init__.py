"""The command `vwt-hf`. Each verb is a file with its help (`HELP`, `DESCRIPTION`, `EXAMPLES`), `add_arguments`, which
adds its arguments to a parser, and `work`, which does what they ask for.

A verb imports what needs torch when it runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ..shared_changes import SharedChange
from ..terminal import run_command
from . import calibrate, demo, embed, evaluate, learn, show, vocab

VERBS = (demo, learn, vocab, show, calibrate, evaluate, embed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vwt-hf`.

    Args:
        argv: the arguments; by default the process's own.

    Returns:
        The exit status: 0; 2 after an error, of which one line on stderr says why; 130 after Ctrl-C; 141 if the output
        was closed.
    """
    args = argparse.Namespace(prog="vwt-hf")
    status = run_command(args.prog, lambda: _parser().parse_args(argv, args))
    return status or run_command(args.prog, lambda: _work(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vwt-hf",
        description="Shortens the patch sequence of a Hugging Face vision transformer, without training.",
        epilog="`vwt-hf VERB --help` tells what a verb does, its options and examples.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb_parser = verbs.add_parser(
            verb.__name__.rpartition(".")[2],
            help=verb.HELP,
            description=verb.DESCRIPTION,
            epilog=verb.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(verb_parser)
        verb_parser.set_defaults(work=verb.work, prog=verb_parser.prog)
    return parser


def _work(args: argparse.Namespace) -> None:
    with _registered():
        args.work(args)


def _register() -> Callable[[], None]:
    """Registers with transformers, if that was not done, and returns what undoes it.

    A process that is the command has not done it, so that help comes at once.
    """
    from transformers import PreTrainedConfig

    from ..auto import register, unregister

    if hasattr(PreTrainedConfig, "vwt"):
        return lambda: None
    register()
    return unregister


_registered = SharedChange(_register)
