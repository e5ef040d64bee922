"""``qdq plan``."""

import argparse
import json
from pathlib import Path
from typing import Any

from qdq.cli.options import add_command, add_common, add_scheme, scheme_of
from qdq.modelio import load
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.report.text import plan_facts, plan_text
from qdq.targets import TARGETS

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "plan",
        "show what would be integer and what would stay float, and why",
        "Show which nodes of a float ONNX model would run on integers, which would stay float, and "
        "why. Needs no data; with data, the noise of each rounding is weighed too, so that the "
        "plan may differ. PATTERN is a regular expression that must match the whole name.",
        (
            "qdq plan model.onnx",
            "qdq plan model.onnx --skip '/head/.*' --json > plan.json",
        ),
    )
    command.add_argument("model", type=Path, metavar="IN", help="the float model")
    add_scheme(command)
    add_common(command)
    command.set_defaults(action=_plan)


def _plan(args: argparse.Namespace) -> None:
    source = load(args.model, lazy=True)
    plan = make_plan(prepare(source), scheme_of(args), TARGETS[args.target], source=source)
    print(json.dumps(plan_facts(plan), indent=1) if args.json else plan_text(plan))
