from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import textwrap
import threading
import traceback
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until
from interleaving import HeldThreads
from interleaving import run_in_thread
from late_threads import in_time
from reporting import Reporting
from test_threads import Calling
from test_threads import forks
from test_threads import run_script

from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import scope as scope_module
from flask_apitask import task
from flask_apitask import task_started
from flask_apitask.jobs import Job
from flask_apitask.scope import TaskScope
from flask_apitask.threads import Threads

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import types

    from conftest import AppFactory
    from flask import Flask

    from flask_apitask.threads import Worker

# Seconds. It is short, as tests are stuck for as long.
DEADLINE = 0.1


def nothing() -> None:
    pass


class Trap:
    """Where tasks are stuck until the test lets them out.

    :param hold: Blocks.
    :param release: Lets all of them out, and those that come later through.
    """

    def __init__(
        self, hold: types.FunctionType, release: cabc.Callable[[], object]
    ) -> None:
        self._hold = hold
        self._release = release
        self._out = threading.Semaphore(0)
        self._is_open = False
        self.threads: list[threading.Thread] = []

    def fill(self, count: int) -> None:
        """Run tasks of the current scope, and return as soon as they are stuck."""
        present = len(self.threads)

        for _ in range(count):
            run(task("trapped")(functools.partial(self._enter)))

        wait_until(lambda: len(self.threads) == present + count)
        wait_until(lambda: all(map(self._holds, self.threads)))

    def open(self) -> None:
        """Let the tasks out, and wait until they are."""
        if not self._is_open:
            self._is_open = True
            self._release()

            for _ in self.threads:
                assert self._out.acquire(timeout=PATIENCE)

    def _enter(self) -> None:
        self.threads.append(threading.current_thread())
        self._hold()
        self._out.release()

    def _holds(self, thread: threading.Thread) -> bool:
        frame = sys._current_frames()[t.cast("int", thread.ident)]
        return frame.f_code is self._hold.__code__


@contextlib.contextmanager
def in_lock() -> cabc.Iterator[Trap]:
    lock = threading.Lock()
    lock.acquire()

    def hold() -> None:
        with lock:  # stuck here
            pass

    yield Trap(t.cast("types.FunctionType", hold), lock.release)


@contextlib.contextmanager
def in_socket() -> cabc.Iterator[Trap]:
    ours, theirs = socket.socketpair()

    def hold() -> None:
        ours.recv(1)  # stuck here

    with ours, theirs:
        yield Trap(t.cast("types.FunctionType", hold), theirs.close)


@contextlib.contextmanager
def in_c() -> cabc.Iterator[Trap]:
    reading, writing = os.pipe()

    def hold() -> None:
        os.read(reading, 1)  # stuck here

    yield Trap(t.cast("types.FunctionType", hold), lambda: os.close(writing))
    os.close(reading)


@contextlib.contextmanager
def in_python() -> cabc.Iterator[Trap]:
    released: list[bool] = []

    def hold() -> None:
        while not released:  # stuck here
            pass

    yield Trap(t.cast("types.FunctionType", hold), lambda: released.append(True))


def open_at_end(
    make_trap: cabc.Callable[[], contextlib.AbstractContextManager[Trap]],
) -> cabc.Iterator[Trap]:
    with make_trap() as trap:
        try:
            yield trap
        finally:
            trap.open()


@pytest.fixture(params=[in_lock, in_socket, in_c, in_python])
def each_trap(request: pytest.FixtureRequest) -> cabc.Iterator[Trap]:
    """A trap of each kind."""
    yield from open_at_end(request.param)


@pytest.fixture
def trap() -> cabc.Iterator[Trap]:
    """A trap, where it does not matter what tasks are stuck in."""
    yield from open_at_end(in_lock)


def make_stuck_app(
    make_app: AppFactory, trap: Trap, size: int, **config: t.Any
) -> Flask:
    """Make an app with a view that leaves as many stuck tasks as it is told."""
    app = make_app(APITASK_POOL_SIZE=size, APITASK_TIMEOUT=DEADLINE, **config)

    @app.get("/stuck/<int:count>")
    def stuck(count: int) -> str:
        trap.fill(count)
        return "ok"

    @app.get("/threads/<int:count>")
    def use_threads(count: int) -> list[int]:
        """Return the identifiers of as many threads, all used at the same time."""
        meeting = threading.Barrier(count)

        def meet() -> int:
            meeting.wait(PATIENCE)
            return threading.get_ident()

        return [future.result(PATIENCE) for future in [run(meet) for _ in range(count)]]

    return app


def threads_of(app: Flask) -> Threads:
    return t.cast("Threads", app.extensions["apitask"].threads)


