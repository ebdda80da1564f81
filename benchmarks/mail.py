"""Measure what mail costs a request when the mail server is not next door.

A relay makes every byte take half a round trip in each direction; behind it are mail
servers with STARTTLS and AUTH. Measured is the time to the response of a view that
sends mail, in-process, next to the other ways to get mail out of a view's way. All
contenders are measured in the same rounds.
"""

from __future__ import annotations

import collections.abc as cabc
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import random
import socket
import statistics
import sys
import threading
import time
import typing as t

import flask_mail
from flask import Flask

from flask_apitask import ApiTask

from . import contenders
from . import mail_servers
from . import measures
from . import relay
from . import results
from . import timing

if t.TYPE_CHECKING:
    from .mail_servers import Servers

THREADS: t.Final = 8
KEEPALIVE_SECONDS: t.Final = 0.5
GRACE_SECONDS: t.Final = 1.0
# By the number of mails. The more of them, and the further away the server, the less
# a round differs from the next, and the longer it takes.
ROUNDS: t.Final = {1: 5, 3: 3, 10: 3}
MANY: t.Final = 500
QUICK_MANY: t.Final = 20
OURS: t.Final = "apitask"

Wait: t.TypeAlias = cabc.Callable[[], object]
Send: t.TypeAlias = cabc.Callable[[flask_mail.Message], object]
Start: t.TypeAlias = cabc.Callable[[Send, list[flask_mail.Message]], Wait]


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


def nothing() -> None:
    """Wait for what has been waited for, or will be."""


def in_the_view(app: Flask) -> Start:
    """Send as Flask-Mail does: or, when it is rerouted, as Flask-ApiTask does."""

    def start(send: Send, messages: list[flask_mail.Message]) -> Wait:
        for message in messages:
            send(message)

        return nothing

    return start


def in_one_block(app: Flask) -> Start:
    """Send all in a ``with mail.connect()`` block, over one connection."""

    def start(send: Send, messages: list[flask_mail.Message]) -> Wait:
        with app.extensions["mail"].connect() as connection:
            for message in messages:
                connection.send(message)

        return nothing

    return start


def thread_per_mail(app: Flask) -> Start:
    """Start a thread per mail, join them at the end of the view."""

    def start(send: Send, messages: list[flask_mail.Message]) -> Wait:
        works = [functools.partial(send, message) for message in messages]
        threads = [
            threading.Thread(target=contenders.in_app_context, args=(app, work))
            for work in works
        ]

        for thread in threads:
            thread.start()

        def join() -> None:
            for thread in threads:
                thread.join()

        return join

    return start


def pool_per_request(app: Flask) -> Start:
    """Start a ``ThreadPoolExecutor`` per request, shut it down at the view's end."""

    def start(send: Send, messages: list[flask_mail.Message]) -> Wait:
        pool = concurrent.futures.ThreadPoolExecutor(THREADS)

        for message in messages:
            work = functools.partial(send, message)
            pool.submit(contenders.in_app_context, app, work)

        return pool.shutdown

    return start


