"""Run attack suites and print how many of their cases are answered rightly.

    python -m tests.attacks                      # all suites
    python -m tests.attacks options logs         # some
    python -m tests.attacks ranks --sample 10    # ten cases, spread over the table

The exit code is 1 if a case was answered wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from tqdm import tqdm

from tests.attacks.suite import SUITES, cases_of, sample, verdict


def main() -> int:
    """Run the suites that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(SUITES)}; default: all")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="run only N cases of each suite, spread over its table"
    )
    args = parser.parse_args()
    for name in args.suites:
        if name not in SUITES:
            parser.error(f"there is no suite {name!r}; choose from {', '.join(SUITES)}.")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines, failed = [], False
    for name in args.suites or SUITES:
        cases = cases_of(name)
        gc.collect()
        gc.freeze()  # Trainer begins every training with a collection of all that the imports left
        chosen = cases if args.sample is None else sample(cases, args.sample)
        wrong = []
        for case in tqdm(chosen, desc=name, file=sys.stderr):
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                answer = verdict(case, Path(folder))
            if answer is not None:
                wrong.append(f"  {case.name}: {answer}")
        failed |= bool(wrong)
        lines += [f"| {name} | {len(chosen)} | {len(chosen) - len(wrong)} |", *wrong]
    print("| suite | tried | right |\n|---|---:|---:|", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
