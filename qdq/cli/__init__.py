"""The command line: ``qdq quantize``, ``calibrate``, ``plan``, ``compare``, ``demo``.

With the demo the only code that prints. Exit status: 0 done, 1 failed (one line on stderr), 2
wrong usage, 130 interrupted.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qdq.cli import calibrate, compare, plan, quantize
from qdq.cli.options import add_command, add_common
from qdq.demo import main as demo
from qdq.errors import QdqError
from qdq.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; wrong usage raises SystemExit(2)."""
    args = _parser().parse_args(argv)
    try:
        with _warnings(), _any_letters():
            args.action(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe shows here, not at exit
    except KeyboardInterrupt:
        print("\nqdq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe is gone. Python flushes stdout once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if args.debug:
            raise
        print(f"qdq: error: {_reason(e)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _any_letters() -> Iterator[None]:
    """Let names be printed for which the terminal has no letters."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


@contextmanager
def _warnings() -> Iterator[None]:
    """Show on standard error what the library warns of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("qdq: warning: %(message)s"))
    logger = logging.getLogger("qdq")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _reason(error: Exception) -> str:
    """The error as one line; what qdq did not foresee is said to be its fault."""
    text = " ".join(str(error).split())
    if isinstance(error, QdqError | OSError):
        return text
    return (
        f"unforeseen {type(error).__name__}: {text}. This is a fault in qdq; please report it "
        "with the output of --debug"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qdq",
        description="Post-training QDQ quantizer for ONNX models.",
        epilog="qdq COMMAND --help shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"qdq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    quantize.add(commands)
    calibrate.add(commands)
    plan.add(commands)
    compare.add(commands)
    command = add_command(
        commands,
        "demo",
        "quantize a small digit classifier and compare it with its float model",
        "Quantize the digit classifier that comes with qdq, on its own data, and compare accuracy, "
        "size and speed with the float model. Works offline, in seconds.",
        ("qdq demo", "qdq demo --out /tmp --json"),
    )
    command.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where to write digits.int8.onnx"
    )
    add_common(command)
    command.set_defaults(action=lambda args: demo(args.out, as_json=args.json))
    return parser
