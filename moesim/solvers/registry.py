"""Solvers by name, behind one call that checks every answer before anyone sees it.

A solver is a callable `(problem, *, seed, deadline, options) -> PlacementResult`; it does no I/O and reads no clock
(`deadline()` returns the seconds left). `register` adds one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moesim.errors import InputError, describe
from moesim.solvers.baselines import solve_linear, solve_random, solve_round_robin
from moesim.solvers.eplb import solve_eplb, solve_eplb_global, solve_eplb_zigzag
from moesim.solvers.exact_cpsat import solve_cpsat
from moesim.solvers.exact_milp import solve_milp
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.repair import solve_repair
from moesim.solvers.result import PlacementResult, to_plan
from moesim.solvers.robust import solve_robust
from moesim.solvers.validate import validate

__all__ = ["SOLVERS", "PlacementProblem", "PlacementResult", "register", "solve", "to_plan", "validate"]


class Solver(Protocol):
    """What the registry holds."""

    def __call__(
        self, problem: PlacementProblem, *, seed: int = 0, deadline: Callable[[], float] | None = None, options: Mapping[str, Any] | None = None
    ) -> PlacementResult:
        """Return a placement of `problem`."""
        ...


@dataclass(frozen=True, slots=True)
class _Traits:
    may_duplicate: bool
    keeps_budget: bool
    options: frozenset[str]


SOLVERS: dict[str, Solver] = {}
_TRAITS: dict[str, _Traits] = {}


def register(name: str, solver: Solver, *, may_duplicate: bool = False, keeps_budget: bool = False, options: tuple[str, ...] = ()) -> None:
    """Add a solver.

    may_duplicate: it may put an expert twice on a rank. keeps_budget: it observes `move_budget_slots`. options: the option keys it knows.
    """
    SOLVERS[name] = solver
    _TRAITS[name] = _Traits(may_duplicate, keeps_budget, frozenset(options))


def solve(
    problem: PlacementProblem, solver: str = "greedy", *, seed: int = 0, deadline: Callable[[], float] | None = None, options: Mapping[str, Any] | None = None
) -> PlacementResult:
    """Solve a placement problem and check the answer independently.

    deadline: returns the seconds left; None: no limit. Raises InputError if the solver or an option is unknown,
    InfeasibleError if there is no placement, CheckError if the answer does not hold what it says.
    """
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, SOLVERS, n=1)
        raise InputError(describe("solve", "solver", solver, f"must be one of {', '.join(sorted(SOLVERS))}", f"did you mean {near[0]!r}?" if near else ""))
    traits = _TRAITS.get(solver, _Traits(False, False, frozenset(options or ())))
    unknown = sorted(set(options or ()) - traits.options)
    if unknown:
        raise InputError(describe(f"solver {solver}", "option", unknown[0], f"must be one of {sorted(traits.options) or 'none'}"))
    if problem.move_budget_slots is not None and not traits.keeps_budget:
        raise InputError(
            describe("solve", "solver", solver, f"cannot keep a budget of {problem.move_budget_slots} moved slots", "use the solver repair, or no budget")
        )
    result = SOLVERS[solver](problem, seed=seed, deadline=deadline, options=options)
    validate(problem, result, may_duplicate=traits.may_duplicate)
    return result


register("greedy", solve_greedy, options=("risk", "rounds", "restarts"))
register("repair", solve_repair, keeps_budget=True, options=("risk", "frontier"))
register("robust", solve_robust, options=("risk", "validation", "modes"))
register("eplb", solve_eplb, may_duplicate=True)
register("eplb-global", solve_eplb_global, may_duplicate=True)
register("eplb-zigzag", solve_eplb_zigzag, may_duplicate=True)
register("milp", solve_milp, options=("threads", "max_nodes"))
register("cp-sat", solve_cpsat, options=("threads", "max_effort"))
register("linear", solve_linear)
register("round_robin", solve_round_robin)
register("random", solve_random)
