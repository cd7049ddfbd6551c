"""A table in markdown of what `end_to_end.py` and `torch_sega.py` have measured.

    python tests/benchmarks/tables.py tests/benchmarks/results/sd15_*.json

Milliseconds a picture (medians), for each other file how many times as long as the first takes, then of the first the
share of the arithmetic floor, the first call, and the peak memory.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Cells = dict[tuple[int, int], dict[str, Any]]


def read(path: str) -> tuple[dict[str, Any], Cells]:
    written = json.loads(Path(path).read_text())
    return written["about"], {(row["concepts"], row["batch"]): row for row in written["found"]}


def table(measured: list[tuple[dict[str, Any], Cells]]) -> str:
    """Of the files' contents, the one to compare with first."""
    (first, ours), *others = measured

    def milliseconds(row: dict[str, Any] | None) -> float:
        return 1e3 * statistics.median(row["seconds"]) / row["batch"] if row else float("nan")

    names = [f"{about['backend']}, {about['dtype']}{', flags' * bool(about.get('flags'))}" for about, _ in measured]
    head = ["n", "B", *names, "floor", "first call", "peak memory"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (n, batch), row in sorted(ours.items(), key=lambda item: item[0][::-1]):
        own = milliseconds(row)
        times = [milliseconds(cells.get((n, batch))) for _, cells in others]
        compared = ["–" if other != other else f"{other:.0f} ms ({other / own:.1f}x)" for other in times]
        share = row["floor"] / statistics.median(row["seconds"])
        lines.append(
            f"| {n} | {batch} | {own:.0f} ms | "
            + "".join(f"{text} | " for text in compared)
            + f"{share:.0%} | {row['first']:.1f} s | {row['peak_gib']:.2f} GiB |"
        )
    devices = {about["device"] for about, _ in measured}
    versions = {about["versions"] for about, _ in measured}
    return "\n".join([*lines, "", f"{first['steps']} steps, {'; '.join(sorted(devices | versions))}"])


if __name__ == "__main__":
    print(table([read(path) for path in sys.argv[1:]]))
