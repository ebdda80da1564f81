"""Measure what a request pays for its tasks, in-process, next to the peers.

Each case is a number of tasks of one kind. All contenders are measured in the same
rounds; what is reported is the median, over the rounds, of what a request takes
longer than one of the bare app in the same round.
"""

from __future__ import annotations

import statistics
import typing as t

from . import contenders
from . import results
from . import timing

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .contenders import Work

NO_OP: t.Final = "no-op"
# As it is in a server, where a request is read from a socket.
NO_OP_AFTER_IO: t.Final = "no-op, I/O between requests"
IO: t.Final = "5 ms of I/O"
CASES: t.Final[tuple[tuple[str, Work, int], ...]] = (
    *((kind, timing.no_op, n) for kind in (NO_OP, NO_OP_AFTER_IO) for n in (1, 4, 16)),
    (IO, timing.wait_for_io, 8),
)
MICROSECONDS: t.Final = 1e6


def measure(
    work: Work,
    count: int,
    names: cabc.Iterable[str],
    rounds: int,
    batch: float = 0.005,
    between: timing.Call = timing.no_op,
) -> dict[str, dict[str, float]]:
    """Measure *count* tasks of *work* for the contenders *names* and the bare app."""
    calls = {
        name: timing.request(contenders.build(name, work, count)) for name in names
    }
    medians = timing.interleave(calls, rounds, batch, between)
    return {name: _summary(medians[name], medians["bare"]) for name in medians}


def _summary(medians: list[float], bare: list[float]) -> dict[str, float]:
    over = [mine - other for mine, other in zip(medians, bare, strict=True)]
    return {
        "request_us": round(statistics.median(medians) * MICROSECONDS, 2),
        "over_bare_us": round(statistics.median(over) * MICROSECONDS, 2),
    }


def main() -> None:
    """Measure, print and write all cases."""
    options = results.arguments(__doc__)

    for name in contenders.HEADLINE:
        contenders.verify(name)

    rounds = 25 if options.quick else 60
    names = ("bare", "inline", *contenders.HEADLINE)
    # The differences between these are small, and need more of them.
    idle = measure(timing.no_op, 0, contenders.WITHOUT_TASKS, rounds * 5, batch=0.01)
    measured = [{"work": NO_OP, "tasks": 0, "contenders": idle}]

    with timing.round_trip() as round_trip:
        for kind, work, count in CASES:
            between = round_trip if kind == NO_OP_AFTER_IO else timing.no_op
            figures = measure(work, count, names, rounds, between=between)
            measured.append({"work": kind, "tasks": count, "contenders": figures})

    print(results.dump(measured))
    results.write(options.output, "dispatch", {"cases": measured})


if __name__ == "__main__":
    main()
