"""One attention replica: its queue, its KV pool, and the batch that its next step runs.

The rules are those of vLLM's v1 scheduler. A step first takes what already runs: every decoding sequence gets one token (or the drafts that it verifies),
every partial prompt a chunk, as far as `max_num_batched_tokens` goes. A sequence that lacks KV blocks has the youngest running sequence preempted, at
worst itself; a prompt waits instead where batches of other pipeline stages hold blocks. If nobody was preempted, the queue is served in order of arrival
while there is budget, a free sequence slot (`max_num_seqs`), and blocks for the chunk; with `admission_reserve` for the whole request, beside a share of
what the running ones have yet to make, as SGLang and TensorRT-LLM admit. A preempted sequence goes to the head of the queue and computes its prompt and its
tokens again, or comes back from the host. `separate` batches: while a prompt can run, nothing decodes. A sequence whose last prompt chunk has run has its
first token and decodes from the next step on.

Decoding sequences are not visited step by step: a lane (one batch of a pipeline) knows their number and the sum of their contexts, and a calendar says at
which of its decode steps a sequence needs a block or ends. So a step costs what happens in it, not what runs.
"""

from __future__ import annotations

from collections import deque
from math import ceil

from moesim.sim.serving.kv import KvPool
from moesim.sim.serving.sequences import Lane, Sequence, Work
from moesim.sim.serving.settings import ServingSettings


