"""Progress lines with the time left."""

import sys
import time


class Progress:
    """Prints `label: 300/1,200 images, 25 %, 41/s, 0:22 left`.

    On a terminal the line is rewritten; elsewhere (a log) a line appears every few seconds.
    """

    def __init__(self, label: str, total: int, unit: str, *, seconds_between: float = 10.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._terminal = sys.stdout.isatty()
        self._seconds_between = 0.5 if self._terminal else seconds_between
        self._started = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done at the first call, and when

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` of the total are done, those of an earlier attempt included."""
        done = min(done, self.total)  # the last batch may go beyond
        now = time.monotonic()
        if self._first is None:  # what was there before this run says nothing about its speed
            self._first = done, now
        if done < self.total and now - self._printed < self._seconds_between:
            return
        self._printed = now
        line = f"{self.label}: {done:,}/{self.total:,} {self.unit}, {done / self.total:.0%}"
        first, since = self._first
        if done > first and now > since:
            speed = (done - first) / (now - since)
            line += f", {speed:,.0f}/s" if speed >= 10 else f", {speed:.2g}/s"
            if done < self.total:
                line += f", {clock((self.total - done) / speed)} left"
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
