"""Solvers by name, behind one call that checks every answer before anyone sees it.

A solver is a callable `(problem, *, seed, deadline, options) -> PlacementResult`; it does no I/O and reads no clock
(`deadline()` returns the seconds left). `register` adds one and says which terms of an objective it knows.
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
from moesim.solvers.objective import TERMS
from moesim.solvers.objectives import score, solve_affinity, solve_descent
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.repair import solve_repair
from moesim.solvers.result import PlacementResult, to_plan
from moesim.solvers.robust import solve_robust
from moesim.solvers.terms import Terms
from moesim.solvers.uneven import solve_parts
from moesim.solvers.validate import validate

__all__ = ["SOLVERS", "PlacementProblem", "PlacementResult", "default_solver", "register", "solve", "to_plan", "validate"]


class Solver(Protocol):
    """What the registry holds."""

    def __call__(
        self, problem: PlacementProblem, *, seed: int = 0, deadline: Callable[[], float] | None = None, options: Mapping[str, Any] | None = None
    ) -> PlacementResult:
        """Return a placement of `problem`."""
        ...


@dataclass(frozen=True, slots=True)
class _Traits:
    may_duplicate: bool = False
    keeps_budget: bool = False
    options: frozenset[str] = frozenset()
    terms: frozenset[str] = frozenset({"balance"})
    sums: bool = False
    baseline: bool = False


SOLVERS: dict[str, Solver] = {}
_TRAITS: dict[str, _Traits] = {}


def register(
    name: str,
    solver: Solver,
    *,
    may_duplicate: bool = False,
    keeps_budget: bool = False,
    options: tuple[str, ...] = (),
    terms: tuple[str, ...] = ("balance",),
    sums: bool = False,
    baseline: bool = False,
) -> None:
    """Add a solver.

    may_duplicate: it may put an expert twice on a rank. keeps_budget: it observes `move_budget_slots`. options: the option keys it knows.
    terms: the objectives that it plans for; sums: also weighted sums of them. baseline: it heeds no objective but balance, if any, and its
    placement is scored under whatever is asked.
    """
    SOLVERS[name] = solver
    _TRAITS[name] = _Traits(may_duplicate, keeps_budget, frozenset(options), frozenset(terms), sums, baseline)


def default_solver(problem: PlacementProblem) -> str:
    """Return the solver that a problem is given to where none is named."""
    if problem.move_budget_slots is not None:
        return "repair"
    if problem.objective.alone == "hops" or (problem.objective.alone == "traffic" and problem.one_slot_each):
        return "affinity"
    return "greedy" if problem.objective.alone == "balance" else "descent"


def solve(
    problem: PlacementProblem,
    solver: str | None = None,
    *,
    seed: int = 0,
    deadline: Callable[[], float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> PlacementResult:
    """Solve a placement problem and check the answer independently.

    solver: None takes `default_solver`. deadline: returns the seconds left; None: no limit. Raises InputError if the solver or an option is
    unknown or does not suit the problem, InfeasibleError if there is no placement, CheckError if the answer does not hold what it says.
    """
    solver = default_solver(problem) if solver is None else solver
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, SOLVERS, n=1)
        raise InputError(describe("solve", "solver", solver, f"must be one of {', '.join(sorted(SOLVERS))}", f"did you mean {near[0]!r}?" if near else ""))
    traits = _TRAITS.get(solver, _Traits(options=frozenset(options or ())))
    unknown = sorted(set(options or ()) - traits.options)
    if unknown:
        raise InputError(describe(f"solver {solver}", "option", unknown[0], f"must be one of {sorted(traits.options) or 'none'}"))
    if problem.move_budget_slots is not None and not traits.keeps_budget:
        raise InputError(
            describe("solve", "solver", solver, f"cannot keep a budget of {problem.move_budget_slots} moved slots", "use the solver repair, or no budget")
        )
    _check_objective(problem, solver, traits)
    asked: dict[str, Any] = {"seed": seed, "deadline": deadline, "options": options}
    # a budget of moves is one for all layers: what keeps it sees the whole problem
    result = SOLVERS[solver](problem, **asked) if traits.keeps_budget else solve_parts(problem, SOLVERS[solver], **asked)
    if traits.baseline and problem.objective.alone != "balance":
        result = score(Terms(problem), result.slot_to_expert_LS, solver=result.solver, status=result.status, iterations=result.iterations)
    validate(problem, result, may_duplicate=traits.may_duplicate)
    return result


def _check_objective(problem: PlacementProblem, solver: str, traits: _Traits) -> None:
    objective = problem.objective
    known = frozenset(TERMS) - {"hops"} if traits.baseline else traits.terms
    if set(objective.terms) <= known and (objective.alone is not None or traits.sums or traits.baseline):
        return
    able = [name for name, one in _TRAITS.items() if set(objective.terms) <= one.terms and (objective.alone is not None or one.sums)]
    budget = problem.move_budget_slots is not None
    remedy = "leave out the budget" if budget else f"use the solver {' or '.join(able)}"
    raise InputError(describe("solve", "solver", solver, f"does not plan for {objective.name}, only for {', '.join(sorted(known))}", remedy))


register("greedy", solve_greedy, options=("risk", "rounds", "restarts"))
register("descent", solve_descent, terms=("balance", "activated", "latency", "traffic"), sums=True)
register("affinity", solve_affinity, terms=("traffic", "hops"), options=("load_slack",))
register(
    "repair",
    solve_repair,
    keeps_budget=True,
    options=("risk", "frontier", "fits"),
    terms=("balance", "activated", "latency", "traffic"),
    sums=True,
)
register("robust", solve_robust, options=("risk", "validation", "modes"))
register("milp", solve_milp, options=("threads", "max_nodes"), terms=("balance", "activated"))
register("cp-sat", solve_cpsat, options=("threads", "max_effort"), terms=("balance", "activated"))
for _name, _solver in (("eplb", solve_eplb), ("eplb-global", solve_eplb_global), ("eplb-zigzag", solve_eplb_zigzag)):
    register(_name, _solver, may_duplicate=True, baseline=True)
for _name, _solver in (("linear", solve_linear), ("round_robin", solve_round_robin), ("random", solve_random)):
    register(_name, _solver, baseline=True)
