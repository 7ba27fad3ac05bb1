"""A placement for windows not seen yet: ways to plan are tried on windows held out from them, and mixed by how well they did.

A way of the first kind weighs the windows (all alike, recent ones more, those like the last one, the last alone); the plan lowers the weighted
mean of their imbalances. Few folds tell such ways apart badly, so none is picked: their weights are averaged, each counting by how close its
held-out score comes to the best, in standard errors, and in part alike (mode `stacked`). A way of the second kind (worst window, CVaR, the mean
load as if it were one window) is taken instead only where it beats them clearly. Every way plans on some windows and is scored on one it did
not see; which windows these are is the `validation` scheme:
- `forward`: window k held out, planned on windows 0..k-1, for the last windows in turn (windows in order of time);
- `leave-one-out`: window k held out, planned on all others, the window before k counting as the last (windows in no order);
- `auto` (default): `forward`, unless five windows or more follow each other no more closely than shuffled ones would (domains, say, not a
  drift): then `leave-one-out`, and no window counts more for its place in the list.
Trial plans are made on a few layers with a shorter search. Every search also changes how many copies an expert gets.
Options: `risk` (how held-out windows and the value are folded), `validation`, `modes` (some of `MODES`, comma-separated).
Shapes: K windows, L layers, E experts, S slots, M modes, F folds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.packing import copies_LE, pack_LRC, to_slots_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline, expired, improve
from moesim.solvers.state import SearchState

SCHEMES = ("auto", "forward", "leave-one-out")
TELLING = 5
"""Windows from which an order can show: fewer have too few orders to be told from chance at `CHANCE`."""
CHANCE = 0.05
"""Share of the shuffled orders of the windows that may be as smooth as theirs if that is to count as an order of time."""
SHUFFLES = 1000
"""Orders tried where there are more than that."""
MAX_FOLDS = 5
"""Most folds; the windows held out are the last ones."""
TRIAL_SLOTS = {"forward": 1200, "leave-one-out": 600}
"""Slots, over the layers looked at, of a trial plan; forward there are fewer windows to plan on and more ways to tell apart."""
TRIAL_ROUNDS = 200
TRIAL_DEEP = 2
"""Swap rounds, and rounds of dearer moves per layer, of a trial plan."""
ROUNDS = 1000
DEEP = 20
"""The same for the plan that is returned."""
RISK_ROUNDS = 1
"""Reruns with moved window weights in a trial under a risk measure other than the mean."""
DECAY = 0.6
"""Weight of a window relative to the next one where recent windows count more."""
SIMILAR = 8.0
NEAR = 30.0
"""Powers of the cosine similarity to the last window that weigh a window."""
SOFTNESS = 1.5
"""Standard errors of the held-out score by which a weighing must be worse than the best to count 1 / e of it."""
UNIFORM = 0.5
"""Part of the mixture that all weighings share alike, whatever their scores: mixing itself guards against the next window being another kind."""
LEAST_ERROR = 0.005
"""Standard error of an imbalance that is assumed at least."""
CLEARLY = 2.0
"""Standard errors by which a mode must beat the best weighing: few folds choose badly among many modes."""
CV_TIME = 0.5
"""Share of a time limit that the trials may use."""

Views = tuple[np.ndarray, np.ndarray, str]
"""Windows [K', L, E], their weights [K'], risk measure."""


@dataclass(slots=True, kw_only=True)
class RobustResult(PlacementResult):
    """A placement with the trial that chose how it was planned."""

    mode: str
    """How it was planned: `stacked`, or one of `MODES`."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Mode → balance on held-out windows; empty where nothing could be held out or no fold was finished in time."""
    folds: int = 0
    """Held-out windows that every mode was scored on."""
    validation: str = "forward"
    """How windows were held out: `forward` where they are taken to be in order of time, or `leave-one-out`."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Weighing → its share, if the mode is `stacked`."""


def similarity_K(load_KLE: np.ndarray) -> np.ndarray:
    """Return float64 [K]: cosine similarity of every window to the last, 0 for one without load."""
    flat = load_KLE.reshape(len(load_KLE), -1)
    norm = np.sqrt((flat * flat).sum(axis=1))
    norm = norm * norm[-1]
    return np.divide(flat @ flat[-1], norm, out=np.zeros(len(flat)), where=norm > 0)


