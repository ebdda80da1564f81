"""The ways to run tasks inside a request that the benchmarks compare.

Every contender is a function that sets one Flask app up and returns the body of its
view: called with a piece of work and a count, it starts that many tasks. All of them
give the same: a task runs in an app context of its own, and all tasks are done before
the WSGI callable returns (``dispatch.verify`` makes sure). Pools have the
same number of threads; ``threading.Thread`` and Trio have no limit to set.
"""

from __future__ import annotations

import collections.abc as cabc
import concurrent.futures
import dataclasses
import importlib.util
import queue
import threading
import typing as t

from flask import Flask
from flask import g

Work: t.TypeAlias = cabc.Callable[[], object]
Body: t.TypeAlias = cabc.Callable[[Work, int], None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many tasks run at once, for every contender that can be limited.

    :param per_request: threads for one request.
    :param per_process: threads that the requests of the process share.
    """

    per_request: int = 8
    per_process: int = 8


def in_app_context(app: Flask, work: Work) -> None:
    """Run *work* as the peers' documentation says: in a new app context."""
    with app.app_context():
        work()


def bare(app: Flask, limits: Limits) -> Body:
    """Run nothing: what every other contender is compared with."""

    def body(work: Work, count: int) -> None:
        pass

    return body


def apitask_idle(app: Flask, limits: Limits) -> Body:
    """Switch ApiTask on and run nothing: what it costs."""
    apitask(app, limits)
    return bare(app, limits)


def inline(app: Flask, limits: Limits) -> Body:
    """Call the work in the view, one after the other."""

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            in_app_context(app, work)

    return body


def thread_per_task(app: Flask, limits: Limits) -> Body:
    """Start a thread per task, join them in teardown."""

    def body(work: Work, count: int) -> None:
        g.threads = threads = []

        for _ in range(count):
            thread = threading.Thread(target=in_app_context, args=(app, work))
            thread.start()
            threads.append(thread)

    @app.teardown_request
    def join(error: BaseException | None) -> None:
        for thread in g.threads:
            thread.join()

    return body


def pool_per_request(app: Flask, limits: Limits) -> Body:
    """Start a ``ThreadPoolExecutor`` per request, shut it down in teardown."""

    def body(work: Work, count: int) -> None:
        g.pool = pool = concurrent.futures.ThreadPoolExecutor(limits.per_request)

        for _ in range(count):
            pool.submit(in_app_context, app, work)

    @app.teardown_request
    def shut_down(error: BaseException | None) -> None:
        g.pool.shutdown(wait=True)

    return body


def shared_pool(app: Flask, limits: Limits) -> Body:
    """Submit to the one ``ThreadPoolExecutor`` of the app, wait in teardown."""
    pool = concurrent.futures.ThreadPoolExecutor(limits.per_process)

    def body(work: Work, count: int) -> None:
        g.futures = [pool.submit(in_app_context, app, work) for _ in range(count)]

    @app.teardown_request
    def wait(error: BaseException | None) -> None:
        concurrent.futures.wait(g.futures)

    return body


def flask_executor(app: Flask, limits: Limits) -> Body:
    """Submit to Flask-Executor, which pushes the contexts; wait in the view."""
    from flask_executor import Executor  # type: ignore[import-untyped]

    app.config["EXECUTOR_MAX_WORKERS"] = limits.per_process
    executor = Executor(app)

    def body(work: Work, count: int) -> None:
        futures = [executor.submit(work) for _ in range(count)]

        for future in futures:
            future.result()

    return body


def trio_threads(app: Flask, limits: Limits) -> Body:
    """Borrow a thread per task from Trio's thread cache, wait in teardown."""
    from trio.lowlevel import start_thread_soon

    def body(work: Work, count: int) -> None:
        g.count = count
        outcomes: queue.SimpleQueue[t.Any] = queue.SimpleQueue()
        g.outcomes = outcomes

        for _ in range(count):
            start_thread_soon(lambda: in_app_context(app, work), outcomes.put)

    @app.teardown_request
    def wait(error: BaseException | None) -> None:
        for _ in range(g.count):
            g.outcomes.get().unwrap()

    return body


def apitask(app: Flask, limits: Limits) -> Body:
    """Run the tasks with Flask-APITask."""
    from flask_apitask import ApiTask
    from flask_apitask import run

    app.config["APITASK_MAX_WORKERS"] = limits.per_request
    app.config["APITASK_POOL_SIZE"] = limits.per_process
    ApiTask(app)

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            run(work)

    return body


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run tasks.

    :param label: what tables and plots call it.
    :param set_up: sets an app up and returns the body of its view.
    :param requires: the module without which it can't be measured.
    """

    label: str
    set_up: cabc.Callable[[Flask, Limits], Body]
    requires: str = "flask"


ALL: t.Final[dict[str, Contender]] = {
    "bare": Contender("bare app", bare),
    "idle": Contender("ApiTask on, no task", apitask_idle, "flask_apitask"),
    "inline": Contender("inline call", inline),
    "thread": Contender("Thread per task", thread_per_task),
    "request_pool": Contender("ThreadPoolExecutor per request", pool_per_request),
    "shared_pool": Contender("shared ThreadPoolExecutor", shared_pool),
    "flask_executor": Contender("Flask-Executor", flask_executor, "flask_executor"),
    "trio": Contender("Trio's thread cache", trio_threads, "trio"),
    "apitask": Contender("Flask-APITask", apitask, "flask_apitask"),
}

CONCURRENT: t.Final = (
    "thread",
    "request_pool",
    "shared_pool",
    "flask_executor",
    "trio",
    "apitask",
)


def installed(names: cabc.Iterable[str]) -> list[str]:
    """Return those of the contenders *names* whose package is installed."""
    return [name for name in names if importlib.util.find_spec(ALL[name].requires)]


def build(name: str, work: Work, count: int, limits: Limits = Limits()) -> Flask:
    """Build an app whose view at ``/`` runs *work* *count* times with *name*."""
    app = Flask("benchmarks")
    body = ALL[name].set_up(app, limits)

    @app.get("/")
    def view() -> str:
        body(work, count)
        return "done"

    return app
