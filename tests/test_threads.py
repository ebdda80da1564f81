from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
import typing as t
import weakref
from collections import deque
from unittest import mock

import pytest
from conftest import PATIENCE
from conftest import wait_until
from interleaving import HeldThreads
from interleaving import RefusingThreads

from flask_apitask import scope as scope_module
from flask_apitask import threads as threads_module
from flask_apitask.scope import _Waiter
from flask_apitask.scope import TaskScope
from flask_apitask.threads import Threads

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.threads import How
    from flask_apitask.threads import Worker

forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no process forks on this system"
)

# A fork of a process with threads is what these tests are about.
ALLOW_FORK = "ignore:This process:DeprecationWarning"


def run_script(script: str, *, allow_fork: bool = False) -> str:
    """Run a script to its end, which must be a quiet one, and return what it prints."""
    options = ["-W", "error"] + (["-W", ALLOW_FORK] if allow_fork else [])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", *options, "-c", textwrap.dedent(script)],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE * 3,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


class Served:
    """Something to serve, that notes who was served, and how."""

    def __init__(self, name: str, served: list[tuple[str, How]]) -> None:
        self.name = name
        self.served = served

    def serve(self, how: How) -> None:
        self.served.append((self.name, how))


class Calling:
    """Something to serve, that calls a function."""

    def __init__(self, fn: cabc.Callable[[], object]) -> None:
        self.fn = fn

    def serve(self, how: How) -> None:
        self.fn()


def test_threads_are_started_on_demand() -> None:
    """No more threads are started than are needed, and the size is the most."""
    before = threading.active_count()
    threads = Threads(2)
    assert threading.active_count() == before
    names: list[str] = []
    called = threading.Semaphore(0)
    meeting = threading.Barrier(2)

    def call(wait: bool) -> None:
        names.append(threading.current_thread().name)

        if wait:
            meeting.wait(PATIENCE)

        called.release()

    threads.summon(Calling(functools.partial(call, False)))
    assert called.acquire(timeout=PATIENCE)
    assert threading.active_count() == before + 1

    for _ in range(4):
        threads.summon(Calling(functools.partial(call, True)))

    for _ in range(4):
        assert called.acquire(timeout=PATIENCE)

    assert threading.active_count() == before + 2
    assert set(names) == {"apitask_0", "apitask_1"}


def test_thread_that_sleeps_is_woken() -> None:
    """A thread that has nothing to do is used again, before another one is started."""
    threads = Threads(2)
    used: list[int] = []

    for _ in range(20):
        called = threading.Event()

        def call(called: threading.Event = called) -> None:
            used.append(threading.get_ident())
            called.set()

        threads.summon(Calling(call))
        assert called.wait(PATIENCE)

        wait_until(lambda: bool(threads._asleep))

    assert len(set(used)) == 1
    assert repr(threads) == "<Threads size=2 threads=1 asleep=1 overdue=0>"


def test_threads_end_with_their_last_reference() -> None:
    """Idle threads end as soon as nobody can use them any more."""
    threads = Threads(1)
    used: list[threading.Thread] = []
    called = threading.Event()

    def call() -> None:
        used.append(threading.current_thread())
        called.set()

    threads.summon(Calling(call))
    assert called.wait(PATIENCE)
    gone = threading.Event()
    weakref.finalize(threads, gone.set)
    del threads
    assert gone.wait(PATIENCE)
    used[0].join(PATIENCE)
    assert not used[0].is_alive()


def test_one_thread_is_on_its_way_at_a_time() -> None:
    """Who asks while a thread is on its way wakes no other; it sends for the next."""
    threads = HeldThreads()
    served: list[tuple[str, How]] = []

    for name in "abc":
        threads.summon(Served(name, served))

    assert len(threads.calls) == 1
    first = threads.calls.pop()
    first()
    # The first thread sent for one more while others waited, and came to them itself.
    assert served == [("a", "thread"), ("b", "thread"), ("c", "thread")]
    assert len(threads.calls) == 1
    threads.come()
    assert len(served) == 3
    threads.summon(Served("d", served))
    threads.come()
    assert served[3:] == [("d", "thread")]


