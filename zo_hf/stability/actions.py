"""The reactions of a run that has left its stable learning rates."""

from zo_hf.method_info import Choice, Whole, checked

ACTIONS = ("warn", "cap")


def check_action(every: int, action: str) -> None:
    """Refuse values of `zo_stability_steps` and `zo_stability_action` that are out of range or unknown.

    Raises:
        ValueError: a value is not valid; the message names the option and a valid value.
    """
    checked("zo_stability_steps", every, Whole(1), "leave it out to measure nothing")
    checked("zo_stability_action", action, Choice(ACTIONS), "warn changes nothing")
