"""Progress lines with the time left."""

import sys
import time

SECONDS_UNTIL_TOLD = 1.0  # less says little of what is to come


class Progress:
    """Prints `label: 300/1,200 images, 25 %, 41/s, 0:22 left`.

    On a terminal the line is rewritten; elsewhere (a log) a line appears every few seconds, and the
    first as soon as it can say how long the rest will take.
    """

    def __init__(self, label: str, total: int, unit: str, *, seconds_between: float = 10.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._terminal = sys.stdout.isatty()
        self._seconds_between = 0.5 if self._terminal else seconds_between
        self._started = self._printed = time.monotonic()
        # what was done at the first call, when, and the share of the work that it was
        self._first: tuple[int, float, float] | None = None
        self._told = False  # how long it will take

    def __call__(self, done: int, note: str = "", *, share: float | None = None) -> None:
        """Report that `done` of the total are done, those of an earlier attempt included.

        `share` is that of the work, where some of what is counted takes longer than other.
        """
        done = min(done, self.total)  # the last batch may go beyond
        share = done / self.total if share is None else share
        now = time.monotonic()
        if self._first is None:  # what was there before this run says nothing about its speed
            self._first = done, now, share
        tells = share > self._first[2] and now - self._first[1] >= SECONDS_UNTIL_TOLD
        waited = self._seconds_between if self._told or not tells else 0.0
        if done < self.total and now - self._printed < waited:
            return
        self._told = self._told or tells
        self._printed = now
        line = f"{self.label}: {done:,}/{self.total:,} {self.unit}, {done / self.total:.0%}"
        first, since, first_share = self._first
        if done > first and now > since:
            speed = (done - first) / (now - since)
            line += f", {speed:,.0f}/s" if speed >= 10 else f", {speed:.2g}/s"
            if done < self.total and share > first_share:
                left = (1 - share) / (share - first_share) * (now - since)
                line += f", {clock(left)} left"
        if done == self.total:
            line += f", took {clock(now - self._started)}"
        if note:
            line += f", {note}"
        if self._terminal:
            print(f"\r\033[K{line}", end="\n" if done >= self.total else "", flush=True)
        else:
            print(line, flush=True)


def clock(seconds: float) -> str:
    """`75` -> `1:15`; from an hour on `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