class Replica:
    """Scheduler state of one attention replica."""

    def __init__(self, settings: ServingSettings, *, blocks: int, id_tokens: int, lanes: int) -> None:
        self.settings = settings
        self.pool = KvPool(blocks, settings.block_size, id_tokens if settings.prefix_cache else 0)
        self.lanes = [Lane() for _ in range(lanes)]
        self.waiting: deque[Sequence] = deque()
        self.running = 0
        self.arriving: list[Sequence] = []
        """Sequences that were given blocks for a KV cache from a prefill instance, and wait for it."""
        self.step = 0
        """Number of the step whose batch is chosen."""
        self.preemptions = 0
        self.recomputed_tokens = 0
        self._admitted = 0
        self._promised = 0
        """Blocks that the running sequences will hold in the end."""
        self._verify = 1 + settings.draft_tokens
        self._gain = settings.acceptance

    # --- one step -------------------------------------------------------------------------------------------------

    def schedule(self, lane: Lane) -> Work:
        """Choose the batch of the next step of a lane and give it its blocks."""
        work, settings, before = Work(), self.settings, self.preemptions
        budget = settings.max_num_batched_tokens
        if settings.batches == "separate" and (lane.partial or self.waiting):
            budget = self._prompts(lane, work, budget)
            if self.preemptions == before:
                self._admit(lane, work, budget)
            if work.chunks:
                return work
        if lane.decoding:
            if lane.steps in lane.needs:
                self._reserve(lane, work)
            budget -= lane.decoding * self._verify
        if settings.batches == "mixed":
            if lane.partial:
                budget = self._prompts(lane, work, budget)
            if self.waiting and self.preemptions == before:
                self._admit(lane, work, budget)
        work.decodes, work.contexts = lane.decoding, lane.contexts
        due = bool(self.waiting) and self.waiting[0].not_before > self.step
        work.settled = not work.chunks and not lane.partial and not work.swap_tokens and self.preemptions == before and not due
        return work

    def _reserve(self, lane: Lane, work: Work) -> None:
        """Give blocks to the decoding sequences that need one in this step."""
        due = lane.needs.pop(lane.steps)
        due.sort(key=lambda one: one[0].turn)
        for sequence, epoch in due:
            # A preemption for one before it may have sent it away.
            while sequence.epoch == epoch:
                length = sequence.context + (lane.steps - sequence.since) * self._gain
                if self.pool.grow(sequence.held, ceil(length - 1e-9) + self.settings.draft_tokens):
                    self._next_need(lane, sequence)
                    break
                self._preempt(self._youngest() or sequence, work)

    def _next_need(self, lane: Lane, sequence: Sequence) -> None:
        room = sequence.held.blocks * self.settings.block_size - self.settings.draft_tokens - sequence.context
        step = max(sequence.since + int(room / self._gain + 1e-9) + 1, lane.steps + 1)
        if step <= sequence.last:
            lane.needs.setdefault(step, []).append((sequence, sequence.epoch))

    def _prompts(self, lane: Lane, work: Work, budget: int) -> int:
        for sequence in list(lane.partial):
            if budget <= 0:
                break
            if sequence.lane is not lane:
                continue  # preempted for one before it
            size, decoding = min(sequence.target - sequence.computed, budget), lane.decoding
            while sequence.lane is lane and not self.pool.grow(sequence.held, sequence.computed + size):
                victim = self._youngest()
                if victim is sequence and self.running > len(lane.running):
                    return 0  # it waits for what other lanes hold: were it sent back, two such prompts could undo each other for ever
                self._preempt(victim or sequence, work)
            budget += (decoding - lane.decoding) * self._verify
            if sequence.lane is lane:
                self._chunk(lane, work, sequence, size)
                budget -= size
        return budget

    def _chunk(self, lane: Lane, work: Work, sequence: Sequence, size: int) -> None:
        sequence.computed += size
        work.chunks.append((size, sequence.computed, sequence))
        pool = self.pool
        if pool.id_tokens and sequence.request.blocks:
            pool.learn(sequence.held, sequence.request.blocks[len(sequence.held.ids) : sequence.computed // pool.id_tokens])
        if sequence.computed == sequence.target:
            lane.partial.remove(sequence)
            work.finished_prompts.append(sequence)

    def _admit(self, lane: Lane, work: Work, budget: int) -> None:
        settings, pool, waiting = self.settings, self.pool, self.waiting
        while waiting and self.running < settings.max_num_seqs:
            sequence = waiting[0]
            if sequence.not_before > self.step:
                return
            if settings.admission_reserve and not self._has_room(sequence):
                return
            if sequence.swapped or sequence.reserved or sequence.source is not None:
                # Its KV cache is elsewhere: it needs blocks, no computation.
                if not pool.grow(sequence.held, sequence.computed + 1 + settings.draft_tokens):
                    return
                waiting.popleft()
                self._enter(lane, sequence)
                if sequence.swapped:
                    sequence.swapped = False
                    work.swap_tokens += sequence.computed
                    self.decode(lane, sequence)
                else:
                    sequence.moving = True
                    self.arriving.append(sequence)
                continue
            if budget <= 0:
                return
            ids = sequence.request.blocks
            shared = ids[: pool.match(ids, sequence.target)] if ids and pool.id_tokens else ()
            left = sequence.target - len(shared) * pool.id_tokens
            if left > budget and not settings.chunked_prefill and (work.chunks or left <= settings.max_num_batched_tokens):
                return
            size = min(left, budget) if settings.chunked_prefill else left
            if not pool.fits(sequence.held, shared, len(shared) * pool.id_tokens + size):
                return
            waiting.popleft()
            self._enter(lane, sequence)
            if shared:
                pool.share(sequence.held, shared)
                sequence.computed = len(shared) * pool.id_tokens
            pool.grow(sequence.held, sequence.computed + size)
            lane.partial.append(sequence)
            self._chunk(lane, work, sequence, size)
            budget -= size

    def _final_blocks(self, sequence: Sequence) -> int:
        request, settings = sequence.request, self.settings
        return -(-(request.prompt_tokens + request.output_tokens + settings.draft_tokens) // settings.block_size)

    def _has_room(self, sequence: Sequence) -> bool:
        """Return whether a sequence can end beside the share that is reserved for what the running ones have yet to make."""
        used = self.pool.used
        outstanding = max(self._promised - used, 0)
        return self._final_blocks(sequence) + self.settings.admission_reserve * outstanding <= self.pool.capacity - used

    def _enter(self, lane: Lane, sequence: Sequence) -> None:
        sequence.lane = lane
        self._promised += self._final_blocks(sequence)
        self._admitted += 1
        sequence.turn = self._admitted
        lane.running[sequence] = None
        self.running += 1

    # --- many steps -----------------------------------------------------------------------------------------------

    def supplied(self, lane: Lane) -> int:
        """Return for how many steps after the next one the free blocks surely last."""
        if not lane.needs:
            return 1 << 30  # everything ends in the blocks that it has
        size, free, steps = self.settings.block_size, self.pool.free, lane.steps
        safe = int((free // lane.decoding - 1) * size / self._gain)
        if safe >= size:
            return safe
        # Few are left: within a block's length every sequence of the calendar takes one block at most.
        most = max(int(size / self._gain) - self.settings.draft_tokens - 1, 0)
        for step in sorted(lane.needs):
            if step > steps + most:
                break
            free -= len(lane.needs[step])
            if free < 0:
                return max(step - 1 - steps, safe)
        return max(most, safe)

    def advance(self, lane: Lane, count: int) -> None:
        """Book `count` steps in which nothing but decoding has happened, and give the blocks that the step after them needs."""
        lane.steps += count
        lane.contexts += lane.decoding * self._gain * count
        now, needs = lane.steps, lane.needs
        for step in [one for one in needs if one <= now] if needs else ():
            for sequence, epoch in needs.pop(step):
                if sequence.epoch == epoch:
                    length = ceil(sequence.context + (now - sequence.since) * self._gain - 1e-9) + self.settings.draft_tokens
                    given = self.pool.grow(sequence.held, length)
                    assert given, "the steps were supplied"
                    self._next_need(lane, sequence)

    # --- between steps --------------------------------------------------------------------------------------------

    def decode(self, lane: Lane, sequence: Sequence) -> None:
        """Let a sequence with its KV cache in place decode from the lane's next decode step on."""
        sequence.since, sequence.context = lane.steps, float(sequence.computed + 1)
        lane.decoding += 1
        lane.contexts += sequence.context
        steps = ceil((sequence.request.output_tokens - sequence.generated) / self._gain - 1e-9)
        sequence.last = lane.steps + steps - 1
        lane.ends.setdefault(sequence.last, []).append((sequence, sequence.epoch))
        if sequence.held.blocks * self.settings.block_size >= sequence.context + self.settings.draft_tokens:
            self._next_need(lane, sequence)
        else:
            lane.needs.setdefault(lane.steps, []).append((sequence, sequence.epoch))

    def stepped(self, lane: Lane) -> list[Sequence]:
        """Book a decode step that has run; return the sequences that end with it."""
        due = lane.ends.pop(lane.steps, None)
        lane.steps += 1
        lane.contexts += lane.decoding * self._gain
        done: list[Sequence] = []
        if due is None:
            return done
        for sequence, epoch in due:
            if sequence.epoch == epoch:
                self._undecode(lane, sequence)
                self.leave(lane, sequence)
                done.append(sequence)
        return done

    def leave(self, lane: Lane, sequence: Sequence) -> None:
        """Take a sequence out of its lane and its blocks back."""
        del lane.running[sequence]
        self._promised -= self._final_blocks(sequence)
        sequence.lane = None
        self.running -= 1
        self.pool.release(sequence.held)

    def _undecode(self, lane: Lane, sequence: Sequence) -> None:
        lane.decoding -= 1
        lane.contexts -= sequence.context + (lane.steps - sequence.since) * self._gain
        sequence.epoch += 1

    def _youngest(self) -> Sequence | None:
        """Return the running sequence that was admitted last, of those that are in no step now."""
        found = None
        for lane in self.lanes:
            if not lane.flying:
                one = next((one for one in reversed(lane.running) if not one.moving), None)
                if one is not None and (found is None or one.turn > found.turn):
                    found = one
        return found

    def _preempt(self, victim: Sequence, work: Work) -> None:
        """Send a running sequence back to the head of the queue."""
        lane, settings = victim.lane, self.settings
        assert lane is not None
        decoding = victim.computed == victim.target and victim not in work.finished_prompts
        if decoding:
            ran = lane.steps - victim.since
            self._undecode(lane, victim)
            victim.generated += int(ran * self._gain + 1e-9)
            victim.computed = victim.request.prompt_tokens + victim.generated - 1
        else:
            victim.epoch += 1
            if victim in lane.partial:
                lane.partial.remove(victim)
            else:
                work.finished_prompts.remove(victim)
            for chunk in [one for one in work.chunks if one[2] is victim]:
                work.chunks.remove(chunk)
                victim.computed -= chunk[0]
        self.leave(lane, victim)
        self.preemptions += 1
        if decoding and settings.preemption == "swap":
            victim.swapped = True
            victim.target = victim.computed
            work.swap_tokens += victim.computed
        else:
            self.recomputed_tokens += victim.computed
            victim.target = victim.request.prompt_tokens + victim.generated
            victim.computed = 0
        self.waiting.appendleft(victim)
