"""The error family: every mistake a user can make ends in one of these.

A message names the place (file and key), the offending value, the rule and the remedy, e.g.
`hardware/h200x8.yaml: links[2].bandwidth = -1 B/s must be > 0; give a positive bandwidth`.
The command line prints the message without a traceback and exits with `exit_code`:
2 for bad input or usage, 1 for an infeasible problem or a failed check.
"""

from __future__ import annotations


class MoesimError(Exception):
    """Base of all errors that moesim raises on purpose."""

    exit_code = 1


class InputError(MoesimError):
    """Something given to moesim is wrong: a file, a key, a flag."""

    exit_code = 2


class HardwareError(InputError):
    """A hardware description breaks a rule."""


class ModelError(InputError):
    """A model configuration breaks a rule or is not understood."""


class TraceError(InputError):
    """A trace breaks a rule, or does not fit the model it is replayed on."""


class PlanError(InputError):
    """A plan breaks a rule, or does not fit its model or hardware."""


class CostError(InputError):
    """A cost table lacks a key, or `--strict` refuses how a time was obtained."""


class SimulationError(MoesimError):
    """A simulation cannot go on: a cyclic dependency, an unreachable pair, a full store."""


class InfeasibleError(MoesimError):
    """No plan satisfies the stated requirements; says which one is violated least, by how much, and what would help."""

    def __init__(self, message: str, *, requirement: str = "", where: str = "", missing: float | str | None = None, relaxation: str | None = None) -> None:
        """Keep the parts of the message for machines: the rule, the rank or layer, what is missing, the flag that would make it feasible."""
        super().__init__(message)
        self.requirement, self.where, self.missing, self.relaxation = requirement, where, missing, relaxation


class ApplyError(MoesimError):
    """A live deployment refused or rolled back a change."""


def describe(place: str, key: str, value: object, rule: str, remedy: str = "") -> str:
    """Build a message in the house form: `place: key = value rule; remedy`."""
    shown = repr(value) if isinstance(value, str) else str(value)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    return f"{place}: {key} = {shown} {rule}" + (f"; {remedy}" if remedy else "")
