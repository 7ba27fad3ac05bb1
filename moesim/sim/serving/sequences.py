"""What a scheduler moves: sequences, the lanes in which they step together, and the batch of one step."""

from __future__ import annotations

from typing import Any

from moesim.sim.serving.kv import Holding
from moesim.traces.requests.document import Request


class Sequence:
    """A request on its way."""

    __slots__ = (
        "request",
        "arrival_s",
        "queued_s",
        "first_s",
        "generated",
        "target",
        "computed",
        "held",
        "context",
        "since",
        "last",
        "epoch",
        "lane",
        "turn",
        "swapped",
        "source",
        "reserved",
        "partner",
        "not_before",
        "moving",
    )

    def __init__(self, request: Request, arrival_s: float) -> None:
        self.request = request
        self.arrival_s = arrival_s
        self.queued_s = arrival_s
        """When the scheduler saw it: at the end of the step in which it arrived."""
        self.first_s = -1.0
        self.generated = 0
        self.target = request.prompt_tokens
        """Tokens to compute before it decodes (again)."""
        self.computed = 0
        self.held = Holding()
        self.context = 0.0
        """KV length of its next decode step when it joined its lane."""
        self.since = 0
        """Decode steps of the lane when it joined."""
        self.last = 0
        """Decode step of the lane with which it ends."""
        self.epoch = 0
        """Grows when it leaves a lane: entries of the calendar that name an older epoch are void."""
        self.lane: Lane | None = None
        self.turn = 0
        """Number of its latest admission."""
        self.swapped = False
        self.source: tuple[Any, Any, Sequence] | None = None
        """Prefill instance, replica and sequence there that still hold its KV cache."""
        self.reserved = False
        """Whether it asks for blocks before its prompt is computed elsewhere."""
        self.partner: tuple[Any, Any, Sequence] | None = None
        """Decoding instance, replica and sequence there that hold blocks for what this one computes."""
        self.not_before = 0
        """Number of the first step of the instance whose batch was not chosen when it came."""
        self.moving = False
        """Whether its KV cache is on its way, or to come."""


class Lane:
    """The sequences that step together; an instance has one per pipeline stage."""

    __slots__ = ("decoding", "contexts", "steps", "needs", "ends", "running", "partial", "flying", "joining")

    def __init__(self) -> None:
        self.decoding = 0
        self.contexts = 0.0
        """Sum of the KV lengths of the next decode step."""
        self.steps = 0
        """Decode steps so far."""
        self.needs: dict[int, list[tuple[Sequence, int]]] = {}
        """Decode step → sequences that need a block before it."""
        self.ends: dict[int, list[tuple[Sequence, int]]] = {}
        """Decode step → sequences that end with it."""
        self.running: dict[Sequence, None] = {}
        """In order of admission."""
        self.partial: list[Sequence] = []
        """Sequences whose prompts are not computed, in order of admission."""
        self.flying = False
        """Whether a step runs."""
        self.joining: list[Sequence] = []
        """Sequences whose KV cache has come while a step runs; they decode from the next one on."""


class Work:
    """The batch of one step of a replica."""

    __slots__ = ("chunks", "decodes", "contexts", "swap_tokens", "finished_prompts", "settled")

    def __init__(self) -> None:
        self.settled = False
        """Whether the next step is the same unless a sequence ends or comes: no prompt runs, and the queue is empty or was asked in vain, not too early."""
        self.chunks: list[tuple[int, int, Sequence]] = []
        """New tokens, KV length at the end, and sequence of every prompt chunk."""
        self.decodes = 0
        self.contexts = 0.0
        self.swap_tokens = 0
        """Tokens whose KV entries move between device and host."""
        self.finished_prompts: list[Sequence] = []

    @property
    def empty(self) -> bool:
        """Whether nothing runs."""
        return not self.chunks and not self.decodes
