"""Serving: the settings `serving.…`; their names are those of the serving engines where these have one."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import InputError, describe

BATCHES = ("mixed", "separate")
HANDOVER = ("pull", "reserve")
ALL2ALL = ("auto", "exchange", "gather")
PREEMPTION = ("recompute", "swap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """Settings of the group `serving`; they act where requests drive the steps."""

    max_num_seqs: int = 256
    """Sequences that one attention replica runs at most."""
    max_num_batched_tokens: int = 8192
    """New tokens of one step of an attention replica at most."""
    max_model_len: int = 0
    """Most tokens of a request, prompt and output; longer ones are refused. 0: the model's own limit."""
    block_size: int = 16
    """Tokens of a KV block."""
    num_gpu_blocks: int = 0
    """KV blocks of an attention replica; 0: what weights and activations leave of the memory."""
    memory_share: float = 0.9
    """Share of the device memory that may be used."""
    chunked_prefill: bool = True
    """Whether a prompt may be split over steps; if not, it waits until it fits into one, and one over the budget runs alone."""
    batches: str = "mixed"
    """`mixed`: a step decodes and prefills; `separate`: prompts first, in steps of their own."""
    preemption: str = "recompute"
    """What happens to a sequence that gives its KV blocks up: `recompute` or `swap` (to the host, over its link)."""
    admission_reserve: float = 0.0
    """Share of the tokens that running requests have yet to make which stays free when one is admitted, which then needs room for all its own; 0: none
    does, and sequences are preempted when blocks run out (vLLM). 1: nobody is ever preempted (TensorRT-LLM)."""
    schedule_ahead: bool = False
    """Whether the batch of a step is chosen when the step before it begins, as hosts do that work ahead of the device: what arrives meanwhile waits for one
    step more."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share KV blocks; takes effect where the requests have block ids."""
    all2all: str = "auto"
    """How tokens reach their experts: `exchange` (all-to-all kernels), `gather` (all tokens on all ranks, then reduce), or the faster of both."""
    expert_tp: int = 1
    """Ranks that share one expert."""
    pp: int = 1
    """Pipeline stages of an instance; as many batches are in flight."""
    instances: int = 1
    """Equal instances, each with its own queues."""
    prefill_instances: int = 0
    """Instances that only prefill and hand the KV cache over; 0: every instance does both."""
    handover: str = "pull"
    """With prefill instances, when a decoding one gives a request its KV blocks: `pull`, after the prompt was computed; `reserve`, before (SGLang)."""
    acceptance: float = 1.0
    """Tokens that a decoding sequence gains per step: more than 1 with speculative decoding."""
    draft_tokens: int = 0
    """Drafted tokens that a step verifies per decoding sequence."""
    draft_us: float = 0.0
    """Time of drafting, per step that decodes, µs."""
    sequence_us: float = 0.0
    """Host time per running sequence of a step – scheduling, stop conditions, tokens to text – that no device work hides, µs."""
    clients: int = 0
    """Closed loop: requests in flight, arrival times are ignored; 0: as the trace says."""
    client_us: float = 0.0
    """Closed loop: time in which the front end and the client bring the next request to the scheduler after one has ended, µs."""
    slo_ttft_ms: float = 0.0
    """Time to the first token that a good request meets, ms; 0: any."""
    slo_tpot_ms: float = 0.0
    """Time per output token that a good request meets, ms; 0: any."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_num_seqs", 1, 1 << 16),
            ("max_num_batched_tokens", 1, 1 << 20),
            ("max_model_len", 0, 1 << 24),
            ("block_size", 1, 4096),
            ("num_gpu_blocks", 0, 1 << 40),
            ("expert_tp", 1, 1024),
            ("pp", 1, 1024),
            ("instances", 1, 65536),
            ("prefill_instances", 0, 65536),
            ("acceptance", 1, 64),
            ("draft_tokens", 0, 63),
            ("admission_reserve", 0, 1),
            ("draft_us", 0, 1e9),
            ("sequence_us", 0, 1e9),
            ("clients", 0, 1 << 20),
            ("client_us", 0, 1e12),
            ("slo_ttft_ms", 0, 1e12),
            ("slo_tpot_ms", 0, 1e12),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(describe("--set", f"serving.{name}", value, f"must be in {low}..{high}"))
        if not 0 < self.memory_share <= 1:
            raise InputError(describe("--set", "serving.memory_share", self.memory_share, "must be in (0, 1]"))
        for name, allowed in (("batches", BATCHES), ("preemption", PREEMPTION), ("all2all", ALL2ALL), ("handover", HANDOVER)):
            if getattr(self, name) not in allowed:
                raise InputError(describe("--set", f"serving.{name}", getattr(self, name), f"must be one of {', '.join(allowed)}"))
        if self.acceptance > 1 + self.draft_tokens:
            rule = f"must be <= 1 + serving.draft_tokens = {1 + self.draft_tokens}: a step gives one token and the accepted drafts"
            raise InputError(describe("--set", "serving.acceptance", self.acceptance, rule))
        if self.max_num_batched_tokens < self.max_num_seqs * (1 + self.draft_tokens):
            rule = f"must be >= max_num_seqs × (1 + draft_tokens) = {self.max_num_seqs * (1 + self.draft_tokens)}: a step decodes every running sequence"
            raise InputError(describe("--set", "serving.max_num_batched_tokens", self.max_num_batched_tokens, rule))

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != ServingSettings()
