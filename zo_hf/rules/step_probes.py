"""The evaluations of the loss in one step: the estimator's probes, and what the rule adds to them."""

from __future__ import annotations

from dataclasses import replace

from zo_hf.estimators import Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.rule import Rule


def probes_of_a_step(estimator: Estimator, rule: type[Rule], options: RuleOptions, step: int) -> list[Probe]:
    """The estimator's probes, and the same once more around the snapshot of a rule that looks back in this step."""
    probes = estimator.probes()
    if rule.looks_back(step, options):
        probes += [replace(probe, at_snapshot=True) for probe in probes]
    return probes


def forward_passes_of_a_step(estimator: Estimator, rule: type[Rule], options: RuleOptions, step: int) -> int:
    """Evaluations of the loss on a whole batch: the probes, and the candidates that none of them has evaluated."""
    probes = probes_of_a_step(estimator, rule, options, step)
    has_clean = any(probe.scale == 0.0 for probe in probes)
    return len(probes) + sum(not has_clean or candidate != 0.0 for candidate in rule.candidates)
