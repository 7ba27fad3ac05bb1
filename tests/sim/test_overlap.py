"""Two batches that overlap: what hides what by halves and by fifths of a layer, and kernels of exchanges that take the SMs. Oracles are closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.provenance import Provenance, Timing, timing
from moesim.errors import InputError
from moesim.sim.build import FIFTHS_LAG
from moesim.sim.build_layer import BatchTimes, Layers, MoeTimes, Site, side_by_side
from moesim.sim.evaluate import evaluate
from moesim.sim.ops import Program
from moesim.sim.settings import Settings

RANKS = 2
Seconds = st.floats(0.5, 2.0)


def same(seconds: float, *shape: int) -> Timing:
    return timing(np.full((1, *shape, RANKS), seconds), Provenance.MEASURED)


def exchange(layers: int, whole: float, kernels: tuple[float, float] | None) -> ExchangeTiming:
    time = same(whole, layers)
    if kernels is None:
        return ExchangeTiming(send_s=time.seconds, recv_s=time.seconds, provenance=time.provenance)
    send, receive = (same(part, layers).seconds for part in kernels)
    return ExchangeTiming(send_s=time.seconds, recv_s=time.seconds, provenance=time.provenance, send_kernel_s=send, receive_kernel_s=receive)


def finish(
    layers: int,
    *,
    turns: str = "halves",
    batches: int = 2,
    before: float = 0.0,
    rest: float = 0.0,
    shared: float = 0.0,
    experts: float = 0.0,
    whole: float = 0.0,
    kernels: tuple[float, float] | None = None,
) -> float:
    """Return when micro-batches of equal times are through all layers."""
    program = Program(RANKS)
    site = Site(program, columns=slice(0, RANKS), mask_R=None, group_R=np.zeros(RANKS, dtype=int), tp_group_R=np.arange(RANKS), port="scale_up")
    moe = MoeTimes(dispatch=exchange(layers, whole, kernels), experts=same(experts, layers), combine=exchange(layers, whole, kernels))
    times = BatchTimes(
        tokens_PR=np.ones((1, RANKS)),
        embedding=same(0.0),
        attention=same(before + rest),
        before_scores=same(before) if turns == "fifths" else None,
        core_PR=0.0,
        reduce=None,
        dense=same(0.0),
        gate_L=(same(0.0),) * layers,
        shared=same(shared),
        head=same(0.0),
        moe=(moe,),
        moe_backward=(),
    )
    chosen = Settings(micro_batches=batches, turns=turns)
    walks = [Layers(site, times, chosen, {layer: layer for layer in range(layers)}) for _ in range(batches)]
    side_by_side([walk.forward(range(layers), [], embed=True, head=layers) for walk in walks], FIFTHS_LAG if turns == "fifths" else 0)
    return float(evaluate(program, 0.0).finish.max())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), Seconds, Seconds, Seconds, Seconds, st.floats(0, 1))
def test_by_fifths_dispatch_hides_behind_shared_experts_and_projections_combine_behind_scores(
    layers: int, before: float, rest: float, shared: float, experts: float, part: float
) -> None:
    whole = part * min(before + shared, rest)
    took = finish(layers, turns="fifths", before=before, rest=rest, shared=shared, experts=experts, whole=whole)
    tail = max(whole - shared, 0.0) + whole  # the second batch is alone at the end
    assert took == pytest.approx(2 * layers * (before + rest + shared + experts) + tail)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 4), st.floats(1, 3))
def test_by_fifths_what_is_longer_than_its_cover_is_waited_for(layers: int, more: float) -> None:
    times: dict[str, Any] = dict(turns="fifths", before=1.0, rest=1.0, shared=0.0, experts=0.5)
    hidden, exposed = finish(layers, whole=1.0, **times), finish(layers, whole=1.0 + more, **times)
    assert exposed - hidden >= layers * more


@pytest.mark.parametrize("turns", ["halves", "fifths"])
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), Seconds, Seconds, st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_kernels_of_an_exchange_take_the_lane_of_computation(turns: str, layers: int, rest: float, experts: float, send: float, receive: float) -> None:
    # Messages take no time of their own: all that is left of the exchanges are their kernels.
    took = finish(layers, turns=turns, before=0.5, rest=rest, experts=experts, whole=send + receive, kernels=(send, receive))
    assert took == pytest.approx(2 * layers * (0.5 + rest + experts + 2 * (send + receive)))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 3), st.floats(0, 0.05), st.floats(0, 0.05))
def test_one_batch_takes_the_exchange_whole(whole: float, send: float, receive: float) -> None:
    plain = finish(2, batches=1, rest=1.0, experts=1.0, whole=whole)
    assert finish(2, batches=1, rest=1.0, experts=1.0, whole=whole, kernels=(send, receive)) == plain


def test_turns_that_do_not_exist_or_have_no_partner_are_refused() -> None:
    with pytest.raises(InputError, match="must be one of halves, fifths"):
        Settings(turns="thirds", micro_batches=2)
    with pytest.raises(InputError, match="needs micro_batches > 1"):
        Settings(turns="fifths")
    with pytest.raises(InputError, match="prefill_clock"):
        Settings(prefill_clock=0.0)
