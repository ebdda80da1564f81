"""The ways to run tasks inside a request that the benchmarks compare.

Every contender is a function that sets one Flask app up and returns the body of its
view: called with a piece of work and a count, it starts that many tasks. Those of the
headline comparison all give the same: a task runs on another thread than the request,
in an app context of its own, and all tasks are done before the WSGI callable returns
(``verify`` makes sure). Pools have the same number of threads; ``threading.Thread`` and
Trio have no limit to set.
"""

from __future__ import annotations

import collections.abc as cabc
import concurrent.futures
import queue
import threading
import time
import typing as t

from flask import Flask
from flask import g
from flask.globals import app_ctx

from . import timing

Work: t.TypeAlias = cabc.Callable[[], object]
Body: t.TypeAlias = cabc.Callable[[Work, int], None]
SetUp: t.TypeAlias = "cabc.Callable[[Flask, Limits], Body]"
Start: t.TypeAlias = cabc.Callable[[Work, int], cabc.Callable[[], object]]

VERIFIED_TASKS: t.Final = 8


class Limits(t.NamedTuple):
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


def wait_in_teardown(app: Flask, start: Start) -> Body:
    """Return the body that calls *start*; teardown calls what that has returned."""

    def body(work: Work, count: int) -> None:
        g.wait = start(work, count)

    @app.teardown_request
    def wait(error: BaseException | None) -> None:
        # The jobs of Flask-Executor are torn down as well, with a copy of `g` that
        # is older than this entry.
        if (wait_for_tasks := g.pop("wait", None)) is not None:
            wait_for_tasks()

    return body


def bare(app: Flask, limits: Limits) -> Body:
    """Run nothing: what every other contender is compared with."""

    def body(work: Work, count: int) -> None:
        pass

    return body


def empty_hooks(app: Flask, limits: Limits) -> Body:
    """Run nothing, with one hook of each kind that ApiTask has."""

    @app.before_request
    def before() -> None:
        pass

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        pass

    return bare(app, limits)


def apitask_idle(app: Flask, limits: Limits) -> Body:
    """Switch ApiTask on and run nothing: what it costs."""
    apitask(app, limits)
    return bare(app, limits)


def inline(app: Flask, limits: Limits) -> Body:
    """Call the work in the view, one after the other, on the request's own thread."""

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            in_app_context(app, work)

    return body


def thread_per_task(app: Flask, limits: Limits) -> Body:
    """Start a thread per task, join them in teardown."""

    def start(work: Work, count: int) -> cabc.Callable[[], object]:
        threads = [
            threading.Thread(target=in_app_context, args=(app, work))
            for _ in range(count)
        ]

        for thread in threads:
            thread.start()

        def join() -> None:
            for thread in threads:
                thread.join()

        return join

    return wait_in_teardown(app, start)


def pool_per_request(app: Flask, limits: Limits) -> Body:
    """Start a ``ThreadPoolExecutor`` per request, shut it down in teardown."""

    def start(work: Work, count: int) -> cabc.Callable[[], object]:
        pool = concurrent.futures.ThreadPoolExecutor(limits.per_request)

        for _ in range(count):
            pool.submit(in_app_context, app, work)

        return pool.shutdown

    return wait_in_teardown(app, start)


def shared_pool(app: Flask, limits: Limits) -> Body:
    """Submit to the one ``ThreadPoolExecutor`` of the app, wait in teardown."""
    pool = concurrent.futures.ThreadPoolExecutor(limits.per_process)

    def start(work: Work, count: int) -> cabc.Callable[[], object]:
        futures = [pool.submit(in_app_context, app, work) for _ in range(count)]
        return lambda: concurrent.futures.wait(futures)

    return wait_in_teardown(app, start)


