"""Copies of experts over serial links, one or two hops (NVMe → DRAM → device), as closed recurrences on one clock.

`FifoPath`: every link is a stream that runs its copies in the order of issue, each one waiting for its own disk read.
`PriorityPath`: demanded copies go first; a prefetch is cut into chunks and gives way, or is cancelled, at the next chunk
border. Within a class the order is that of issue, and a copy that has begun goes on. Seconds; keys as in `cache`.
`arrival[key]` is when an expert can be used: inf while that is not decided yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

NO_DISK = -1.0


class FifoPath:
    """Links in order of issue; nothing is ever preempted or cancelled, so every arrival is known at once."""

    chunked = False

    def __init__(self, num_keys: int) -> None:
        self.arrival = [0.0] * num_keys
        self._staged = [0.0] * num_keys
        self._host_free = self._disk_free = 0.0
        self.host_bytes = self.disk_bytes = 0.0

    def advance(self, until: float) -> None:
        """Commit what begins before `until`."""

    def push(self, key: int, now: float, host_s: float, disk_s: float, nbytes: int, *, demanded: bool) -> None:
        """Issue a copy; disk_s: `NO_DISK` where the expert is in host memory."""
        if disk_s >= 0:
            begin = self._disk_free if self._disk_free > now else now
            self._staged[key] = self._disk_free = begin + disk_s
            self.disk_bytes += nbytes
        begin = self._host_free if self._host_free > now else now
        if self._staged[key] > begin:
            begin = self._staged[key]
        self.arrival[key] = self._host_free = begin + host_s
        self.host_bytes += nbytes

    def promote(self, keys: list[int]) -> None:
        """Make prefetches demanded: they keep their place here."""

    def cancel(self, key: int) -> bool:
        """Stop a copy; here it always runs to its end."""
        return False

    def cancel_reads(self, key: int) -> bool:
        """Stop a copy whose disk read is not over; here it always runs to its end."""
        return False

    def unfinished(self) -> list[int]:
        """Return the prefetches that can still be cancelled."""
        return []

    def drain(self, now: float, stop: float = inf) -> bool:
        """Run until all demanded copies have arrived, or until `stop`; return whether they have."""
        return True

    def wait_s(self, now: float) -> float:
        """Return how long a copy demanded now would wait for the link."""
        return max(0.0, self._host_free - now)

    def finish(self) -> None:
        """Let everything that was issued run to its end."""


@dataclass(slots=True, eq=False)
class _Copy:
    """One transfer on one link, by chunks of equal size but the last."""

    key: int
    order: int
    left_s: float
    chunk_s: float
    chunks: int
    ready_s: float
    nbytes: int
    left_bytes: float
    chunk_bytes: float


class _Link:
    """A serial server with two classes; `arrival` by key takes the end of every copy that is complete."""

    def __init__(self, chunk_bytes: float | None, arrival: dict[int, float] | list[float]) -> None:
        self.chunk_bytes = chunk_bytes
        self.free = 0.0
        self.low: dict[int, _Copy] = {}
        self.high: dict[int, _Copy] = {}
        self.current: _Copy | None = None
        self.arrival = arrival
        self.moved_bytes = 0.0

    def push(self, key: int, order: int, seconds: float, nbytes: int, ready: float, demanded: bool) -> None:
        size = self.chunk_bytes
        chunks = 1 if size is None or nbytes <= size else ceil(nbytes / size - 1e-9)
        share = 1.0 if chunks == 1 or size is None else size / nbytes
        copy = _Copy(key, order, seconds, seconds * share, chunks, ready, nbytes, float(nbytes), nbytes * share)
        (self.high if demanded else self.low)[key] = copy

    def _complete(self, copy: _Copy, end: float) -> None:
        self.free = end
        self.moved_bytes += copy.left_bytes
        self.arrival[copy.key] = end
        self.current = None

    def run_low(self, until: float) -> None:
        """Commit every chunk of a prefetch that begins before `until` (or takes no time and begins by then)."""
        low = self.low
        while low:
            copy = self._next(low, True)
            begin = self.free if self.free > copy.ready_s else copy.ready_s
            if begin > until or (begin == until and copy.left_s > 0) or begin == inf:
                return
            end = begin + copy.left_s
            if end > until and copy.chunks > 1:
                number = max(1, ceil((until - begin) / copy.chunk_s))
                if number < copy.chunks:
                    copy.chunks -= number
                    copy.left_s -= number * copy.chunk_s
                    copy.left_bytes -= number * copy.chunk_bytes
                    self.moved_bytes += number * copy.chunk_bytes
                    self.free = begin + number * copy.chunk_s
                    self.current = copy
                    return
            del low[copy.key]
            self._complete(copy, end)

    def _next(self, queue: dict[int, _Copy], in_order: bool) -> _Copy:
        """Return the copy that has begun, else the one that can begin first, among equals the one issued first (where it is first in line)."""
        current = self.current
        if current is not None and queue.get(current.key) is current:
            return current
        best: _Copy | None = None
        best_begin = inf
        for copy in queue.values():
            begin = self.free if self.free > copy.ready_s else copy.ready_s
            if best is None or begin < best_begin or (begin == best_begin and copy.order < best.order):
                best, best_begin = copy, begin
                if in_order and begin == self.free:
                    break
        assert best is not None
        return best

    def drain(self, now: float, stop: float) -> bool:
        """Serve the demanded copies; prefetches fill the gaps in which none of them is ready."""
        self.free = max(self.free, now)
        while self.high:
            copy = self._next(self.high, False)
            begin = max(self.free, copy.ready_s)
            if begin > self.free:
                if begin > stop:
                    self.run_low(stop)
                    return False
                self.run_low(begin)
                if self.free > begin:
                    continue
            del self.high[copy.key]
            self._complete(copy, begin + copy.left_s)
        return True

    def promote(self, key: int) -> None:
        if key in self.low:
            self.high[key] = self.low.pop(key)

    def cancel(self, key: int) -> bool:
        return self.low.pop(key, None) is not None


class PriorityPath:
    """Links that serve demanded copies first and cut prefetches at chunk borders."""

    chunked = True

    def __init__(self, num_keys: int, *, host_chunk: float | None, disk_chunk: float | None) -> None:
        self.arrival = [0.0] * num_keys
        self._read: dict[int, float] = {}
        self._host, self._disk = _Link(host_chunk, self.arrival), _Link(disk_chunk, self._read)
        self._read_end = [0.0] * num_keys
        self._order = 0

    @property
    def host_bytes(self) -> float:
        """Bytes moved to the device."""
        return self._host.moved_bytes

    @property
    def disk_bytes(self) -> float:
        """Bytes read from the disk."""
        return self._disk.moved_bytes

    def advance(self, until: float) -> None:
        """Commit what begins before `until`."""
        disk, host = self._disk, self._host
        if disk.low:
            disk.run_low(until)
        if self._read:
            self._hand_over()
        if host.low:
            host.run_low(until)

    def _hand_over(self) -> None:
        for key, end in self._read.items():
            self._read_end[key] = end
            copy = self._host.high.get(key) or self._host.low.get(key)
            if copy is not None:
                copy.ready_s = end
        self._read.clear()

    def push(self, key: int, now: float, host_s: float, disk_s: float, nbytes: int, *, demanded: bool) -> None:
        """Issue a copy; disk_s: `NO_DISK` where the expert is in host memory."""
        self._order += 1
        self.arrival[key] = inf
        if disk_s >= 0:
            self._disk.push(key, self._order, disk_s, nbytes, now, demanded)
            now = inf
        elif self._read_end[key] > now:
            now = self._read_end[key]
        self._host.push(key, self._order, host_s, nbytes, now, demanded)

    def promote(self, keys: list[int]) -> None:
        """Make prefetches demanded; they go before younger demands."""
        for key in keys:
            self._disk.promote(key)
            self._host.promote(key)

    def cancel(self, key: int) -> bool:
        """Stop a prefetch at the next chunk border; return whether there was anything left to stop."""
        self._disk.cancel(key)
        return self._host.cancel(key)

    def cancel_reads(self, key: int) -> bool:
        """Stop a prefetch whose disk read is not over; return whether there was one."""
        return key in self._disk.low and self.cancel(key)

    def unfinished(self) -> list[int]:
        """Return the prefetches that can still be cancelled."""
        return list(self._host.low)

    def drain(self, now: float, stop: float = inf) -> bool:
        """Run until all demanded copies have arrived, or until `stop`; return whether they have."""
        if self._disk.high:
            self._disk.drain(now, inf)
            self._hand_over()
        return self._host.drain(now, stop)

    def wait_s(self, now: float) -> float:
        """Return how long a copy demanded now would wait for the link."""
        return max(0.0, self._host.free - now) + sum(copy.left_s for copy in self._host.high.values())

    def finish(self) -> None:
        """Let everything that was issued run to its end."""
        self.advance(inf)
