"""The robust solver: it picks how to plan on windows it held out, and what it picks holds on windows it never saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers import metrics
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.robust import MODES, PLACELESS, RobustResult, _choose, _shares, _winner, folds, in_order, similarity_K, solve_robust
from tests.solvers.instances import lognormal

FEW = "windows-recent,windows-mean,blend-mean,last"


def regimes(windows: int, noise: float = 0.1, seed: int = 0, layers: int = 2, experts: int = 16) -> np.ndarray:
    """Return [K, L, E] loads that change between two regimes from window to window."""
    generator = np.random.Generator(np.random.PCG64(seed))
    base = np.stack([lognormal(layers, experts, seed + 50), lognormal(layers, experts, seed + 51)])
    return np.stack([base[k % 2] * generator.lognormal(0.0, noise, (layers, experts)) for k in range(windows)])


def problem_of(load_KLE: np.ndarray, **others: Any) -> PlacementProblem:
    return PlacementProblem(load_KLE=load_KLE, **{"num_ranks": 4, "slots_per_rank_R": np.array(6), **others})


def held_out(problem: PlacementProblem, table_LS: np.ndarray, load_KLE: np.ndarray) -> float:
    """Return the balance of a placement on other windows."""
    peak_KL = metrics.rank_time_KLR(table_LS, problem.slot_rank_S, load_KLE, problem.speed_R).max(axis=2)
    ideal_KL = metrics.ideal_KL(load_KLE, problem.speed_R)
    return metrics.fold_windows(peak_KL, ideal_KL, np.full(len(load_KLE), 1 / len(load_KLE)), "mean")


def robust(problem: PlacementProblem, **options: str) -> RobustResult:
    result = solve(problem, "robust", options=options)
    assert isinstance(result, RobustResult)
    return result


def test_one_window_is_planned_as_greedy_plans_it() -> None:
    problem = problem_of(lognormal(2, 16))
    assert solve(problem, "robust").slot_to_expert_LS.tobytes() == solve(problem).slot_to_expert_LS.tobytes()


@pytest.mark.parametrize("seed", [0, 20])
def test_weighings_are_mixed_and_count_by_their_held_out_scores(seed: int) -> None:
    result = robust(problem_of(regimes(5, seed=seed)), validation="forward")
    assert set(result.held_out) == set(MODES)
    assert result.mode == "stacked"
    assert sum(result.mixture.values()) == pytest.approx(1.0)
    by_share, by_score = (sorted(result.mixture, key=lambda name: scores[name]) for scores in (result.mixture, result.held_out))
    assert by_share == by_score


def walk(windows: int, seed: int = 3, step: float = 0.5) -> np.ndarray:
    """Return [K, L, E] loads whose logarithms walk at random."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.asarray(1e4 * np.exp(np.cumsum(generator.normal(0, step, (windows, 2, 16)), axis=0)))


@pytest.mark.parametrize("windows", [5, 6, 9])
def test_a_drift_is_in_order_and_turns_and_shuffled_windows_are_not(windows: int) -> None:
    drifting = walk(windows)
    shuffled = drifting[np.random.Generator(np.random.PCG64(windows)).permutation(windows)]
    assert in_order(drifting) and in_order(drifting[::-1]) and in_order(drifting * np.arange(1, windows + 1)[:, None, None])
    assert not in_order(shuffled) and not in_order(regimes(windows)) and not in_order(np.ones((windows, 1, 4)))


def test_windows_in_no_order_are_treated_alike() -> None:
    result = robust(problem_of(regimes(5)))
    assert (result.validation, set(result.held_out), result.mixture) == ("leave-one-out", set(PLACELESS), {})
    turned = robust(problem_of(regimes(5)[[2, 0, 4, 1, 3]]))
    assert turned.mode == result.mode and turned.value == pytest.approx(result.value, rel=2e-2)
    for loads in (regimes(4), walk(5)):
        assert robust(problem_of(loads), modes=FEW).validation == "forward"


def test_a_weighing_counts_less_by_the_standard_errors_that_it_is_worse() -> None:
    steady, noisy = np.array([[1.2, 1.3], [1.3, 1.4], [1.2, 1.3]]), np.array([[1.2, 1.7], [1.5, 1.1], [1.0, 1.2]])
    for imbalance, low, high in ((steady, 0.749, 0.75), (noisy, 0.5, 0.65), (steady[:, :1], 1.0, 1.0)):
        shares = _shares(imbalance, imbalance.mean(axis=0))
        assert low <= shares[0] <= high and shares.sum() == pytest.approx(1.0)


def test_another_way_is_taken_only_where_it_clearly_beats_the_best_weighing() -> None:
    modes = ["windows-mean", "last", "blend-mean"]
    clear, close = np.array([[1.5, 1.6, 1.2], [1.6, 1.7, 1.3], [1.5, 1.6, 1.2]]), np.array([[1.5, 1.6, 1.2], [1.2, 1.3, 1.5], [1.4, 1.5, 1.3]])
    for imbalance, expected in ((clear, "blend-mean"), (close, "stacked")):
        assert _choose(imbalance, dict(zip(modes, (1 / imbalance.mean(axis=0)).tolist(), strict=True)), modes)[0] == expected


def test_one_way_asked_for_is_the_way_taken() -> None:
    assert [robust(problem_of(regimes(4)), modes=name).mode for name in ("last", "windows-worst")] == ["last", "windows-worst"]


def test_a_mode_wins_only_by_more_than_the_noise_between_folds() -> None:
    clear, noisy = np.array([[1.5, 1.2], [1.6, 1.3], [1.5, 1.2]]), np.array([[1.5, 1.1], [1.2, 1.5], [1.4, 1.4]])
    for imbalance, expected in ((clear, 1), (noisy, 0), (clear[:1], 0)):
        assert _winner(imbalance, 1 / imbalance.mean(axis=0)) == expected


