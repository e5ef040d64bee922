"""Options that commands share, and how their values are read."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from qdq.scheme import Rule, Scheme
from qdq.spec import INT8, INT16, UINT8, UINT16, QuantSpec
from qdq.targets import TARGETS

__all__ = [
    "add_command",
    "add_common",
    "add_scheme",
    "count",
    "count_or_none",
    "scheme_of",
]

ACTIVATION_TYPES = {t.name: t for t in (UINT8, INT8, UINT16, INT16)}
WEIGHT_TYPES = {t.name: t for t in (INT8, UINT8)}
# A list after one option would swallow the positional arguments: the option is repeated instead.
_MANY: dict[str, Any] = {"action": "append", "default": [], "metavar": "PATTERN"}


def add_command(
    commands: Any, name: str, summary: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A subcommand whose help ends with examples."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {e}" for e in examples),
        formatter_class=_Help,
    )
    return command


class _Help(argparse.HelpFormatter):
    """Keeps the lines of a text that has some, such as examples; fills the others."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_common(command: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_scheme(command: argparse.ArgumentParser) -> None:
    """Target, types and what stays float."""
    add = command.add_argument
    add("--target", choices=TARGETS, default="ort-cpu", help="the runtime; default: ort-cpu")
    add("--activation-type", choices=ACTIVATION_TYPES, default="uint8", help="default: uint8")
    add("--weight-type", choices=WEIGHT_TYPES, default="int8", help="default: int8")
    add("--per-tensor", action="store_true", help="one scale per weight, not one per channel")
    add("--no-smooth", action="store_true", help="leave outlier channels where they are")
    add("--no-equalize", action="store_true", help="leave quiet channels as small as they are")
    add("--skip", type=_pattern, help="leave nodes of this name float", **_MANY)
    add("--skip-op", help="leave nodes of this operator type float", **{**_MANY, "metavar": "OP"})
    add(
        "--skip-tensor",
        type=_pattern,
        help="leave float what reads or writes tensors of this name",
        **_MANY,
    )
    add("--only", type=_pattern, help="leave float all nodes but those of this name", **_MANY)


def scheme_of(args: argparse.Namespace) -> Scheme:
    """The scheme that the options of ``add_scheme`` ask for."""
    weight = WEIGHT_TYPES[args.weight_type]
    rules = [Rule(nodes=p, keep_float=True) for p in args.skip]
    rules += [Rule(op_types=(op,), keep_float=True) for op in args.skip_op]
    rules += [Rule(tensors=p, keep_float=True) for p in args.skip_tensor]
    rules += [Rule(nodes=p, only=True) for p in args.only]
    return Scheme(
        activation=QuantSpec(dtype=ACTIVATION_TYPES[args.activation_type]),
        weight=QuantSpec(dtype=weight, symmetric=weight.signed),
        per_channel=not args.per_tensor,
        smooth=not args.no_smooth,
        equalize=not args.no_equalize,
        rules=tuple(rules),
    )


def count(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"wants a whole number from {least} up; found '{text}'")
    return int(text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {e}") from e
    return text
