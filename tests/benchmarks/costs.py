"""Measures what kernels cost in float and in int8, for ``qdq/placement/cost_table.py``.

    python tests/benchmarks/costs.py measure rows.json [group ...]
    python tests/benchmarks/costs.py fit rows.json
    python tests/benchmarks/costs.py check rows.json

``measure`` into a file that has the group already keeps the better of each two numbers; measure
on an idle machine, or twice. ``fit`` prints coefficients for convolutions; those of elementwise
kernels, Gemm and MatMul are read off the rows. ``check`` prints predicted over measured.

Two ways of measuring:

* *chain*: models with 2 and 6 copies of a unit in a row, wall clock, minimum of many runs; the
  slope is the unit's cost without the borders and the call. Float and int8 runs alternate.
* *profile*: one unit between borders, kernel times of onnxruntime's profiler, for what cannot be
  chained (strides, float outputs) and for the borders themselves.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from rows import GROUPS

from qdq.placement.costs import RAGGED, Features, conv_kind, float_cost, in_blocks, int8_cost


def merge(old, new):
    """The better of two measurements of the same rows."""
    for key in ("float", "int8", "float_out", "mixed", "one"):
        a, b = old.get(key), new.get(key)
        if isinstance(a, float) and isinstance(b, float):
            new[key] = min(a, b)
        elif isinstance(a, list) and b and [x[0] for x in a] == [x[0] for x in b]:
            new[key] = [(x[0], x[1], min(x[2], y[2])) for x, y in zip(a, b, strict=True)]
    return new


def measure(path, groups):
    """Measures the groups; a second measurement into the same file keeps the better numbers."""
    file = Path(path)
    rows = json.loads(file.read_text()) if file.exists() else {}
    for group in groups or GROUPS:
        found = list(GROUPS[group]())
        old = rows.get(group, [])
        if len(old) == len(found):
            found = [merge(a, b) for a, b in zip(old, found, strict=True)]
        rows[group] = found
        file.write_text(json.dumps(rows))


BLOCK = 16
TERMS = {
    ("Conv.dense", "float"): ("mac", "output", "weight"),
    ("Conv.dense", "int8"): ("mac", "window", "output", "weight"),
    ("Conv.narrow", "float"): ("mac", "output"),
    ("Conv.narrow", "int8"): ("mac", "row", "output"),
    ("Conv.pointwise", "float"): ("mac", "output", "weight"),
    ("Conv.pointwise", "int8"): ("mac", "output", "weight"),
    ("Conv.depthwise", "float"): ("mac", "output"),
    ("Conv.pointwise.few", "int8"): ("mac", "output", "position"),
    ("Conv.depthwise", "int8"): ("mac", "window", "output"),
    ("Conv.depthwise.tap", "int8"): ("mac", "output", "position"),
}


def features_of(part):
    f = Features(
        inputs=part["in"],
        outputs=part["out"],
        channels_in=part["cin"],
        channels_out=part["cout"],
        taps=part["taps"],
        rows=round(part["taps"] ** 0.5),
        groups=part["group"],
        weights=part["cin"] // part["group"] * part["cout"] * part["taps"],
    )
    kind = conv_kind(
        channels_in=f.channels_in, channels_out=f.channels_out, groups=f.groups, taps=f.taps
    )
    return kind, f


def terms_of(part, key):
    kind, f = features_of(part)
    macs = f.macs
    if f.groups == 1:
        macs = in_blocks(macs, f.channels_out)
        if key == "float" and f.channels_in > 4:
            macs = in_blocks(macs, f.channels_in)
    elif kind.startswith("Conv.depthwise") and key == "int8" and f.channels_in % BLOCK:
        macs *= RAGGED
    elif kind.startswith("Conv.depthwise") and key == "float":
        macs = in_blocks(macs, f.groups)
    windows = f.outputs / f.channels_out * f.taps
    rows = f.outputs / f.channels_out * f.rows
    return {
        "mac": macs,
        "window": windows,
        "row": rows,
        "output": f.outputs,
        "weight": f.weights,
        "position": f.outputs / f.channels_out,
    }


def non_negative(terms, goal):
    """Least relative deviations with non-negative coefficients, over all subsets of the columns."""
    terms, weight = terms / goal[:, None], np.ones(len(goal))
    for _ in range(6):
        found = []
        for r in range(1, terms.shape[1] + 1):
            for sub in itertools.combinations(range(terms.shape[1]), r):
                x, *_ = np.linalg.lstsq(terms[:, sub] * weight[:, None], weight, rcond=None)
                if (x >= 0).all():
                    error = np.sum((weight * (terms[:, sub] @ x - 1)) ** 2)
                    found.append((error + 1e-4 * r, sub, x))
        _, sub, x = min(found, key=lambda t: t[0])
        out = np.zeros(terms.shape[1])
        out[list(sub)] = x
        weight = 1 / np.sqrt(np.maximum(np.abs(terms @ out - 1), 0.05))
    return out


def convolutions(path):
    rows = json.loads(Path(path).read_text())
    return rows.get("small", []) + rows.get("conv", [])


def fit(path):
    rows = convolutions(path)
    for (kind, key), names in TERMS.items():
        chosen = [r for r in rows if {features_of(p)[0] for p in r["parts"]} == {kind}]
        goal = np.array([r[key] / len(r["parts"]) for r in chosen])
        table = np.array(
            [[np.mean([terms_of(p, key)[n] for p in r["parts"]]) for n in names] for r in chosen]
        )
        best = None
        for fixed, serial in itertools.product((300, 500, 800, 1200), (0, 1000, 2000, 4000, 8000)):
            rest = goal - fixed
            work = np.where(rest < 2 * serial, rest / 2, rest - serial)
            ok = work > 50
            if ok.sum() < len(names):
                continue
            x = non_negative(table[ok], work[ok])
            guess = fixed + table @ x + np.minimum(table @ x, serial)
            error = np.mean(np.abs(np.log(guess / goal)))
            if best is None or error < best[0]:
                best = (error, fixed, serial, dict(zip(names, x.round(4).tolist(), strict=True)))
        if best is None:
            print(kind, key, "too few rows")
        else:
            error, fixed, serial, x = best
            print(kind, key, f"mean deviation {error:.2f}, fixed {fixed}, serial {serial},", x)


def check(path):
    for r in convolutions(path):
        pairs = [features_of(p) for p in r["parts"]]
        f = sum(float_cost(*p) for p in pairs) / r["float"]
        q = sum(int8_cost(*p) for p in pairs) / r["int8"]
        part = r["parts"][0]
        print(
            pairs[0][0],
            part["cin"],
            part["cout"],
            part["taps"],
            part["out"] // part["cout"],
            f"float {r['float'] / 1e3:.1f} us, predicted x{f:.2f};",
            f"int8 {r['int8'] / 1e3:.1f} us, predicted x{q:.2f}",
        )


if __name__ == "__main__":
    command, path, *groups = sys.argv[1:]
    {
        "measure": lambda: measure(path, groups),
        "fit": lambda: fit(path),
        "check": lambda: check(path),
    }[command]()