@pytest.mark.parametrize("seed", [0, 10])
def test_recurring_regimes_are_planned_better_than_their_mean_or_the_last_window(seed: int) -> None:
    load = regimes(8, seed=seed)
    seen, new = load[:4], load[4:]
    problem = problem_of(seen)
    ours = held_out(problem, robust(problem, modes=FEW).slot_to_expert_LS, new)
    for other in (seen.mean(axis=0), seen[-1]):
        assert ours > held_out(problem, solve(problem_of(other)).slot_to_expert_LS, new) + 0.02


def test_under_a_strong_drift_recent_windows_outweigh_the_mean() -> None:
    gains = []
    for seed in range(3, 7):
        generator = np.random.Generator(np.random.PCG64(seed))
        load = 1e4 * np.exp(np.cumsum(generator.normal(0, 0.7, (6, 4, 16)), axis=0))
        problem = problem_of(load[:5])
        result = robust(problem, modes=FEW)
        assert result.held_out["windows-recent"] > result.held_out["blend-mean"]
        mean = solve(problem_of(load[:5].mean(axis=0)))
        gains.append(held_out(problem, result.slot_to_expert_LS, load[5:]) - held_out(problem, mean.slot_to_expert_LS, load[5:]))
    assert np.mean(gains) > 0.02


def test_no_fold_looks_at_the_window_it_holds_out_nor_forward_at_a_later_one() -> None:
    for windows in range(1, 9):
        for seen, held in folds(windows, "leave-one-out"):
            assert sorted([*seen, held]) == list(range(windows))
            assert seen[-1] == (held - 1) % windows
        for seen, held in folds(windows, "forward"):
            assert seen == list(range(held))


def test_scores_of_a_fold_do_not_depend_on_windows_after_it() -> None:
    from moesim.solvers.robust import cross_validate

    load = regimes(5)
    changed = load.copy()
    changed[4] = changed[4, :, ::-1]
    modes = FEW.split(",")
    first, second = (cross_validate(problem_of(one), one, modes, "forward", None)[0] for one in (load, changed))
    assert np.array_equal(first[:-1], second[:-1])
    assert not np.array_equal(first[-1], second[-1])


def test_renaming_experts_changes_neither_choice_nor_value() -> None:
    load = regimes(4)
    order = np.random.Generator(np.random.PCG64(5)).permutation(load.shape[2])
    first, second = (robust(problem_of(one), modes=FEW + ",windows-near") for one in (load, load[:, :, order]))
    assert first.mode == second.mode
    assert first.value == pytest.approx(second.value, rel=1e-12)
    assert first.held_out == pytest.approx(second.held_out, rel=1e-9)


def test_scaling_one_window_changes_nothing() -> None:
    load = regimes(4)
    scaled = load * np.array([1.0, 64.0, 0.25, 1.0])[:, None, None]
    first, second = (robust(problem_of(one), modes=FEW) for one in (load, scaled))
    assert first.mode == second.mode
    assert first.value == pytest.approx(second.value, rel=1e-9)


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = (robust(problem_of(regimes(4)), modes=FEW) for _ in range(2))
    assert first.slot_to_expert_LS.tobytes() == second.slot_to_expert_LS.tobytes()
    assert first.held_out == second.held_out


def test_a_uniform_load_has_nothing_to_gain() -> None:
    result = solve(problem_of(np.ones((3, 2, 16)), slots_per_rank_R=np.array(4)), "robust")
    assert result.value == pytest.approx(1.0)
    assert result.status == "OPTIMAL"


def test_time_that_runs_out_is_admitted() -> None:
    problem = problem_of(regimes(4))
    cut = robust(problem, modes=FEW)
    assert cut.status == "FEASIBLE"
    cut = solve_robust(problem, deadline=lambda: -1.0)  # type: ignore[assignment]
    assert cut.status == "TIME_LIMIT"
    assert (cut.mode, cut.held_out, cut.folds) == ("windows-recent", {}, 0)
    left = iter(np.linspace(10.0, -10.0, 40))
    half = solve(problem, "robust", deadline=lambda: float(next(left, -10.0)))
    assert half.status == "TIME_LIMIT"


def test_unequal_ranks_and_the_running_plan_are_respected() -> None:
    problem = problem_of(regimes(3), num_ranks=4, slots_per_rank_R=np.array([8, 6, 6, 3]), device_speed_R=np.array([2.0, 1.0, 1.0, 0.5]))
    result = robust(problem, modes=FEW)
    again = robust(replace(problem, previous=result.slot_to_expert_LS), modes=FEW)
    assert np.array_equal(again.slot_to_expert_LS, result.slot_to_expert_LS)
    assert result.value > 0.8


def test_a_window_without_load_or_weight_does_no_harm() -> None:
    load = regimes(4)
    load[1] = 0.0
    assert robust(problem_of(load), modes=FEW).value > 0.5
    assert robust(problem_of(regimes(4), window_weight_K=np.array([0.0, 0.0, 0.0, 1.0])), modes=FEW).value > 0.9


def test_similarity_is_the_cosine_to_the_last_window() -> None:
    load = np.array([[[1.0, 0.0]], [[3.0, 3.0]], [[0.0, 0.0]], [[0.0, 2.0]]])
    assert similarity_K(load) == pytest.approx([0.0, 0.5**0.5, 0.0, 1.0])


@pytest.mark.parametrize(("key", "value"), [("risk", "median"), ("validation", "backward"), ("modes", "last,lastt")])
def test_unknown_options_are_refused(key: str, value: str) -> None:
    with pytest.raises(InputError, match=value.split(",")[-1]):
        solve(problem_of(regimes(3)), "robust", options={key: value})