def test_thread_that_waits_is_sent_for_before_work_begins() -> None:
    """An arriving thread sends for the next one, and only then begins."""
    threads = HeldThreads()
    coming: list[int] = []

    class Counting(Served):
        def serve(self, how: How) -> None:
            coming.append(len(threads.calls))

    threads.summon(Counting("a", []))
    threads.summon(Counting("b", []))
    threads.come()
    assert coming == [1, 1]


def test_refused_caller_serves_all_that_wait() -> None:
    """Where no thread can be had, nobody who relied on one is forgotten."""
    served: list[tuple[str, How]] = []

    class Refusing(RefusingThreads):
        def rouse(self, worker: Worker) -> None:
            # Another one asks between the two steps of the one that is refused.
            self.add(Served("other", served))
            super().rouse(worker)

    Refusing().summon(Served("own", served))
    assert served == [("own", "inline"), ("other", "inline")]


def test_interrupt_while_a_thread_is_sent_for() -> None:
    """After a Ctrl-C, too, the next one who asks sends for a thread."""
    threads = HeldThreads()
    served: list[tuple[str, How]] = []
    rouse = threads.rouse

    def interrupted(worker: Worker) -> None:
        raise KeyboardInterrupt

    threads.rouse = interrupted  # type: ignore[method-assign]

    with pytest.raises(KeyboardInterrupt):
        threads.summon(Served("a", served))

    threads.rouse = rouse  # type: ignore[method-assign]
    threads.summon(Served("b", served))
    threads.come()
    assert served == [("a", "thread"), ("b", "thread")]


def test_scope_that_ended_waits_for_no_thread() -> None:
    """While no thread comes, nothing keeps the scopes that needed none."""
    threads = HeldThreads()

    scope = TaskScope(threads, max_workers=1)
    scope.submit(int)
    scope.end()
    assert not threads._waiting
    # As if it had been served in the meantime.
    threads.dismiss(scope)


def test_thread_comes_and_goes_while_a_scope_is_added() -> None:
    """Somebody is sent for though one seemed to be on its way."""
    threads = HeldThreads()
    served: list[tuple[str, How]] = []
    threads.summon(Served("first", served))

    class Slow(deque[t.Any]):
        def append(self, scope: t.Any) -> None:
            threads.come()
            super().append(scope)

    threads._waiting = Slow(threads._waiting)
    threads.summon(Served("second", served))
    assert served == [("first", "thread")]
    threads.come()
    assert served == [("first", "thread"), ("second", "thread")]


def test_interrupted_wait_leaves_no_waiter() -> None:
    """A wait that a Ctrl-C ends is not taken for one that can be woken."""
    scope = TaskScope(HeldThreads(), max_workers=1)

    class Interrupted(_Waiter):
        def sleep(self, timeout: float) -> None:
            raise KeyboardInterrupt

    with mock.patch.object(scope_module, "_Waiter", Interrupted):
        scope.submit(int)

        with pytest.raises(KeyboardInterrupt):
            scope.wait(PATIENCE)

    assert not scope._waiters
    scope.end()


def test_refusal_is_not_for_ever() -> None:
    """After a refusal the next one who asks sends for a thread again."""
    threads = HeldThreads()
    served: list[tuple[str, How]] = []
    refuse = [True]
    rouse = threads.rouse

    def rouse_or_refuse(worker: Worker) -> None:
        if refuse:
            refuse.clear()
            raise RuntimeError("can't start new thread")

        rouse(worker)

    threads.rouse = rouse_or_refuse  # type: ignore[method-assign]
    threads.add(Served("a", served))
    threads.summon(Served("b", served))
    threads.come()
    assert served == [("a", "thread"), ("b", "thread")]


def test_queued_tasks_are_done_at_exit() -> None:
    """What is queued when the interpreter exits is done before it is gone."""
    printed = run_script("""
        import concurrent.futures.thread
        import threading
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        exiting = threading.Event()
        # Called just before the pool is told, and so before atexit's functions.
        threading._register_atexit(exiting.set)
        scope = TaskScope(Threads(1), max_workers=1)
        scope.submit(lambda: print("exiting", exiting.wait(10)))

        for index in range(5):
            scope.submit(print, index)

        scope.shutdown(wait=False)
    """)
    assert printed.split() == ["exiting", "True", "0", "1", "2", "3", "4"]


