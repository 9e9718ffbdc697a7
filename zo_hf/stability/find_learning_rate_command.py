"""Find a learning rate from forward passes before training, and show what they saw.

    zo-hf find-lr --offline                  for what `zo-hf train --offline` would do
    zo-hf find-lr --max_steps 2000 ...       takes the options of `zo-hf train`; of --learning_rate it says what to put there

It takes 5 % of the forward passes that the training would take, and at most 200 batches' worth; with fewer than 20 it does
not search. Nothing is trained. --output_dir gets learning_rate.png. `zo-hf train --learning_rate auto` finds the same rate
and trains with it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from zo_hf.stability.found_plot import plot_found
from zo_hf.stability.found_text import table
from zo_hf.tasks.assets import AssetError
from zo_hf.tasks.job_arguments import parse_arguments
from zo_hf.tasks.sentiment_job import build_trainer, line_printer, prepare


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the search as a command; `argv` is the command line without the program's name."""
    try:
        job, config = parse_arguments(argv, prog, __doc__)
        task = prepare(job, config)
        found = build_trainer(task, config).find_learning_rate()
    except (AssetError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    say = line_printer(config)
    say(table(found))
    if found.prediction is None or config.process_index:
        return
    if find_spec("matplotlib") is None:
        say("no plot    install matplotlib for learning_rate.png")
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plot_found(found, folder / "learning_rate.png")
    say(f"plotted    {folder / 'learning_rate.png'}")