def expect_state(app: Flask, threads: int, asleep: int, overdue: int) -> None:
    """Wait until the pool of an app is in a state, and all that sleep do."""
    pool = threads_of(app)
    state = (
        f"<Threads size={pool._size} threads={threads} asleep={asleep}"
        f" overdue={overdue}>"
    )
    wait_until(lambda: repr(pool) == state)


def test_stuck_threads_are_named_and_replaced(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, each_trap: Trap
) -> None:
    """Whatever holds the threads: the response goes out, and others serve the next."""
    app = make_stuck_app(make_app, each_trap, 2)
    response = in_time(app.test_client().get, "/stuck/2")
    assert (response.status_code, response.text) == (200, "ok")

    record: t.Any
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.task_names == ["trapped", "trapped"]
    assert record.getMessage().count("# stuck here") == 2
    expect_state(app, 2, 0, 2)

    stuck = {thread.ident for thread in each_trap.threads}
    used = in_time(app.test_client().get, "/threads/2").json
    assert used is not None
    assert len(set(used)) == 2
    assert not stuck.intersection([*used, threading.get_ident()])
    expect_state(app, 4, 2, 2)

    # Two are too many now, and those that come last are.
    each_trap.open()
    expect_state(app, 2, 2, 0)

    for thread in each_trap.threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()

    later = in_time(app.test_client().get, "/threads/2").json
    assert later is not None
    assert set(later) == set(used)
    assert len(caplog.records) == 1


def test_tasks_after_stuck_ones_are_not_inline(
    make_app: AppFactory, trap: Trap
) -> None:
    """A later request overlaps its tasks with its view, as ever."""
    app = make_stuck_app(make_app, trap, 2)
    how: list[str] = []

    def started(sender: Flask, **fields: t.Any) -> None:
        how.append(fields["how"])

    in_time(app.test_client().get, "/stuck/2")

    with task_started.connected_to(started):
        in_time(app.test_client().get, "/threads/2")

    assert how == ["thread", "thread"]


def test_thread_that_was_not_replaced_serves_again(
    make_app: AppFactory, trap: Trap
) -> None:
    """A thread that comes free before anybody needs another one is kept."""
    app = make_stuck_app(make_app, trap, 1)
    in_time(app.test_client().get, "/stuck/1")
    expect_state(app, 1, 0, 1)
    trap.open()
    expect_state(app, 1, 1, 0)
    used = in_time(app.test_client().get, "/threads/1").json
    assert used == [trap.threads[0].ident]
    expect_state(app, 1, 1, 0)


def test_scopes_that_waited_are_served(make_app: AppFactory, trap: Trap) -> None:
    """What waited while all threads were stuck begins at the deadline of those."""
    app = make_stuck_app(make_app, trap, 1)
    waiting = threading.Event()

    @app.get("/late")
    def late() -> str:
        trap.fill(1)
        assert waiting.wait(PATIENCE)
        return "late"

    @app.get("/waits")
    def waits() -> list[int]:
        futures = [run(threading.get_ident) for _ in range(3)]
        waiting.set()
        return [future.result(PATIENCE) for future in futures]

    def get_late() -> None:
        texts.append(app.test_client().get("/late").text)

    texts: list[str] = []
    other = threading.Thread(target=get_late, daemon=True)
    other.start()
    wait_until(lambda: bool(trap.threads))
    idents = in_time(app.test_client().get, "/waits").json
    assert idents is not None
    assert len(set(idents)) == 1
    assert trap.threads[0].ident not in idents
    other.join(PATIENCE)
    assert texts == ["late"]


def test_limit_of_replacements(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, trap: Trap
) -> None:
    """With twice as many threads held as may serve, requests end and nothing hangs.

    Their tasks are cancelled with an ERROR each, or run by those who wait for as long
    as it takes. Once tasks come free, so do the threads.
    """
    app = make_stuck_app(make_app, trap, 1)
    ran: list[int] = []

    @app.get("/none")
    def none() -> str:
        run(ran.append, 1)
        return "ok"

    @app.get("/helps")
    def helps() -> str:
        with open_scope(timeout=float("inf")):
            future = run(threading.get_ident)

        return str(future.result(0) == threading.get_ident())

    for held in (1, 2):
        in_time(app.test_client().get, "/stuck/1")
        expect_state(app, held, 0, held)

    caplog.clear()
    assert in_time(app.test_client().get, "/none").text == "ok"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "not begun within" in caplog.text
    assert ran == []
    assert in_time(app.test_client().get, "/helps").text == "True"
    expect_state(app, 2, 0, 2)

    trap.open()
    expect_state(app, 1, 1, 0)
    assert in_time(app.test_client().get, "/none").text == "ok"
    assert ran == [1]


