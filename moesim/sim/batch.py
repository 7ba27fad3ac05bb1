"""What a forward pass carries on every rank, beside its routing: how many tokens of which phase, how much context.

Shapes: P passes, R source ranks, T tokens of one pass. Counts are tokens and sequences; context is KV entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """Tokens, sequences and context of every rank in P passes."""

    prefill_tokens_PR: np.ndarray
    """float64: new prompt tokens."""
    prefill_seqs_PR: np.ndarray
    """float64: sequences that they belong to."""
    prefill_context_PR: np.ndarray
    """float64: mean KV length of these sequences at the end of the pass."""
    decode_tokens_PR: np.ndarray
    """float64: tokens that decode."""
    decode_seqs_PR: np.ndarray
    """float64: sequences that they belong to: as many, fewer where drafts are verified."""
    decode_context_PR: np.ndarray
    """float64: mean KV length of the decoding sequences, the new tokens included."""

    @property
    def num_passes(self) -> int:
        """P."""
        return int(self.prefill_tokens_PR.shape[0])

    @property
    def tokens_PR(self) -> np.ndarray:
        """float64 [P, R]: all tokens of a rank."""
        return self.prefill_tokens_PR + self.decode_tokens_PR

    @property
    def is_prefill_P(self) -> np.ndarray:
        """bool [P]: does the pass hold any prompt token (then it runs as a prefill pass)?"""
        return np.asarray((self.prefill_tokens_PR > 0).any(axis=1))

    @property
    def kv_entries_PR(self) -> np.ndarray:
        """float64 [P, R]: KV entries of the sequences in the pass."""
        return self.prefill_seqs_PR * self.prefill_context_PR + self.decode_seqs_PR * self.decode_context_PR

    def grouped(self, size: int) -> PassShape:
        """Return the shape in which every rank carries what its group of `size` consecutive ranks carries (attention TP)."""
        if size == 1:
            return self

        def total(value_PR: np.ndarray) -> np.ndarray:
            passes, ranks = value_PR.shape
            return np.repeat(value_PR.reshape(passes, ranks // size, size).sum(axis=2), size, axis=1)

        prefill, decode = total(self.prefill_seqs_PR), total(self.decode_seqs_PR)
        return PassShape(
            prefill_tokens_PR=total(self.prefill_tokens_PR),
            prefill_seqs_PR=prefill,
            prefill_context_PR=total(self.prefill_seqs_PR * self.prefill_context_PR) / np.maximum(prefill, 1),
            decode_tokens_PR=total(self.decode_tokens_PR),
            decode_seqs_PR=decode,
            decode_context_PR=total(self.decode_seqs_PR * self.decode_context_PR) / np.maximum(decode, 1),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one micro-batch of a pass; sorted by source rank."""

    shape: PassShape
    experts_TLK: np.ndarray
    rank_T: np.ndarray
    valid_TLK: np.ndarray | None
    weights_TLK: np.ndarray | None = None
    """Router weights, where they were recorded; decisions about missing experts look at them."""
    predicted_TLK: np.ndarray | None = None
    """Predicted experts, where they were recorded."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass as a trace gives it; the passes of a run have equally many micro-batches."""

    step: int
    shape: PassShape
    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens over all ranks."""
        return sum(len(part.rank_T) for part in self.parts)


def pass_shape(*, rank_T: np.ndarray, phase_T: np.ndarray, request_T: np.ndarray, position_T: np.ndarray, num_ranks: int) -> PassShape:
    """Return the shape (P = 1) of a pass from its tokens; a sequence is a (rank, request) pair."""
    result: dict[str, np.ndarray] = {}
    for name, code in (("prefill", PREFILL), ("decode", DECODE)):
        rows = phase_T == code if code == DECODE else phase_T != DECODE
        rank, request, position = rank_T[rows].astype(np.int64), request_T[rows], position_T[rows].astype(np.float64)
        result[f"{name}_tokens_PR"] = np.bincount(rank, minlength=num_ranks).astype(np.float64)[None]
        order = np.lexsort((request, rank))
        rank, request, position = rank[order], request[order], position[order]
        first = np.flatnonzero(np.r_[True, (rank[1:] != rank[:-1]) | (request[1:] != request[:-1])]) if len(rank) else np.zeros(0, dtype=np.int64)
        last_position = np.maximum.reduceat(position, first) if len(first) else np.zeros(0)
        seqs = np.bincount(rank[first], minlength=num_ranks).astype(np.float64)
        context = np.bincount(rank[first], weights=last_position + 1, minlength=num_ranks)
        result[f"{name}_seqs_PR"] = seqs[None]
        result[f"{name}_context_PR"] = (context / np.maximum(seqs, 1))[None]
    return PassShape(**result)


def micro_batch_T(rank_T: np.ndarray, parts: int) -> np.ndarray:
    """Return int64 [T]: the micro-batch of every token; each rank (ascending in `rank_T`) splits its tokens in order, as evenly as they go."""
    count_R = np.bincount(rank_T)
    first_R = np.cumsum(count_R) - count_R
    return (np.arange(len(rank_T)) - first_R[rank_T]) * parts // count_R[rank_T]


def stack(shapes: Sequence[PassShape]) -> PassShape:
    """Join the passes of several shapes."""
    return PassShape(**{field.name: np.concatenate([getattr(shape, field.name) for shape in shapes]) for field in fields(PassShape)})
