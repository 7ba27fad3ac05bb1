"""Pipeline stages, training and chunked exchanges: the settings `pipeline.…`.

The defaults turn the group off.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import InputError, describe
from moesim.sim.schedules import SCHEDULES

MAX_CHUNKS = 64
MAX_MICRO_BATCHES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """Settings of the group `pipeline`."""

    stages: int = 1
    """Pipeline stages of a placement that no plan gives; with a plan, 1 or what the plan says."""
    layers: str = ""
    """Layers of every chunk of the model, like `8,8,9`; empty: as even as they go, the first chunks one more."""
    micro_batches: int = 0
    """Parts of a pass that flow through the stages, in training the micro-batches of a step; 0: as many as stages."""
    schedule: str = "auto"
    """Order of forwards and backwards: gpipe, 1f1b, interleaved or dualpipe; `auto` is 1f1b in training, else forward."""
    virtual: int = 1
    """Chunks of layers that a stage of the interleaved schedule holds."""
    chunks: int = 1
    """Parts into which the tokens of a MoE layer are cut, so that exchanges run beside experts."""
    chunks_backward: int = 0
    """The same in the backward pass; 0: as many as forward."""
    train: bool = False
    """Whether a pass is a training step: forward, backward, gradient exchange, optimizer."""
    backward_data: float = 1.0
    """Time of the gradient of a GEMM's input, in times of its forward: one product of the same size."""
    backward_weight: float = 1.0
    """Time of the gradient of a GEMM's weights, likewise."""
    backward_attention: float = 2.5
    """Time of the backward of scores and values, which has five products where the forward has two."""
    gradient_bytes: float = 4.0
    """Bytes of a parameter's gradient: float32."""
    optimizer_bytes: float = 12.0
    """Bytes of a parameter's optimizer state: Adam's two moments and a master copy, float32."""
    shard_optimizer: bool = False
    """Whether data-parallel ranks share the optimizer state of what they replicate: reduce-scatter, own part, all-gather."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("stages", 1, 1024),
            ("micro_batches", 0, MAX_MICRO_BATCHES),
            ("virtual", 1, 64),
            ("chunks", 1, MAX_CHUNKS),
            ("chunks_backward", 0, MAX_CHUNKS),
            ("backward_data", 0, 100),
            ("backward_weight", 0, 100),
            ("backward_attention", 0, 100),
            ("gradient_bytes", 0, 64),
            ("optimizer_bytes", 0, 64),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(describe("--set", f"pipeline.{name}", value, f"must be in {low}..{high}"))
        if self.schedule not in ("auto", *SCHEDULES):
            raise InputError(describe("--set", "pipeline.schedule", self.schedule, f"must be auto or one of {', '.join(SCHEDULES)}"))
        if self.train == (self.schedule == "forward") and self.schedule != "auto":
            remedy = "training needs a backward: drop the schedule" if self.train else "add pipeline.train=true, or drop the schedule"
            raise InputError(describe("--set", "pipeline.schedule", self.schedule, f"does not go with pipeline.train={str(self.train).lower()}", remedy))
        if self.chunks_backward and not self.train:
            raise InputError(describe("--set", "pipeline.chunks_backward", self.chunks_backward, "must be 0 without pipeline.train=true"))

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != PipelineSettings()

    @property
    def order(self) -> str:
        """The schedule's name."""
        return self.schedule if self.schedule != "auto" else "1f1b" if self.train else "forward"

    def layer_counts(self) -> tuple[int, ...]:
        """Return the numbers in `layers`. Raises InputError if it is no list of integers >= 1."""
        words = [word.strip() for word in self.layers.split(",")] if self.layers else []
        if any(not word.isdecimal() or int(word) < 1 for word in words):
            raise InputError(describe("--set", "pipeline.layers", self.layers, "must be integers >= 1 with commas between, like 8,8,9"))
        return tuple(int(word) for word in words)
