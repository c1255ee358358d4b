"""What a step allocates and frees, in order, and how it goes on with more equal layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

Parts = dict[str, int]
Event = tuple[str, int]  # a part and bytes, negative where they are freed


@dataclass(frozen=True)
class Timeline:
    """Allocations in order; what is freed between two of them is sorted, and nothing is after the
    last: the peak is the same, and the order in which a container frees its own does not count.
    """

    events: Sequence[Event]

    @classmethod
    def of(cls, events: Iterable[Event]) -> Timeline:
        ordered: list[Event] = []
        freed: list[Event] = []
        for event in events:
            if event[1] < 0:
                freed.append(event)
            elif event[1] > 0:
                ordered += [*sorted(freed), event]
                freed.clear()
        return cls(ordered)

    def at_peak(self) -> Parts:
        """The bytes alive at the (first) peak, by part."""
        live = list(accumulate(size for _, size in self.events))
        end = live.index(max(live)) + 1 if live else 0
        parts: Parts = {}
        for part, size in self.events[:end]:
            parts[part] = parts.get(part, 0) + size
        return {part: size for part, size in parts.items() if size}

    def agrees_with(self, other: Timeline) -> bool:
        """Whether the same is allocated and freed in both and is alive at the peak; small
        allocations of neighbouring layers may be in another order.
        """
        return Counter(self.events) == Counter(other.events) and self.at_peak() == other.at_peak()

    def grown(self, longer: Timeline, times: int) -> Timeline:
        """This with what ``longer`` has beside it ``times`` times.

        ``longer`` is that of one layer more. Where a loop goes over the layers it has a stretch
        of events more, and the one of yet another layer has that stretch once more.
        """
        events: list[Event] = []
        done = 0
        for start, more in _stretches(self.events, longer.events):
            events += self.events[done:start]
            events += more * times
            done = start
        return Timeline(events + list(self.events[done:]))


def _stretches(short: Sequence[Event], long: Sequence[Event]) -> list[tuple[int, list[Event]]]:
    """The stretches of ``long`` that ``short`` does not have, each with its place in ``short``."""
    found: list[tuple[int, list[Event]]] = []
    at, left = 0, len(long) - len(short)
    while left > 0:
        at += _common(short, at, long, len(long) - len(short) - left + at)
        start = len(long) - len(short) - left + at
        matched = {n: _common(short, at, long, start + n) for n in range(1, left + 1)}
        longest = max(matched.values())
        size = left if matched[left] == longest else list(matched.values()).index(longest) + 1
        found.append((at, list(long[start : start + size])))
        left -= size
    return found


def _common(short: Sequence[Event], at: int, long: Sequence[Event], place: int) -> int:
    """How many events are the same from these places on."""
    most = min(len(short) - at, len(long) - place)
    for length in range(most):
        if short[at + length] != long[place + length]:
            return length
    return most
