"""Find a learning rate from forward passes before training, and show the measurements behind it.

    zo-hf find-lr --offline                  finds a rate for `zo-hf train --offline`
    zo-hf find-lr --max_steps 2000 ...       takes the options of `zo-hf train`, and finds a value for --learning_rate

The search takes 5 % of the forward passes that the training would take, at most 200. If that is fewer than 20, there is no
search. Nothing is trained. A plot, learning_rate.png, is saved in --output_dir. The command `zo-hf train --learning_rate
auto` finds the same rate and trains with it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.lr_finder.plot import plot_result
from zo_hf.lr_finder.report import table
from zo_hf.tasks.console import command
from zo_hf.tasks.job_arguments import parse_arguments
from zo_hf.tasks.job_run import line_printer
from zo_hf.tasks.refusals import refusals_end_the_command, wrong_arguments_end_the_command
from zo_hf.tasks.sentiment_job import build_trainer, prepare


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the command; `argv` is the command line without the program's name."""
    with command():
        _run(argv, prog)


def _run(argv: list[str] | None, prog: str | None) -> None:
    with wrong_arguments_end_the_command():
        job, config = parse_arguments(argv, prog, __doc__)
        check(Case(config.settings(), {"learning_rate": "auto"}))  # before anything is loaded
        task = prepare(job, config)
    with refusals_end_the_command():
        result = build_trainer(task, config).find_learning_rate()
    print_line = line_printer(config)
    print_line(table(result))
    if result.prediction is None or config.process_index:
        return
    if find_spec("matplotlib") is None:
        print_line("no plot    install matplotlib for learning_rate.png")
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plot_result(result, folder / "learning_rate.png")
    print_line(f"plotted    {folder / 'learning_rate.png'}")