def flask_executor(app: Flask, limits: Limits) -> Body:
    """Submit to Flask-Executor, which pushes the contexts; wait in teardown."""
    from flask_executor import Executor  # type: ignore[import-untyped]

    app.config["EXECUTOR_MAX_WORKERS"] = limits.per_process
    executor = Executor(app)

    def start(work: Work, count: int) -> cabc.Callable[[], object]:
        futures = [executor.submit(work) for _ in range(count)]
        return lambda: [future.result() for future in futures]

    return wait_in_teardown(app, start)


def trio_threads(app: Flask, limits: Limits) -> Body:
    """Borrow a thread per task from Trio's thread cache, wait in teardown."""
    from trio.lowlevel import start_thread_soon

    def start(work: Work, count: int) -> cabc.Callable[[], object]:
        outcomes: queue.SimpleQueue[t.Any] = queue.SimpleQueue()

        for _ in range(count):
            start_thread_soon(lambda: in_app_context(app, work), outcomes.put)

        return lambda: [outcomes.get().unwrap() for _ in range(count)]

    return wait_in_teardown(app, start)


def apitask(app: Flask, limits: Limits) -> Body:
    """Run the tasks with Flask-ApiTask."""
    from flask_apitask import ApiTask
    from flask_apitask import run

    app.config["APITASK_MAX_WORKERS"] = limits.per_request
    app.config["APITASK_POOL_SIZE"] = limits.per_process
    ApiTask(app)

    def body(work: Work, count: int) -> None:
        for _ in range(count):
            run(work)

    return body


class Contender(t.NamedTuple):
    """One way to run tasks.

    :param label: what tables and plots call it.
    :param set_up: sets an app up and returns the body of its view.
    """

    label: str
    set_up: SetUp


OURS: t.Final = "apitask"
LIMITS: t.Final = Limits()
# What a request without tasks pays.
WITHOUT_TASKS: t.Final = {
    "bare": Contender("bare app", bare),
    "hooks": Contender("two empty hooks", empty_hooks),
    "idle": Contender("ApiTask on, no task", apitask_idle),
}
HEADLINE: t.Final = {
    "thread": Contender("Thread per task", thread_per_task),
    "request_pool": Contender("ThreadPoolExecutor per request", pool_per_request),
    "shared_pool": Contender("shared ThreadPoolExecutor", shared_pool),
    "flask_executor": Contender("Flask-Executor", flask_executor),
    "trio": Contender("Trio's thread cache", trio_threads),
    OURS: Contender("Flask-ApiTask", apitask),
}
ALL: t.Final = {
    **WITHOUT_TASKS,
    "inline": Contender("inline call, not isolated", inline),
    **HEADLINE,
}


def build(name: str, work: Work, count: int, limits: Limits = LIMITS) -> Flask:
    """Build an app whose view at ``/`` runs *work* *count* times with *name*."""
    app = Flask("benchmarks")
    body = ALL[name].set_up(app, limits)

    @app.get("/")
    def view() -> str:
        body(work, count)
        return "done"

    return app


def verify(name: str) -> None:
    """Make sure that contender *name* gives what those of the headline have to give.

    :raises RuntimeError: A task was not done when the WSGI callable returned, had no
        app context of its own, or ran on the thread of the request.
    """
    contexts, threads = [], []

    def work() -> None:
        time.sleep(timing.IO_SECONDS)
        # What is behind Flask's proxy.
        contexts.append(app_ctx._get_current_object())  # type: ignore[attr-defined]
        threads.append(threading.get_ident())

    # With one thread for all, one that waits may be tempted to run them itself.
    app = build(name, work, VERIFIED_TASKS, Limits(per_process=1))
    timing.request(app)()
    own = len({id(context) for context in contexts if context.app is app})
    inline = threads.count(threading.get_ident())

    if inline or not own == len(threads) == VERIFIED_TASKS:
        raise RuntimeError(
            f"{ALL[name].label} ran {len(threads)} of {VERIFIED_TASKS} tasks before the"
            f" request was over, in {own} app contexts of the app, and {inline} of them"
            " on the request's own thread."
        )