def test_stuck_thread_of_another_pool(make_app: AppFactory, trap: Trap) -> None:
    """Only the pool that a thread belongs to counts and replaces it."""
    app = make_stuck_app(make_app, trap, 1)
    other = make_stuck_app(make_app, trap, 1)
    in_time(other.test_client().get, "/threads/1")
    in_time(app.test_client().get, "/stuck/1")
    expect_state(app, 1, 0, 1)
    expect_state(other, 1, 1, 0)


# Of a program; PATIENCE bounds it. Its log goes to its output, as it is no error.
PROGRAM = """
    import logging, os, socket, sys, threading
    from flask import Flask
    from flask_apitask import ApiTask, run, task

    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(task_names)s")
    app = Flask("site")
    app.config.update(APITASK_POOL_SIZE=2, APITASK_TIMEOUT=0.1)
    ApiTask(app)
    begun = threading.Event()

    def connect():
        ours, theirs = socket.socketpair()
        # Nobody closes it.
        theirs.detach()
        return ours

    @task("stuck")
    def stuck():
        begun.set()
        {hold}

    @app.get("/")
    def index():
        run(stuck)
        assert begun.wait(5)
        return "ok"

    def get_index():
        print(app.test_client().get("/").text, flush=True)
"""

HOLDS = {
    "lock": "threading.Event().wait()",
    "socket": "connect().recv(1)",
    "c": "os.read(os.pipe()[0], 1)",
    "python": "while True: pass",
}


def run_program(
    script: str, hold: str = "lock", first: str = "", *, forks: bool = False
) -> list[str]:
    """Run a program with a task that is stuck for ever, and return what it prints."""
    program = PROGRAM.format(hold=HOLDS[hold])
    parts = [textwrap.dedent(part) for part in (first, program, script)]
    return run_script("".join(parts), allow_fork=forks).splitlines()


GONE_ON = ["WARNING ['stuck']", "ok"]


@pytest.mark.parametrize("hold", HOLDS)
def test_exit_with_a_stuck_task(hold: str) -> None:
    """A process whose task is stuck ends, without an error."""
    assert run_program("get_index()", hold) == GONE_ON


def test_exit_finishes_tasks_that_are_not_overdue() -> None:
    """A process that leaves a stuck task behind finishes what else was started."""
    printed = run_program("""
        from flask_apitask.scope import TaskScope

        get_index()
        begun, exiting = threading.Event(), threading.Event()

        def work(name):
            begun.set()
            assert exiting.wait(10)
            print(name, flush=True)

        scope = TaskScope(app.extensions["apitask"].threads, max_workers=1)
        scope.submit(work, "running")
        scope.submit(work, "queued")
        assert begun.wait(10)
        scope.shutdown(wait=False)
        threading._register_atexit(exiting.set)
        print("main", flush=True)
        """)
    assert printed == [*GONE_ON, "main", "running", "queued"]


def test_exit_in_a_process_of_greenlets() -> None:
    """A process whose threads are gevent's ends as well, with its stuck task."""
    pytest.importorskip("gevent")
    printed = run_program(
        "get_index()",
        first="""
        import gevent.monkey
        gevent.monkey.patch_all()
        """,
    )
    assert printed == GONE_ON


@forks
@pytest.mark.parametrize("hold", HOLDS)
def test_exit_of_a_forked_child(hold: str) -> None:
    """A child of multiprocessing ends with its stuck task, and its parent with its."""
    printed = run_program(
        """
        import multiprocessing

        get_index()
        begun.clear()
        child = multiprocessing.get_context("fork").Process(target=get_index)
        child.start()
        child.join(20)
        print("exit code", child.exitcode, flush=True)
        """,
        hold,
        forks=True,
    )
    assert printed == [*GONE_ON, *GONE_ON, "exit code 0"]


def test_no_more_than_the_size_serve_after_a_return() -> None:
    """A thread that comes back from a stuck task leaves if there are enough."""
    threads = Threads(1)
    trap, gate, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    used: list[threading.Thread] = []

    def use(event: threading.Event) -> None:
        used.append(threading.current_thread())
        assert event.wait(PATIENCE)
        done.release()

    stuck = Calling(functools.partial(use, trap))
    threads.summon(stuck)
    wait_until(lambda: len(used) == 1)
    assert threads.replace(stuck) == 1
    # Of these two, one is served by the thread in its place, and one waits.
    for _ in range(2):
        threads.summon(Calling(functools.partial(use, gate)))

    wait_until(lambda: len(used) == 2)
    trap.set()
    assert done.acquire(timeout=PATIENCE)
    used[0].join(1)
    retired = not used[0].is_alive()
    gate.set()
    assert done.acquire(timeout=PATIENCE)
    assert done.acquire(timeout=PATIENCE)
    assert retired


