"""Measure what grows: cost per task, memory of a server, memory of a newsletter."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import statistics
import tracemalloc
import typing as t

import flask_mail
import psutil
from flask import Flask

from flask_apitask import ApiTask

from . import beside
from . import contenders
from . import mail_servers
from . import results
from . import timing
from .contenders import OURS

if t.TYPE_CHECKING:
    from .results import Result

COUNTS: t.Final = (100, 10_000)
REQUESTS: t.Final = 200_000
WARM_UP_REQUESTS: t.Final = 20_000
TASKS_PER_REQUEST: t.Final = 3
LIMITS: t.Final = contenders.Limits(per_request=8, per_process=32)
MESSAGES: t.Final = 60
MESSAGE_BYTES: t.Final = 2**20
LINE: t.Final = f"{'news ' * 15}\n"
WAIT_SECONDS: t.Final = 60.0


def resident_memory(requests: int, warm_up: int) -> Result:
    """Return by how many KiB a process grows while *requests* run three tasks each."""
    call = timing.request(
        contenders.build(OURS, timing.no_op, TASKS_PER_REQUEST, LIMITS)
    )
    process = psutil.Process()

    def resident_after(count: int) -> int:
        for _ in range(count):
            call()

        gc.collect()
        return int(process.memory_info().rss) // 1024

    before = resident_after(warm_up)
    return {"requests": requests, "growth_kib": resident_after(requests) - before}


def cost_per_task() -> dict[str, float]:
    """Return the microseconds per no-op task, by how many of them a request runs.

    All of them and their futures are alive at once, so that the garbage collector
    (should it be on) goes through more of them, the more there are.
    """
    calls = {
        str(count): timing.request(contenders.build(OURS, timing.no_op, count))
        for count in (0, *COUNTS)
    }
    medians = timing.interleave(calls, rounds=5, batch_seconds=0.02)
    none, *costs = (statistics.median(medians[name]) for name in calls)
    return {
        str(count): round((cost - none) / count * 1e6, 2)
        for count, cost in zip(COUNTS, costs, strict=True)
    }


def newsletter_memory(port: int, messages: int) -> Result:
    """Send a newsletter in one block; return the peak of memory over what it holds.

    It must run in a process of its own, as it counts what Python allocates from then
    on. The resident peak would count what the allocator keeps, and so depend on it and
    on what has been there before; this is the same on every machine.
    """
    app = Flask("benchmarks")
    app.config.update(
        MAIL_SERVER=beside.HOST,
        MAIL_PORT=port,
        MAIL_DEFAULT_SENDER="news@example.com",
        APITASK_MAIL_BACKGROUND=True,
    )
    mail = flask_mail.Mail(app)
    ApiTask(app)
    delivered: list[int] = []

    def make(number: int, size: int) -> flask_mail.Message:
        # Each has a text of its own, as it begins with the reader's name.
        body = f"Dear reader {number},\n" + LINE * (size // len(LINE))
        return flask_mail.Message("News", ["ada@example.com"], body)

    @app.get("/")
    def view() -> str:
        with mail.connect() as connection:
            for number in range(messages if delivered else 1):
                connection.send(make(number, MESSAGE_BYTES if delivered else 0))

        return "sent"

    def note(sender: object, message: flask_mail.Message) -> None:
        delivered.append(len(message.body or ""))

    call = timing.request(app)

    with app.app_context():
        rendered = messages * len(make(0, MESSAGE_BYTES).as_bytes())

    with flask_mail.email_dispatched.connected_to(note, app):
        # One short message, for what is imported and made once.
        call()
        gc.collect()
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    if len(delivered) != messages + 1:
        raise RuntimeError(f"{len(delivered) - 1} of {messages} messages arrived.")

    return {"messages": messages, "rendered_bytes": rendered, "peak_bytes": peak}


def measure_newsletter() -> Result:
    """Measure the memory of a newsletter in a new process, next to a mail server."""
    process = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    )

    with mail_servers.plain() as port, process:
        return process.submit(newsletter_memory, port, MESSAGES).result(WAIT_SECONDS)


def main() -> None:
    """Measure, print and write. Memory comes first, while the process is fresh."""
    options = results.arguments(__doc__)
    fraction = 10 if options.quick else 1
    measured = {
        "resident": resident_memory(REQUESTS // fraction, WARM_UP_REQUESTS // fraction),
        "newsletter": measure_newsletter(),
        "cost_per_task_us": cost_per_task(),
    }
    gc.disable()
    measured["cost_without_gc_us"] = cost_per_task()
    gc.enable()
    print(results.dump(measured))
    results.write(options.output, "growth", measured)


if __name__ == "__main__":
    main()