def _similar_K(load: np.ndarray, weight: np.ndarray, power: float) -> np.ndarray:
    near = weight * similarity_K(load) ** power
    return near if near.sum() > 0 else weight


def _recent_K(weight: np.ndarray) -> np.ndarray:
    recent = weight * DECAY ** np.arange(len(weight))[::-1]
    return recent if recent.sum() > 0 else weight


WEIGHINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "windows-recent": lambda load, weight: _recent_K(weight),
    "windows-mean": lambda load, weight: weight,
    "windows-similar": lambda load, weight: _similar_K(load, weight, SIMILAR),
    "windows-near": lambda load, weight: _similar_K(load, weight, NEAR),
    "last": lambda load, weight: np.eye(len(load))[-1],
}
"""Ways to weigh windows [K, L, E] of equal totals that have weights [K]."""
OTHERS: dict[str, Callable[[np.ndarray, np.ndarray], Views]] = {
    "windows-cvar": lambda load, weight: (load, weight, "cvar:0.5"),
    "windows-worst": lambda load, weight: (load, weight, "worst"),
    "blend-mean": lambda load, weight: (np.einsum("k,kle->le", weight / weight.sum(), load)[None], np.ones(1), "mean"),
}
PLACELESS = ("windows-mean", *OTHERS)
"""Ways to plan that treat the windows alike, wherever they stand."""
MODES = (*WEIGHINGS, *OTHERS)
"""Ways to plan; where nothing can be held out the first one asked for is taken."""


def _views(mode: str, load: np.ndarray, weight: np.ndarray) -> Views:
    return OTHERS[mode](load, weight) if mode in OTHERS else _weighed(load, WEIGHINGS[mode](load, weight))


def _weighed(load: np.ndarray, weight: np.ndarray) -> Views:
    """Return the windows that carry weight."""
    kept = weight > 1e-3 * weight.max()
    return load[kept], weight[kept], "mean"