def flask_executor(app: Flask) -> Start:
    """Submit to Flask-Executor, wait at the end of the view."""
    from flask_executor import Executor  # type: ignore[import-untyped]

    app.config["EXECUTOR_MAX_WORKERS"] = THREADS
    executor = Executor(app)

    def start(send: Send, messages: list[flask_mail.Message]) -> Wait:
        futures = [executor.submit(send, message) for message in messages]
        return lambda: [future.result() for future in futures]

    return start


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to send the mail of a request.

    :param label: what plots call it.
    :param head: what tables call it.
    :param config: further keys of the app's configuration; ours are all default but
        for the flag and the certificate's authority.
    """

    label: str
    head: str
    set_up: cabc.Callable[[Flask], Start]
    config: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    requires: str = "flask_mail"


ON: t.Final = {"APITASK_MAIL_BACKGROUND": True}
ONCE: t.Final = ON | {"APITASK_MAIL_KEEPALIVE": 0}

CONTENDERS: t.Final = {
    "inline": Contender("Flask-Mail", "Flask-Mail", in_the_view),
    "thread": Contender("Thread per mail", "Thread", thread_per_mail),
    "request_pool": Contender(
        "ThreadPoolExecutor per request", "Executor", pool_per_request
    ),
    "flask_executor": Contender(
        "Flask-Executor", "Flask-Executor", flask_executor, {}, "flask_executor"
    ),
    "no_keepalive": Contender(
        "Flask-ApiTask, no keepalive", "no keepalive", in_the_view, ONCE
    ),
    OURS: Contender("Flask-ApiTask", "ours", in_the_view, ON),
}
BLOCKS: t.Final = {
    "inline_block": Contender("Flask-Mail, connect()", "", in_one_block),
    "apitask_block": Contender("Flask-ApiTask, connect()", "", in_one_block, ON),
}
QUICK: t.Final = ("inline", "thread", OURS)


@contextlib.contextmanager
def calls(
    names: cabc.Iterable[str], link: Link, mails: int, work_ms: int, **config: t.Any
) -> cabc.Iterator[dict[str, timing.Call]]:
    """Give what takes one request, for each of the contenders *names*."""
    all_of_them = CONTENDERS | BLOCKS
    made = {
        name: build(all_of_them[name], link, mails, work_ms, config)
        for name in names
        if importlib.util.find_spec(all_of_them[name].requires)
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
        MAIL_SERVER=relay.HOST,
        MAIL_PORT=link.port,
        MAIL_USE_TLS=True,
        MAIL_USERNAME=mail_servers.USER,
        MAIL_PASSWORD=mail_servers.PASSWORD,
        MAIL_DEFAULT_SENDER="shop@example.com",
        APITASK_MAIL_TLS_VERIFY=link.cafile,
        **(contender.config | config),
    )
    mail = flask_mail.Mail(app)
    delivered: list[object] = []

    if contender.config:
        ApiTask(app)

    start = contender.set_up(app)

    @app.get("/")
    def view() -> str:
        body = "Thank you for your order.\n" * 20
        messages = [
            flask_mail.Message("Your order", ["ada@example.com"], body)
            for _ in range(mails)
        ]
        wait = start(mail.send, messages)

        if work_ms:
            time.sleep(work_ms / 1e3)

        wait()
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
) -> dict[str, dict[str, t.Any]]:
    """Return the milliseconds to the response in each round, and their median."""
    shuffle = random.Random(0).shuffle

    with calls(names, link, case.mails, case.work_ms) as made:
        samples: dict[str, list[float]] = {name: [] for name in made}
        order = list(made)

        # It keeps its connections from then on. Nobody else keeps any.
        made[OURS]()

        for _ in range(rounds):
            shuffle(order)

            for name in order:
                gc.collect()
                samples[name].append(_milliseconds(made[name]))

    return {
        name: {
            "median_ms": round(statistics.median(values), 2),
            "rounds_ms": [round(value, 2) for value in values],
        }
        for name, values in samples.items()
    }


def count_round_trips(
    names: cabc.Iterable[str], port: int, cafile: str
) -> dict[str, int]:
    """Count how often one mail of a warm contender has to wait for the server."""
    counts = {}

    with (
        socket.create_server((relay.HOST, 0)) as listener,
        relay.Relay(listener, port, 0.01) as counting,
        calls(names, Link(listener.getsockname()[1], cafile), 1, 0) as made,
    ):
        for name, call in made.items():
            call()
            before = counting.flights
            call()
            counts[name] = counting.flights - before

    return counts


def count_sockets(port: int, cafile: str) -> dict[str, int]:
    """Count ours after a request of three mails, and after the keepalive."""
    with (
        socket.create_server((relay.HOST, 0)) as listener,
        relay.Relay(listener, port, 0.02) as counting,
        calls(
            [OURS],
            Link(listener.getsockname()[1], cafile),
            mails=3,
            work_ms=0,
            APITASK_MAIL_KEEPALIVE=KEEPALIVE_SECONDS,
        ) as made,
    ):
        made[OURS]()
        kept = counting.open
        time.sleep(KEEPALIVE_SECONDS + GRACE_SECONDS)
        return {"kept": kept, "after_keepalive": counting.open}


def measure_throughput(
    names: cabc.Iterable[str], link: Link, mails: int
) -> dict[str, float]:
    """Return the messages per second of one request that sends so many.

    Flask-Mail, which sends one after the other and connects for each, sends a fifth of
    them: its rate is that of one, and it would take longer than all others together.
    """
    rates = {}

    for name in names:
        count = mails // 5 if name == "inline" else mails

        with calls([name], link, count, 0) as made:
            if name in made:
                rates[name] = round(count / _milliseconds(made[name]) * 1e3, 1)

    return rates


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

    for rtt_ms, work_ms in ((20, 50), (5, 0), (80, 0)):
        for mails, rounds in ROUNDS.items():
            few = max(1, rounds // 2) if rtt_ms > 20 else rounds
            yield Case("PIPELINING", rtt_ms, mails, work_ms), few


def evaluate(result: dict[str, t.Any]) -> list[measures.Measure]:
    """Return the measures of the issue that there are figures for."""
    found = []

    for case in result["cases"]:
        names = case["contenders"]
        ours = names[OURS]["median_ms"]
        limit = 0.25 if case["server"] != "no PIPELINING" else 0.45
        what = f"{case['server']}, {case['rtt_ms']} ms away"

        if (case["rtt_ms"], case["work_ms"]) != (20, 0):
            continue

        if case["mails"] == 1:
            ratio = ours / names["thread"]["median_ms"]
            label = f"{what}, one mail: ours / Thread per mail"
            found.append(measures.Measure(label, ratio, limit))
        elif case["mails"] == 3 and case["server"] != "no PIPELINING":
            ratio = ours / names["inline"]["median_ms"]
            label = f"{what}, three mails: ours / Flask-Mail"
            found.append(measures.Measure(label, ratio, 0.10))

    left = result["sockets"]["after_keepalive"]
    label = f"sockets open {GRACE_SECONDS:g} s after the keepalive"
    return [*found, measures.Measure(label, left, 0)]


def report(result: dict[str, t.Any]) -> str:
    """Lay out what was measured: ratios, round trips, rates, and the measures."""
    names = list(result["cases"][0]["contenders"])
    head = ("ours / each other", "ours, ms")
    rows = [_row(case, names) for case in result["cases"]]
    peers = [CONTENDERS[name].head for name in names if name != OURS]
    trips = [
        (server, *(str(counts[name]) for name in names))
        for server, counts in result["round_trips"].items()
    ]
    heads = [CONTENDERS[name].head for name in names]
    rates = [
        ((CONTENDERS | BLOCKS)[name].label, f"{rate:,.0f}")
        for name, rate in result["throughput"]["per_second"].items()
    ]
    many = f"{result['throughput']['mails']} mails of one request, 5 ms away"
    return "\n\n".join(
        [
            results.table((*head, *peers), rows),
            results.table(("round trips of one mail", *heads), trips),
            results.table((many, "per second"), rates),
            measures.show(evaluate(result)),
        ]
    )


def _row(case: dict[str, t.Any], names: list[str]) -> list[str]:
    medians = {name: case["contenders"][name]["median_ms"] for name in names}
    label = f"{case['server']}, {case['rtt_ms']} ms away, {case['mails']} mails"

    if case["work_ms"]:
        label += f", {case['work_ms']} ms of work"

    return [
        label.replace(" 1 mails", " 1 mail"),
        f"{medians[OURS]:.0f}",
        *(f"{medians[OURS] / medians[name]:.2f}" for name in names if name != OURS),
    ]


def _milliseconds(call: timing.Call) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _measure_all(servers: Servers, quick: bool) -> dict[str, t.Any]:
    """Measure everything; the relay stays while its cases are measured."""
    names = QUICK if quick else tuple(CONTENDERS)
    measured = []

    with contextlib.ExitStack() as stack:
        links: dict[tuple[str, int], Link] = {}

        for case, rounds in cases(servers.ports, quick):
            if (where := (case.server, case.rtt_ms)) not in links:
                slow = relay.beside_us(servers.ports[case.server], case.rtt_ms / 1e3)
                links[where] = Link(stack.enter_context(slow), servers.cafile)

            figures = measure(names, links[where], case, rounds)
            measured.append(case._asdict() | {"contenders": figures})
            print("  ".join(_row(measured[-1], list(figures))), flush=True)

    with relay.beside_us(servers.ports["PIPELINING"], 0.005) as port:
        many = QUICK_MANY if quick else MANY
        rates = measure_throughput(
            [*names, *BLOCKS], Link(port, servers.cafile), mails=many
        )

    return {
        "cases": measured,
        "round_trips": {
            label: count_round_trips(names, port, servers.cafile)
            for label, port in servers.ports.items()
        },
        "sockets": count_sockets(servers.ports["PIPELINING"], servers.cafile),
        "throughput": {"mails": many, "per_second": rates},
    }


def main() -> None:
    """Measure, print, write and draw."""
    options = results.arguments(__doc__)

    with mail_servers.running() as servers:
        if "Postfix" not in servers.ports:
            print("Postfix is not installed, or this is not root: without it.")

        result = _measure_all(servers, options.quick)
        versions = {"flask-mail": importlib.metadata.version("flask-mail")}
        result["servers"] = servers.versions | versions

    text = report(result)
    print(f"\n{text}")
    results.write(options.output, "mail", result)
    (options.output / f"mail-{results.PYTHON}.txt").write_text(f"{text}\n")

    if importlib.util.find_spec("matplotlib"):
        from . import mail_plot

        mail_plot.draw(options.output / f"mail-{results.PYTHON}.svg", result)

    if any(
        measure.value > measure.most * measures.NOISE_FACTOR
        for measure in evaluate(result)
    ):
        sys.exit(f"A measure is off by more than a factor of {measures.NOISE_FACTOR}.")


if __name__ == "__main__":
    main()