def test_submit_at_exit() -> None:
    """A task of an exit handler runs inline, as no thread can be had any more."""
    printed = run_script("""
        import atexit
        import threading
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        def say_goodbye():
            with TaskScope(threads, max_workers=2) as scope:
                for index in range(3):
                    name = scope.submit(threading.current_thread).result(10).name
                    print(name, index)

        threads = Threads(2)
        atexit.register(say_goodbye)

        with TaskScope(threads, max_workers=2) as scope:
            print(scope.submit(len, "abc").result(10))
    """)
    assert printed.splitlines() == [
        "3",
        "MainThread 0",
        "MainThread 1",
        "MainThread 2",
    ]


def test_task_submits_at_exit() -> None:
    """A task that submits others at exit has them done, on a thread or inline."""
    printed = run_script("""
        import concurrent.futures.thread
        import threading
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        def outer():
            print("exiting", exiting.wait(10))

            for index in range(3):
                scope.submit(print, index)

            scope.shutdown(wait=False)

        exiting = threading.Event()
        threading._register_atexit(exiting.set)
        scope = TaskScope(Threads(2), max_workers=1)
        scope.submit(outer)
    """)
    assert printed.split() == ["exiting", "True", "0", "1", "2"]


def test_system_without_forks() -> None:
    """The threads work where the system knows no forks."""
    printed = run_script("""
        import os

        for name in ("fork", "register_at_fork"):
            if hasattr(os, name):
                delattr(os, name)

        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        with TaskScope(Threads(1), max_workers=1) as scope:
            print(scope.submit(len, "abc").result(10))
    """)
    assert printed == "3\n"


@forks
def test_threads_after_a_fork() -> None:
    """A child has threads of its own, however its parent's were used."""
    printed = run_script(
        """
        import os, sys, threading
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        threads = Threads(2)

        def use():
            with TaskScope(threads, max_workers=2) as scope:
                meeting = threading.Barrier(2)
                futures = [scope.submit(meeting.wait, 10) for _ in range(2)]
                return sorted(future.result(10) for future in futures)

        use()
        child = os.fork()

        if not child:
            print("child", use(), flush=True)
            grandchild = os.fork()

            if not grandchild:
                print("grandchild", use(), flush=True)
                sys.exit()

            sys.exit(os.waitpid(grandchild, 0)[1])

        assert os.waitpid(child, 0)[1] == 0
        print("parent", use())
        """,
        allow_fork=True,
    )
    assert printed.splitlines() == [
        "child [0, 1]",
        "grandchild [0, 1]",
        "parent [0, 1]",
    ]


@forks
def test_scope_in_a_forked_child() -> None:
    """A scope of the parent is closed in a child, and nobody waits for it there.

    Its lock is held by nobody in the child, and the task that runs is the parent's.
    """
    printed = run_script(
        """
        import gc, os, sys, threading
        from flask_apitask import ScopeClosed
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        begun, opened = threading.Event(), threading.Event()

        def gate():
            begun.set()
            assert opened.wait(10)

        scope = TaskScope(Threads(1), max_workers=1, timeout=5.0)
        scope.submit(gate)
        queued = scope.submit(print, "in the parent", flush=True)
        begun.wait(10)
        scope._lock.__enter__()
        child = os.fork()

        if not child:
            assert scope.closed

            try:
                scope.submit(print, "in the child")
            except ScopeClosed as error:
                print(str(error)[:51], flush=True)

            scope.wait()
            scope.wait(0)
            scope.shutdown()
            scope.end()
            del scope
            gc.collect()
            sys.exit()

        scope._lock.__exit__(None, None, None)
        assert os.waitpid(child, 0)[1] == 0
        opened.set()
        scope.wait()
        scope.end()
        """,
        allow_fork=True,
    )
    assert printed.splitlines() == [
        "Task 'builtins.print' was submitted to a scope that",
        "in the parent",
    ]


@forks
def test_open_scope_is_left_to_the_parent() -> None:
    """A child that drops its parent's open scope is not told to end it."""
    run_script(
        """
        import gc, os, sys
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        scope = TaskScope(Threads(1), max_workers=1)
        scope.submit(len, "abc")
        scope.wait()
        child = os.fork()

        if not child:
            del scope
            gc.collect()
            sys.exit()

        assert os.waitpid(child, 0)[1] == 0
        scope.end()
        """,
        allow_fork=True,
    )