def solve_robust(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Choose how to plan by trial on held-out windows, then plan that way on all of them; one window is planned by `greedy`."""
    options = options or {}
    risk, scheme, modes = _options(options)
    if problem.num_windows == 1:
        only = solve_greedy(problem, seed=seed, deadline=deadline)
        only.solver = "robust"
        return only
    load, order = _canonical(problem)
    weight = problem.weight_K
    if scheme == "auto":
        scheme = "forward" if len(load) < TELLING or in_order(load) else "leave-one-out"
        modes = [name for name in modes if scheme == "forward" or name in PLACELESS] or modes
    start = 0.0 if deadline is None else deadline()
    trial_deadline = None if deadline is None else (lambda: deadline() - start * (1 - CV_TIME))
    score_FM, fold_weight, late = cross_validate(problem, load, modes, scheme, trial_deadline)
    held_out = {mode: _fold(score_FM[:, m], fold_weight, risk) for m, mode in enumerate(modes)} if len(score_FM) else {}
    mode, mixture = _choose(score_FM, held_out, modes)
    if mixture:
        weighings = {name: WEIGHINGS[name](load, weight) for name in mixture}
        views, view_weight, view_risk = _weighed(load, np.sum([share * weighings[name] / weighings[name].sum() for name, share in mixture.items()], axis=0))
    else:
        views, view_weight, view_risk = _views(mode, load, weight)
    view = _view(problem, views, view_weight)
    if view.num_windows == 1:
        plan = solve_greedy(view, seed=seed, deadline=deadline)
        table, moves, cut = plan.slot_to_expert_LS, plan.iterations, plan.status == "TIME_LIMIT"
    else:
        table, moves, cut = _plan_LS(view, view_risk, rounds=ROUNDS, deep=DEEP, deadline=deadline)
    named = np.where(table >= 0, np.take_along_axis(order, np.maximum(table, 0), axis=1), -1).astype(np.int32)
    if problem.previous is not None:
        from moesim.solvers.assignment import relabel_LS

        named = relabel_LS(problem, named)
    status = "TIME_LIMIT" if late or cut else "FEASIBLE"
    result = make_result(problem, named, solver="robust", status=status, iterations=moves, risk=risk)
    fields = {name: getattr(result, name) for name in PlacementResult.__dataclass_fields__}
    return RobustResult(**fields, mode=mode, held_out=held_out, folds=len(score_FM), mixture=mixture, validation=scheme)


def _options(options: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    risk, scheme = str(options.get("risk", "mean")), str(options.get("validation", "auto"))
    if risk not in ("mean", "worst"):
        metrics.risk_tail(risk)
    if scheme not in SCHEMES:
        raise InputError(describe("solver options", "validation", scheme, f"must be one of {', '.join(SCHEMES)}"))
    modes = str(options["modes"]).split(",") if "modes" in options else list(MODES)
    for name in modes:
        if name not in MODES:
            raise InputError(describe("solver options", "modes", name, f"must be some of {', '.join(MODES)}, comma-separated"))
    return risk, scheme, modes


def _canonical(problem: PlacementProblem) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows scaled to equal totals, experts in an order that does not depend on their names, and that order [L, E]."""
    load = problem.load_KLE
    total = load.sum(axis=(1, 2), keepdims=True)
    load = load / np.where(total > 0, total, 1.0) * float(max(total.max(), 1.0))
    key = np.einsum("k,kle->le", problem.weight_K, load)
    order = np.stack([np.lexsort((*(-load[k, layer] for k in range(len(load))), -key[layer])) for layer in range(load.shape[1])])
    return np.take_along_axis(load, order[None], axis=2), order


def in_order(load_KLE: np.ndarray) -> bool:
    """Say whether every window follows the one before it more closely than in all but few shuffled orders: its load moved less on the way."""
    total = load_KLE.sum(axis=2, keepdims=True)
    share = np.divide(load_KLE, total, out=np.zeros_like(load_KLE), where=total > 0)
    moved_KK = np.stack([np.abs(share - one).sum(axis=(1, 2)) for one in share])
    windows = len(load_KLE)
    if math.factorial(windows) <= SHUFFLES:
        orders = np.array(list(itertools.permutations(range(windows))))
    else:
        generator = np.random.Generator(np.random.PCG64(0))
        orders = np.stack([np.arange(windows), *(generator.permutation(windows) for _ in range(SHUFFLES))])
    way = moved_KK[orders[:, :-1], orders[:, 1:]].sum(axis=1)
    # windows that are all alike are in any order
    return float((way <= way[0] * (1 + 1e-9)).mean()) <= CHANCE


def _view(problem: PlacementProblem, load: np.ndarray, weight: np.ndarray) -> PlacementProblem:
    """Return the problem with other windows, experts in canonical order and no running placement."""
    return replace(problem, load_KLE=load, window_weight_K=weight, previous=None, move_budget_slots=None)


def folds(windows: int, scheme: str) -> list[tuple[list[int], int]]:
    """Return (windows to plan on, in order of time, window held out) pairs."""
    late = range(max(0, windows - MAX_FOLDS), windows)
    forward = [(list(range(k)), k) for k in late if k >= 2]
    around = [([(k + 1 + step) % windows for step in range(windows - 1)], k) for k in late] if windows > 2 else []
    return forward if scheme == "forward" else around


def cross_validate(problem: PlacementProblem, load_KLE: np.ndarray, modes: list[str], scheme: str, deadline: Deadline) -> tuple[np.ndarray, np.ndarray, bool]:
    """Score every mode on held-out windows: imbalance [F, M], weight of every fold [F], and whether time ran out first."""
    weight = problem.weight_K
    looked_at = max(1, min(problem.num_layers, TRIAL_SLOTS[scheme] // problem.num_slots))
    layers = np.unique(np.linspace(0, problem.num_layers - 1, looked_at).round().astype(np.int64))
    load = load_KLE[:, layers]
    rows: list[list[float]] = []
    weights: list[float] = []
    for seen, held in folds(problem.num_windows, scheme):
        if weight[held] == 0 or weight[seen].sum() == 0:
            continue
        row: list[float] = []
        for mode in modes:
            if expired(deadline):
                return np.array(rows).reshape(-1, len(modes)), np.array(weights), True
            views, view_weight, risk = _views(mode, load[seen], weight[seen])
            table, _, _ = _plan_LS(_view(problem, views, view_weight), risk, rounds=TRIAL_ROUNDS, deep=TRIAL_DEEP)
            peak = metrics.rank_time_KLR(table, problem.slot_rank_S, load[[held]], problem.speed_R).max(axis=2)
            row.append(float(metrics.imbalance_K(peak, metrics.ideal_KL(load[[held]], problem.speed_R))[0]))
        rows.append(row)
        weights.append(float(weight[held]))
    return np.array(rows).reshape(-1, len(modes)), np.array(weights), False


def _plan_LS(problem: PlacementProblem, risk: str, *, rounds: int, deep: int, deadline: Deadline = None) -> tuple[np.ndarray, int, bool]:
    """Pack and search without restarts; return the placement, the moves made, and whether the deadline cut the search short."""
    fill, speed, load = problem.fill_R, problem.speed_R, problem.load_KLE
    weight_K = problem.weight_K
    weight_KL = cost_weight_KL(problem, weight_K)
    slots, same = int(fill.sum()), problem.allow_duplicates_on_rank
    copies = copies_LE((load * weight_KL[..., None]).sum(axis=0), slots, slots if same else int((fill > 0).sum()))
    table = pack_LRC(load, weight_KL, copies, fill, speed, allow_duplicates=same)
    ideal = metrics.ideal_KL(load, speed)
    best, best_value, moves = table, -1.0, 0
    for _ in range(1 + RISK_ROUNDS * (risk != "mean")):
        state = SearchState.of(load, weight_KL, table.copy(), speed, allow_duplicates=same)
        made, cut = improve(state, (ideal * weight_KL).sum(axis=0), max_rounds=rounds, max_deep=deep, deadline=deadline)
        table, peak, moves = state.table_LRC, state.time_KLR().max(axis=2), moves + made
        value = metrics.fold_windows(peak, ideal, problem.weight_K, risk)
        if value > best_value:
            best, best_value = table, value
        if cut:
            break
        weight_K = 0.5 * weight_K + 0.5 * metrics.risk_weights(metrics.imbalance_K(peak, ideal), problem.weight_K, risk)
        weight_KL = cost_weight_KL(problem, weight_K)
    return to_slots_LS(best, problem.slots_per_rank_R), moves, cut


def _choose(imbalance_FM: np.ndarray, held_out: dict[str, float], modes: list[str]) -> tuple[str, dict[str, float]]:
    """Return how to plan, and the share of every weighing if they are mixed."""
    if not held_out:
        return modes[0], {}
    weighings = [name for name in modes if name in WEIGHINGS]
    if not weighings:
        return max(modes, key=lambda name: held_out[name]), {}
    base = max(weighings, key=lambda name: held_out[name])
    columns = [modes.index(name) for name in (base, *(name for name in modes if name in OTHERS))]
    winner = modes[columns[_winner(imbalance_FM[:, columns], np.array([held_out[modes[column]] for column in columns]))]]
    if winner != base:
        return winner, {}
    if len(weighings) == 1:
        return base, {}
    columns = [modes.index(name) for name in weighings]
    shares = _shares(imbalance_FM[:, columns], np.array([1 / held_out[name] for name in weighings]))
    return "stacked", dict(zip(weighings, shares.tolist(), strict=True))


def _shares(imbalance_FM: np.ndarray, folded_M: np.ndarray) -> np.ndarray:
    """Return [M], summing to 1: how much every weighing counts, falling with the standard errors by which it is worse than the best."""
    worse_FM = imbalance_FM - imbalance_FM[:, [int(folded_M.argmin())]]
    error = float(np.sqrt(worse_FM.var(axis=0).mean() / max(len(worse_FM) - 1, 1))) + LEAST_ERROR
    share = np.exp(-(folded_M - folded_M.min()) / (SOFTNESS * error))
    return np.asarray(UNIFORM / len(share) + (1 - UNIFORM) * share / share.sum())


def _winner(imbalance_FM: np.ndarray, held_out_M: np.ndarray) -> int:
    """Return the best mode, or the first if the best beats it by no more than `CLEARLY` standard errors of their difference over folds."""
    best = int(held_out_M.argmax())
    better_F = imbalance_FM[:, 0] - imbalance_FM[:, best]
    error = float(better_F.std(ddof=1)) / len(better_F) ** 0.5 if len(better_F) > 1 else np.inf
    return best if better_F.mean() > CLEARLY * error else 0


def _fold(imbalance_F: np.ndarray, weight_F: np.ndarray, risk: str) -> float:
    """Return the balance over folds under a risk measure."""
    return 1.0 / float(metrics.risk_weights(imbalance_F, weight_F / weight_F.sum(), risk) @ imbalance_F)
