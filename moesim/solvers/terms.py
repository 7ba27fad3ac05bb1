"""The terms of an objective as arrays: what a placement costs in every layer, what none can beat, and the ideal that a sum divides by.

See `moesim.solvers.objective` for what the terms mean. Splitting an expert c ways never lowers c·a(c), a being the chance that one copy is
active, so one copy each, spread in proportion to speed, bounds `activated`; the bound of `latency` is the hottest expert cut into as many
copies as there may be. Shapes: K windows, L layers, E experts, S slots, R ranks, C slots of a rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.objective import Decode
from moesim.solvers.packing import from_slots_LRC
from moesim.solvers.parts import parts_of
from moesim.solvers.problem import PlacementProblem


def copies_LE(problem: PlacementProblem, table_LS: np.ndarray) -> np.ndarray:
    """Return int64 [L, E]: slots of every expert."""
    width = problem.num_experts + 1
    flat = np.arange(len(table_LS))[:, None] * width + table_LS + 1
    return np.bincount(flat.ravel(), minlength=len(table_LS) * width).reshape(len(table_LS), -1)[:, 1:]


class Terms:
    """Costs of a problem's placements under its objective, per layer; costs of layers add up."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.weights = dict(problem.objective.weights)
        self._parts = [(part, Terms(part.problem)) for part in parts_of(problem)] if problem.experts_L is not None else []
        decode = problem.objective.decode
        self.decode = Decode(tokens=1, top_k=1) if decode is None else decode
        self.pick_KLE = self.decode.pick_KLE(problem.load_KLE)
        self.most_copies = int(problem.fill_R.sum()) if problem.allow_duplicates_on_rank else int((problem.fill_R > 0).sum())
        self._ideal_K = self._load_KL().sum(axis=1)
        self._ideal = {term: self._ideal_of(term) for term in self.weights}
        for _, own in self._parts:
            own._ideal, own._ideal_K = self._ideal, self._ideal_K

    def cost_L(self, table_LS: np.ndarray) -> np.ndarray:
        """Return float64 [L]: cost of a placement, in the unit of the only term or relative to the ideal."""
        if self._parts:
            return self._joined([own.cost_L(part.of(table_LS)) for part, own in self._parts])
        return np.asarray(sum(self.scale(term) * getattr(self, f"_{term}_L")(table_LS) for term in self.weights))

    def bound_L(self) -> np.ndarray:
        """Return float64 [L]: a cost that no placement beats."""
        if self._parts:
            return self._joined([own.bound_L() for _, own in self._parts])
        return np.asarray(sum(self.scale(term) * getattr(self, f"_{term}_bound_L")() for term in self.weights))

    def _joined(self, costs: list[np.ndarray]) -> np.ndarray:
        result = np.empty(self.problem.num_layers)
        for (part, _), cost in zip(self._parts, costs, strict=True):
            result[part.layers_n] = cost
        return result

    @property
    def ideal(self) -> float:
        """Cost of the ideal of every term, which may be out of reach of any placement."""
        return sum(self.scale(term) * ideal for term, ideal in self._ideal.items())

    def scale(self, term: str) -> float:
        """Return what a term's cost is multiplied by: its weight over its ideal, or 1 where it stands alone."""
        if len(self.weights) == 1:
            return 1.0
        return self.weights[term] / self._ideal[term] if self._ideal[term] > 0 else 0.0

    def repeated(self, times: int) -> Terms:
        """Return the same with every layer standing `times` in a row, so that so many placements of it are priced at once (not for traffic)."""
        problem = replace(self.problem, load_KLE=np.repeat(self.problem.load_KLE, times, axis=1), previous=None, move_budget_slots=None)
        result = Terms(problem)
        result._ideal = self._ideal
        result._ideal_K = self._ideal_K
        return result

    # --- loads that swaps are searched on -------------------------------------------------------

    def proxy_KLE(self, copies: np.ndarray) -> np.ndarray:
        """Return c·a(c): loads that, split among the copies, are the activations of the slots."""
        return copies * self.decode.active(self.pick_KLE / np.maximum(copies, 1))

    def copy_size_KEN(self, layer: int, most: int) -> np.ndarray:
        """Return float64 [K, E, N]: what one copy of an expert with n + 1 copies (up to `most`) adds to its rank under the only term."""
        copies = np.arange(1, most + 1)
        if "activated" in self.weights:
            return self.decode.active(self.pick_KLE[:, layer, :, None] / copies)
        return np.asarray(self.problem.load_KLE[:, layer, :, None] / copies)

    def proxy_weights(self, balance: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights [K] of rank loads and of activations in a search that gives balance this part of the weight."""
        share, ideal_K = self.problem.weight_K, self._ideal_K
        loads = np.divide(balance * share, ideal_K, out=np.zeros(len(share)), where=ideal_K > 0)
        active = float(share @ self.active_KL().sum(axis=1))
        return loads, share * ((1 - balance) / active if active > 0 else 0.0)

    def _load_KL(self) -> np.ndarray:
        return metrics.ideal_KL(self.problem.load_KLE, self.problem.speed_R)

    def active_KL(self) -> np.ndarray:
        """Return float64 [K, L]: activations of a rank if one copy of every expert were spread in proportion to speed."""
        return np.asarray(self.decode.active(self.pick_KLE).sum(axis=2) / self.problem.speed_R.sum())

    # --- the terms ------------------------------------------------------------------------------

    def _ideal_of(self, term: str) -> float:
        problem, objective = self.problem, self.problem.objective
        if term == "balance":
            return float(problem.weight_K[self._load_KL().sum(axis=1) > 0].sum())
        if term == "activated":
            return float(problem.weight_K @ self.active_KL().sum(axis=1))
        if term == "traffic":
            routes, experts = objective.routes, problem.num_experts
            assert routes is not None
            count_TL = np.full(routes.experts_TLK.shape[:2], routes.experts_TLK.shape[2]) if routes.valid_TLK is None else routes.valid_TLK.sum(axis=2)
            rooms = [(max(1, experts * per_place // problem.num_ranks), weight) for per_place, weight in problem.levels]
            return sum(weight * float((-(-count_TL // room)).mean(axis=0).sum()) for room, weight in rooms) / problem.num_layers
        if self._parts:
            return sum(own._ideal_of(term) for _, own in self._parts)
        filled = self._filled_LRC()
        even_KL = self.decode.tokens * self.pick_KLE.sum(axis=2) / problem.fill_R.sum()
        return float(sum(weight * self._seconds_L(filled * one[:, None, None], filled).sum() for weight, one in zip(problem.weight_K, even_KL, strict=True)))

    def _balance_L(self, table_LS: np.ndarray) -> np.ndarray:
        problem = self.problem
        peak = metrics.rank_time_KLR(table_LS, problem.slot_rank_S, problem.load_KLE, problem.speed_R).max(axis=2)
        return np.asarray(self.proxy_weights(1.0)[0] @ peak)

    def _balance_bound_L(self) -> np.ndarray:
        return np.asarray(self.proxy_weights(1.0)[0] @ layer_bound_KL(self.problem))

    def _activated_L(self, table_LS: np.ndarray) -> np.ndarray:
        problem = self.problem
        proxy = self.proxy_KLE(copies_LE(problem, table_LS))
        return np.asarray(problem.weight_K @ metrics.rank_time_KLR(table_LS, problem.slot_rank_S, proxy, problem.speed_R).max(axis=2))

    def active_bound_KL(self) -> np.ndarray:
        """Return float64 [K, L]: activations that the slowest rank cannot get below."""
        return np.maximum(self.active_KL(), self.decode.active(self.pick_KLE.max(axis=2) / self.most_copies) / self._fastest)

    def _activated_bound_L(self) -> np.ndarray:
        return np.asarray(self.problem.weight_K @ self.active_bound_KL())

    def _latency_L(self, table_LS: np.ndarray) -> np.ndarray:
        problem = self.problem
        table = from_slots_LRC(table_LS, problem.slots_per_rank_R)
        index, mask = np.maximum(table, 0).reshape(len(table), -1), table >= 0
        copies = copies_LE(problem, table_LS)
        seconds = np.zeros(problem.num_layers)
        for pick, weight in zip(self.pick_KLE, problem.weight_K, strict=True):
            tokens = np.take_along_axis(self.decode.tokens * pick / copies, index, axis=1).reshape(table.shape) * mask
            seconds += weight * self._seconds_L(tokens, mask)
        return seconds

    def _latency_bound_L(self) -> np.ndarray:
        expert_seconds, filled = self.problem.objective.expert_seconds, self._filled_LRC()
        assert expert_seconds is not None
        first = filled & (np.arange(filled.shape[2]) == 0)
        tokens_KL = self.decode.tokens * self.pick_KLE.max(axis=2) / self.most_copies
        # the hottest expert's copies sit on some rank; whatever else that rank holds is given no tokens
        lone = [np.asarray(expert_seconds(first * one[:, None, None], filled))[:, self.problem.fill_R > 0].min(axis=1) for one in tokens_KL]
        return np.asarray(self.problem.weight_K @ np.stack(lone)) / self._fastest

    def _traffic_L(self, table_LS: np.ndarray) -> np.ndarray:
        from moesim.solvers.affinity.replicas import remote_L
        from moesim.solvers.affinity.scores import distinct_L

        problem, routes = self.problem, self.problem.objective.routes
        assert routes is not None
        if not problem.one_slot_each:
            return remote_L(routes, table_LS, problem.slot_rank_S, problem.num_ranks, problem.levels) / (len(routes) * problem.num_layers)
        rank_LE = np.empty(table_LS.shape, dtype=np.int64)
        np.put_along_axis(rank_LE, table_LS.astype(np.int64), np.broadcast_to(problem.slot_rank_S, table_LS.shape), axis=1)
        reached = sum(weight * distinct_L(routes, rank_LE // per_place) for per_place, weight in problem.levels)
        return np.asarray(reached / (len(routes) * problem.num_layers))

    def _traffic_bound_L(self) -> np.ndarray:
        from moesim.solvers.affinity.fanout import distinct_bound_L
        from moesim.solvers.affinity.replicas import remote_bound_L
        from moesim.solvers.affinity.transitions import coactivation_LEE

        problem, routes = self.problem, self.problem.objective.routes
        assert routes is not None
        if problem.one_slot_each:
            company = coactivation_LEE(routes)
            bound = sum(weight * distinct_bound_L(routes, company, problem.num_ranks // per_place) for per_place, weight in problem.levels)
        else:
            bound = remote_bound_L(routes, int(problem.fill_R.max()), problem.num_ranks, problem.levels)
        return np.asarray(bound / (len(routes) * problem.num_layers))

    # --- parts ----------------------------------------------------------------------------------

    @property
    def _fastest(self) -> float:
        return float(self.problem.speed_R[self.problem.fill_R > 0].max())

    def _filled_LRC(self) -> np.ndarray:
        fill = self.problem.fill_R
        filled = np.arange(int(fill.max()))[None, :] < fill[:, None]
        return np.repeat(filled[None], self.problem.num_layers, axis=0)

    def _seconds_L(self, tokens_LRC: np.ndarray, mask_LRC: np.ndarray) -> np.ndarray:
        expert_seconds = self.problem.objective.expert_seconds
        assert expert_seconds is not None
        return np.asarray((np.asarray(expert_seconds(tokens_LRC, mask_LRC)) / self.problem.speed_R).max(axis=1))