VIEW = """
    import multiprocessing, os, sys, threading, time
    from flask import Flask
    from flask_apitask import ApiTask, current_scope, open_scope, run, wait

    app = Flask(__name__)
    ApiTask(app)
    begun, opened = threading.Event(), threading.Event()

    def gate():
        begun.set()
        assert opened.wait(10)
        print("parent's task", flush=True)

    def work():
        # A plain call: finished on return, and on the thread that called.
        future = run(threading.get_ident)
        assert future.done() and future.result() == threading.get_ident()
        wait()
        wait(0)
        assert current_scope() is None
"""


@forks
@pytest.mark.parametrize("block", ["pass", "stack.enter_context(open_scope())"])
def test_fork_in_a_view(block: str) -> None:
    """A child of a view runs its tasks at once, and leaves the parent's to the parent.

    It may even go on to the end of the request.
    """
    printed = run_script(
        textwrap.dedent(VIEW)
        + textwrap.dedent(f"""
        import contextlib

        @app.get("/")
        def view():
            with contextlib.ExitStack() as stack:
                {block}
                run(gate)
                assert begun.wait(10)
                child = os.fork()

                if not child:
                    work()
                    return "child"

                assert os.waitpid(child, 0)[1] == 0
                opened.set()

            return "parent"

        print(app.test_client().get("/").text, flush=True)
        """),
        allow_fork=True,
    )
    assert printed.splitlines() == ["child", "parent's task", "parent"]


@forks
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("busy", [0, 1])
def test_fork_in_a_task(busy: int, locked: bool) -> None:
    """A child that returns from a task leaves those after it to the parent.

    Also where the waiting thread has found nothing free in its first round of help, or
    where another had the lock, which nobody in the child ever gives back.
    """
    printed = run_script(
        f"""
        import os
        from flask_apitask.scope import TaskScope
        from flask_apitask.threads import Threads

        class LateThreads(Threads):
            def rouse(self, worker):
                pass

        class BusyScope(TaskScope):
            rounds = 0

            def _take(self, last):
                self.rounds += 1
                return super()._take(last) if self.rounds > {busy} else None

        children = []

        def fork():
            if {locked}:
                scope._lock.__enter__()

            children.append(os.fork())

            if {locked} and children[0]:
                scope._lock.__exit__(None, None, None)

        scope = BusyScope(LateThreads(1), max_workers=1)
        scope.submit(fork)
        scope.submit(print, "second", flush=True)
        scope.wait()

        if not children[0]:
            os._exit(0)

        assert os.waitpid(children[0], 0)[1] == 0
        scope.end()
        """,
        allow_fork=True,
    )
    assert printed == "second\n"


@forks
def test_multiprocessing_in_a_view() -> None:
    """A child that multiprocessing forks can run tasks, and ends."""
    printed = run_script(
        textwrap.dedent(VIEW)
        + textwrap.dedent("""
        @app.get("/")
        def view():
            run(gate)
            assert begun.wait(10)
            child = multiprocessing.get_context("fork").Process(target=work)
            child.start()
            child.join(10)
            opened.set()
            return f"exit code {child.exitcode}"

        print(app.test_client().get("/").text, flush=True)
        """),
        allow_fork=True,
    )
    assert printed.splitlines() == ["parent's task", "exit code 0"]


def test_no_thread_is_left_in_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system starts no more threads, the one who asked does the work."""

    def refuse(self: threading.Thread) -> t.NoReturn:
        raise RuntimeError("can't start new thread")

    threads = Threads(1)
    served: list[tuple[str, How]] = []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    threads.summon(Served("a", served))
    assert served == [("a", "inline")]
    monkeypatch.undo()
    assert repr(threads) == "<Threads size=1 threads=0 asleep=0 overdue=0>"


def test_server_that_lets_no_thread_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread would freeze between requests, the one who asked does the work."""
    monkeypatch.setattr(threads_module, "threads_go_on", lambda: False)
    threads = Threads(1)
    served: list[tuple[str, How]] = []
    threads.summon(Served("a", served))
    assert served == [("a", "inline")]
    assert repr(threads) == "<Threads size=1 threads=0 asleep=0 overdue=0>"
