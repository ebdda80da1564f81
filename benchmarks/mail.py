"""Measure what mail costs a request when the mail server is not next door.

A relay makes every byte take half a round trip in each direction; behind it are mail
servers with STARTTLS and AUTH. Measured is the time to the response of a view that
sends mail, in-process, next to the other ways to get mail out of a view's way. All
contenders are measured in the same rounds.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import statistics
import time
import typing as t

import flask_mail
from flask import Flask

from flask_apitask import ApiTask

from . import beside
from . import contenders
from . import mail_servers
from . import relay
from . import results
from . import timing
from .contenders import OURS

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .contenders import Body
    from .contenders import Limits
    from .contenders import Work
    from .mail_servers import Servers
    from .results import Result

KEEPALIVE_SECONDS: t.Final = 0.5
GRACE_SECONDS: t.Final = 1.0
# By the number of mails. The more of them, and the further away the server, the less
# a round differs from the next, and the longer it takes.
ROUNDS: t.Final = {1: 5, 3: 3, 10: 3}
MANY: t.Final = 500


class Link(t.NamedTuple):
    """A way to a mail server."""

    port: int
    cafile: str


class Case(t.NamedTuple):
    """What is measured: to which server, how far away, and what the view does."""

    server: str
    rtt_ms: int
    mails: int
    work_ms: int

    def __str__(self) -> str:
        plural = "s" if self.mails > 1 else ""
        label = f"{self.server}, {self.rtt_ms} ms away, {self.mails} mail{plural}"
        return label + (f", {self.work_ms} ms of work" if self.work_ms else "")


def in_the_view(app: Flask, limits: Limits) -> Body:
    """Send as Flask-Mail does: or, when it is rerouted, as Flask-ApiTask does."""

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            work()

    return body


def in_one_block(app: Flask, limits: Limits) -> Body:
    """Send all in a ``with mail.connect()`` block, over one connection."""

    def body(work: Work, count: int) -> None:
        with app.extensions["mail"].connect() as connection:
            for _ in range(count):
                connection.send(make_message())

    return body


class Contender(t.NamedTuple):
    """One way to send the mail of a request.

    :param label: what plots call it.
    :param head: what tables call it.
    :param config: further keys of the app's configuration; ours are all default but
        for the flag and the certificate's authority.
    """

    label: str
    head: str
    set_up: contenders.SetUp
    config: dict[str, t.Any] | None = None


ON: t.Final = {"APITASK_MAIL_BACKGROUND": True}
ONCE: t.Final = ON | {"APITASK_MAIL_KEEPALIVE": 0}

CONTENDERS: t.Final = {
    "inline": Contender("Flask-Mail", "Flask-Mail", in_the_view),
    "thread": Contender("Thread per mail", "Thread", contenders.thread_per_task),
    "request_pool": Contender(
        "ThreadPoolExecutor per request", "Executor", contenders.pool_per_request
    ),
    "flask_executor": Contender(
        "Flask-Executor", "Flask-Executor", contenders.flask_executor
    ),
    "no_keepalive": Contender(
        "Flask-ApiTask, no keepalive", "no keepalive", in_the_view, ONCE
    ),
    "inline_block": Contender("Flask-Mail, connect()", "connect()", in_one_block),
    "apitask_block": Contender(
        "Flask-ApiTask, connect()", "our connect()", in_one_block, ON
    ),
    OURS: Contender("Flask-ApiTask", "ours", in_the_view, ON),
}
QUICK: t.Final = ("inline", "thread", OURS)


def make_message() -> flask_mail.Message:
    """Make a short mail to one recipient."""
    body = "Thank you for your order.\n" * 20
    return flask_mail.Message("Your order", ["ada@example.com"], body)


@contextlib.contextmanager
def calls(
    names: cabc.Iterable[str], link: Link, mails: int, work_ms: int = 0, **config: t.Any
) -> cabc.Iterator[dict[str, timing.Call]]:
    """Give what takes one request, for each of the contenders *names*."""
    made = {
        name: build(CONTENDERS[name], link, mails, work_ms, config) for name in names
    }

    try:
        yield made
    finally:
        # An app takes its threads and connections along.
        made.clear()
        gc.collect()


def build(
    contender: Contender, link: Link, mails: int, work_ms: int, config: dict[str, t.Any]
) -> timing.Call:
    """Build an app whose view sends *mails* and works, and return its request.

    :raises RuntimeError: Not all of the mail was delivered when a request was over.
    """
    app = Flask("benchmarks")
    app.config.update(
        MAIL_SERVER=beside.HOST,
        MAIL_PORT=link.port,
        MAIL_USE_TLS=True,
        MAIL_USERNAME=mail_servers.USER,
        MAIL_PASSWORD=mail_servers.PASSWORD,
        MAIL_DEFAULT_SENDER="shop@example.com",
        APITASK_MAIL_TLS_VERIFY=link.cafile,
        **(contender.config or {}) | config,
    )
    mail = flask_mail.Mail(app)
    delivered: list[object] = []

    if contender.config:
        ApiTask(app)

    body = contender.set_up(app, contenders.LIMITS)

    @app.get("/")
    def view() -> str:
        body(lambda: mail.send(make_message()), mails)

        if work_ms:
            time.sleep(work_ms / 1e3)

        return "done"

    def note(sender: object, message: flask_mail.Message) -> None:
        delivered.append(message)

    request = timing.request(app)

    def call() -> None:
        delivered.clear()

        # Flask-Mail sends it when a server has taken a message.
        with flask_mail.email_dispatched.connected_to(note, app):
            request()

        if len(delivered) != mails:
            raise RuntimeError(
                f"{contender.label} delivered {len(delivered)} of {mails} messages"
                " before the request was over."
            )

    return call


def measure(
    names: cabc.Iterable[str], link: Link, case: Case, rounds: int
) -> dict[str, float]:
    """Return the median of the milliseconds to the response."""
    with calls(names, link, case.mails, case.work_ms) as made:
        samples: dict[str, list[float]] = {name: [] for name in made}
        # It keeps its connections from then on. Nobody else keeps any.
        made[OURS]()

        for name in timing.take_turns(made, rounds):
            samples[name].append(timing.seconds(made[name]) * 1e3)

    return {
        name: round(statistics.median(values), 2) for name, values in samples.items()
    }


@contextlib.contextmanager
def counting(port: int, cafile: str) -> cabc.Iterator[tuple[relay.Relay, Link]]:
    """Run a relay in this process, which can be asked what it has counted."""
    with (
        socket.create_server((beside.HOST, 0)) as listener,
        relay.Relay(listener, port, 0.01) as running,
    ):
        yield running, Link(listener.getsockname()[1], cafile)


def count_round_trips(
    names: cabc.Iterable[str], port: int, cafile: str
) -> dict[str, int]:
    """Count how often one mail of a warm contender has to wait for the server."""
    counts = {}

    with counting(port, cafile) as (counter, link), calls(names, link, 1) as made:
        for name, call in made.items():
            call()
            before = counter.flights
            call()
            counts[name] = counter.flights - before

    return counts


def count_sockets(port: int, cafile: str) -> dict[str, int]:
    """Count ours after a request of three mails, and after the keepalive."""
    with (
        counting(port, cafile) as (counter, link),
        calls([OURS], link, 3, APITASK_MAIL_KEEPALIVE=KEEPALIVE_SECONDS) as made,
    ):
        made[OURS]()
        kept = counter.open
        time.sleep(KEEPALIVE_SECONDS + GRACE_SECONDS)
        return {"kept": kept, "after_keepalive": counter.open}


def cases(servers: cabc.Iterable[str], quick: bool) -> cabc.Iterator[tuple[Case, int]]:
    """Yield what to measure, and in how many rounds.

    To measure every combination would take a quarter of an hour.
    """
    if quick:
        for mails in (1, 3):
            yield Case("no PIPELINING", 20, mails, 0), ROUNDS[mails]
            yield Case("PIPELINING", 20, mails, 0), ROUNDS[mails]

        return

    for server in servers:
        for mails, rounds in ROUNDS.items():
            yield Case(server, 20, mails, 0), rounds

    yield Case("PIPELINING", 5, MANY, 0), 1

    for rtt_ms, work_ms in ((20, 50), (5, 0), (80, 0)):
        for mails, rounds in ROUNDS.items():
            few = max(1, rounds // 2) if rtt_ms > 20 else rounds
            yield Case("PIPELINING", rtt_ms, mails, work_ms), few


def report(result: Result) -> str:
    """Lay out what was measured: ratios and round trips."""
    names = list(result["cases"][0]["median_ms"])
    peers = [CONTENDERS[name].head for name in names if name != OURS]
    heads = [CONTENDERS[name].head for name in names]
    trips = [
        (server, *(str(counts[name]) for name in names))
        for server, counts in result["round_trips"].items()
    ]
    head = ("ours / each other", "ours, ms", *peers)
    return "\n\n".join(
        [
            results.table(head, map(_row, result["cases"])),
            results.table(("round trips of one mail", *heads), trips),
        ]
    )


def _row(case: Result) -> list[str]:
    medians = case["median_ms"]
    label = str(Case(*(case[field] for field in Case._fields)))
    ratios = [medians[OURS] / medians[name] for name in medians if name != OURS]
    return [label, f"{medians[OURS]:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]


def _measure_all(servers: Servers, quick: bool) -> Result:
    """Measure everything; the relay stays while its cases are measured."""
    names = QUICK if quick else tuple(CONTENDERS)
    measured = []

    with contextlib.ExitStack() as stack:
        links: dict[tuple[str, int], Link] = {}

        for case, rounds in cases(servers.ports, quick):
            if (where := (case.server, case.rtt_ms)) not in links:
                slow = relay.beside_us(servers.ports[case.server], case.rtt_ms / 1e3)
                links[where] = Link(stack.enter_context(slow), servers.cafile)

            medians = measure(names, links[where], case, rounds)
            measured.append(case._asdict() | {"median_ms": medians})
            print("  ".join(_row(measured[-1])), flush=True)

    return {
        "cases": measured,
        "round_trips": {
            label: count_round_trips(names, port, servers.cafile)
            for label, port in servers.ports.items()
        },
        "sockets": count_sockets(servers.ports["PIPELINING"], servers.cafile),
    }


def main() -> None:
    """Measure, print and write."""
    options = results.arguments(__doc__)

    with mail_servers.running() as servers:
        if "Postfix" not in servers.ports:
            print("Postfix is not installed, or this is not root: without it.")

        result = _measure_all(servers, options.quick)

    print(f"\n{report(result)}")
    results.write(options.output, "mail", result)


if __name__ == "__main__":
    main()
