"""Writes tests/slow.txt, the cases that the default test command leaves out; `-m slow` runs them.

    python3 run.py test -m "" --junitxml=report.xml
    python tests/slowest.py report.xml --seconds 600

The longest cases go first. The quickest case of a test stays, unless it takes long by itself, so that every test is tried
by default. Tests that are marked as slow where they are defined are not listed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_name("slow.txt")

#: Times the limit of other cases that the quickest case of a test may take.
PATIENCE = 5


def slowest(durations: dict[str, float], seconds: float) -> set[str]:
    """Return the cases to leave out, so that the others take no more than `seconds` together.

    Args:
        durations: seconds of every case, by its node id.
    """
    cases = defaultdict(list)
    for case, taken in durations.items():
        cases[case.split("[")[0]].append((taken, case))
    quickest = {min(several)[1] for several in cases.values()}
    left_out: set[str] = set()
    for limit in sorted(durations.values(), reverse=True):
        if sum(durations.values()) - sum(durations[case] for case in left_out) <= seconds:
            break
        left_out = {c for c, taken in durations.items() if taken >= limit * (PATIENCE if c in quickest else 1)}
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", help="what pytest wrote with --junitxml")
    parser.add_argument(
        "--seconds", type=float, default=600, help="what the default tests may take in all, one after another"
    )
    args = parser.parse_args()
    durations = {}
    for case in ElementTree.parse(args.report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        durations[f"{file}::{case.get('name')}"] = float(case.get("time", 0))
    LIST.write_text("".join(f"{case}\n" for case in sorted(slowest(durations, args.seconds))), encoding="utf-8")


if __name__ == "__main__":
    main()
