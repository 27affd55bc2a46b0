"""`python -m tests.bench [row,row]`: row, figure, unit, target, ok or short, tab-separated; exit 1 if any is short."""

from __future__ import annotations

import importlib
import sys

ROWS = {
    "load": "tests.bench.load",
    "headers": "tests.bench.headers",
    "label": "tests.bench.label",
    "label-full": "tests.bench.label_full",
    "loss": "tests.bench.loss",
    "data": "tests.bench.data",
    "step": "tests.bench.step",
    "cox": "tests.bench.cox",
    "cindex": "tests.bench.cindex",
    "job": "tests.bench.job",
    "neighbours": "tests.bench.neighbours",
}


def main(only: str | None = None) -> int:
    """Run the rows named, or all; 1 if any is short, 2 if one is unknown."""
    wanted = only.split(",") if only else list(ROWS)
    unknown = [name for name in wanted if name not in ROWS]
    if unknown:
        print(f"No bench row named {unknown[0]!r}. Known: {', '.join(ROWS)}.", file=sys.stderr)
        return 2
    short = 0
    print("row\tfigure\tunit\ttarget\tverdict")
    for name in wanted:
        for row in importlib.import_module(ROWS[name]).run():
            print(row, flush=True)
            short += not row.ok
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