def test_thread_that_sleeps_is_not_replaced() -> None:
    """A thread that is done with its task before it is given up is not held."""
    threads = Threads(1)
    called = Calling(nothing)
    threads.summon(called)
    wait_until(lambda: "asleep=1" in repr(threads))
    assert threads.replace(called) == 0
    assert repr(threads) == "<Threads size=1 threads=1 asleep=1 overdue=0>"


def test_task_that_is_about_to_begin_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that has taken a task, and not begun it yet, is replaced as well."""
    threads = Threads(1)
    taken, go_on = threading.Event(), threading.Event()

    class Slow(Job[t.Any]):
        def run(self, *args: t.Any) -> None:
            taken.set()
            assert go_on.wait(PATIENCE)
            super().run(*args)

    monkeypatch.setattr(scope_module, "Job", Slow)
    scope = TaskScope(threads, max_workers=1, timeout=0.01)
    scope.submit(int)
    assert taken.wait(PATIENCE)

    with pytest.warns(UserWarning, match="held=1"):
        scope.end()

    go_on.set()


def test_no_thread_is_started_after_the_end() -> None:
    """Nobody waits for a thread that starts when the exit has waited for the others.

    So it is not started, and who was about to serves the scope.
    """
    served: list[int] = []

    class Ending(Threads):
        def rouse(self, worker: Worker) -> None:
            run_in_thread(self.end)
            super().rouse(worker)

    Ending(1).summon(Calling(lambda: served.append(threading.get_ident())))
    assert served == [threading.get_ident()]


def test_end_waits_for_a_thread_that_is_being_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exit waits for a thread that another one is just about to start."""
    threads = Threads(1)
    events: list[str] = []
    gate = threading.Event()

    def end() -> None:
        threads.end()
        events.append("ended")

    def work() -> None:
        assert gate.wait(PATIENCE)
        events.append("served")

    ending = threading.Thread(target=end, daemon=True)
    start = threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        monkeypatch.undo()
        ending.start()
        wait_until(lambda: threads._ended)
        ending.join(0.1)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    threads.summon(Calling(work))
    gate.set()
    ending.join(PATIENCE)
    assert events == ["served", "ended"]


def test_exit_begins_before_the_deadline() -> None:
    """A process that ends while a request waits ends with the request's deadline."""
    printed = run_program("""
        threading.Thread(target=get_index).start()
        assert begun.wait(10)
        """)
    assert sorted(printed) == ["WARNING ['stuck']", "ok"]


def test_thread_that_serves_another_scope_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that has left an overdue task while that was reported is not held."""
    threads = Threads(1)
    trap, gate, serving = threading.Event(), threading.Event(), threading.Event()
    format_stack = traceback.format_stack

    def format_late(frame: types.FrameType) -> list[str]:
        trap.set()
        assert serving.wait(PATIENCE)
        return format_stack(frame)

    def work() -> None:
        serving.set()
        assert gate.wait(PATIENCE)

    late = TaskScope(threads, max_workers=1, timeout=DEADLINE)
    late.submit(trap.wait, PATIENCE)

    with TaskScope(threads, max_workers=1) as scope:
        scope.submit(work)
        monkeypatch.setattr(traceback, "format_stack", format_late)
        late.end()
        gate.set()
        assert "overdue=0" in repr(threads)


def test_end_waits_for_a_thread_whose_start_was_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that comes though a Ctrl-C hit its start counts, and is waited for."""
    threads = Threads(1)
    served, ended = threading.Event(), threading.Event()
    begun, gate = threading.Event(), threading.Event()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)

    with pytest.raises(KeyboardInterrupt):
        threads.summon(Calling(served.set))

    assert served.wait(PATIENCE)
    wait_until(lambda: "threads=1 asleep=1" in repr(threads))

    def work() -> None:
        begun.set()
        assert gate.wait(PATIENCE)
        assert not ended.is_set()

    threads.summon(Calling(work))
    assert begun.wait(PATIENCE)

    def end() -> None:
        threads.end()
        ended.set()

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    assert not ended.wait(0.1)
    gate.set()
    assert ended.wait(PATIENCE)


def test_scope_that_ends_while_it_is_served_waits_for_no_thread() -> None:
    """A scope that a thread adds once more when it has just ended is not kept."""

    class Ending(HeldThreads):
        late = False

        def add(self, scope: t.Any) -> None:
            if self.late:
                self.late = False
                run_in_thread(scope.end)

            super().add(scope)

    threads = Ending()
    waiting: list[int] = []
    scope = TaskScope(threads, max_workers=2, timeout=0.0, binding=Reporting())
    scope.submit(lambda: waiting.append(len(threads._waiting)))
    scope.submit(nothing)
    threads.late = True
    threads.come()
    assert waiting == [0]
