"""A progress bar that shows the latest values of a run."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class LatestValuesBar(ProgressCallback):
    """One bar for the whole run, in place of Trainer's bar and its printed log lines.

    Args:
        shown: the keys of the log to show, each with its name next to the bar.
    """

    def __init__(self, shown: Mapping[str, str]) -> None:
        super().__init__()
        self.shown = shown
        self.latest: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest values next to the bar."""
        self.latest |= {name: f"{logs[key]:.4g}" for key, name in self.shown.items() if logs and key in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.latest)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show no second bar for the short evaluations during training."""
