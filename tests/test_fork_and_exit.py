from __future__ import annotations

import sys
import textwrap
import threading
import typing as t

import pytest
from child_process import ChildProcess
from conftest import PATIENCE
from scopes import forks
from scopes import run_script
from smtp_servers import Fault
from smtp_servers import ScriptedServer
from smtp_servers import Stage

# What each program begins with. Its log goes to its output, as it is no error.
PROGRAM = """
import logging, os, signal, socket, sys, threading
from flask import Flask
from flask_apitask import ApiTask, current_scope, open_scope, run, ScopeClosed, task
from flask_apitask import wait
from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.scope import TaskScope

if hasattr(signal, "alarm"):
    signal.alarm(25)

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message).11s")
app = Flask("site")
app.config.update(APITASK_POOL_SIZE=2)
ApiTask(app)
begun, opened, exiting = threading.Event(), threading.Event(), threading.Event()

def say(*words):
    # At once, unlike print(): other threads and processes write as well.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def gate(*words):
    begun.set()
    assert opened.wait(10)
    say(*words)

def until_exit(*words):
    begun.set()
    assert exiting.wait(10)
    say(*words)

def in_child(fn):
    child = os.fork()

    if not child:
        signal.alarm(20)
        code = 1

        try:
            fn()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    assert os.waitpid(child, 0)[1] == 0

@app.get("/")
def index():
    # On two threads at once.
    meeting = threading.Barrier(2)
    futures = [run(meeting.wait, 10) for _ in range(2)]
    return str(sorted(future.result() for future in futures))

def use():
    say(app.test_client().get("/").text)
"""


def run_program(script: str, *, first: str = "", allow_fork: bool = False) -> list[str]:
    """Run a program, and return what it says."""
    program = first + PROGRAM + textwrap.dedent(script)
    return run_script(program, allow_fork=allow_fork).splitlines()


@forks
@pytest.mark.parametrize("before", ["use()", ""])
def test_child_has_threads_of_its_own(before: str) -> None:
    """Whether its parent used its threads, or only preloaded the app (behaviour 19)."""
    said = run_program(
        f"""
        {before}
        in_child(lambda: (use(), in_child(use)))
        use()
        """,
        allow_fork=True,
    )
    assert said == ["[0, 1]"] * (4 if before else 3)


@forks
def test_locks_that_are_held_at_a_fork() -> None:
    """A scope of the parent is closed in a child, and nobody waits for it there.

    The locks of scope and pool are held, and nobody in the child ever gives them back.
    The task that runs is the parent's, as is the scope that was never ended.
    """
    said = run_program(
        """
        def child():
            use_pool()
            assert scope.closed

            try:
                scope.submit(say, "in the child")
            except ScopeClosed as error:
                say(str(error)[:29])

            with scope.waiting():
                scope.wait()
                scope.wait(0)

            scope.shutdown()
            scope.end()
            futures.clear()
            names.clear()

        def use_pool():
            with TaskScope(pool, 1) as other:
                say(other.submit(len, "abc").result())

        pool = ThreadPool(1)
        names = {"scope": TaskScope(pool, 1, timeout=5.0)}
        scope = names["scope"]
        scope.submit(gate, "in the parent")
        futures = [scope.submit(say, "queued")]
        assert begun.wait(10)

        with scope._lock, pool._lock:
            in_child(child)

        opened.set()
        scope.end()
        use_pool()
        """,
        allow_fork=True,
    )
    assert said == [
        "3",
        "Task '__main__.say' was submi",
        "in the parent",
        "queued",
        "3",
    ]


@forks
def test_open_scope_is_left_to_the_parent() -> None:
    """A child that drops its parent's open scope is not told to end it."""
    run_program(
        """
        import gc

        scope = TaskScope(ThreadPool(1), 1)
        scope.submit(len, "abc")
        scope.wait()

        def drop():
            global scope
            del scope
            gc.collect()

        in_child(drop)
        scope.end()
        """,
        allow_fork=True,
    )


@forks
@pytest.mark.parametrize("block", ["pass", "stack.enter_context(open_scope())"])
def test_fork_in_a_view(block: str) -> None:
    """A child forked in a view runs its tasks at once, and leaves the parent's alone.

    It may even go on to the end of the block and of the request.
    """
    said = run_program(
        f"""
        import contextlib

        @app.get("/fork")
        def fork():
            with contextlib.ExitStack() as stack:
                {block}
                run(gate, "parent's task")
                assert begun.wait(10)
                child = os.fork()

                if not child:
                    # A plain call: finished on return, and on the thread that called.
                    future = run(threading.get_ident)
                    assert future.result(0) == threading.get_ident()
                    wait()
                    wait(0)
                    assert current_scope() is None
                    # A request of its own has threads.
                    use()
                    return "child"

                assert os.waitpid(child, 0)[1] == 0
                opened.set()

            return "parent"

        say(app.test_client().get("/fork").text)
        """,
        allow_fork=True,
    )
    assert said == ["[0, 1]", "child", "parent's task", "parent"]


@forks
@pytest.mark.parametrize("how", ["thread", "inline"])
def test_fork_in_a_task(how: str) -> None:
    """A child that returns from a task leaves all else to the parent, and ends.

    Also where another thread has the lock, which nobody in the child ever gives back.
    """
    said = run_program(
        f"""
        class Pool(ThreadPool):
            def _start(self, worker):
                if "{how}" == "inline":
                    raise RuntimeError("none")

                super()._start(worker)

        children = []

        def fork():
            scope._lock.acquire()
            child = os.fork()

            if child:
                scope._lock.release()
                children.append(child)
            else:
                signal.alarm(20)

        # Nothing runs before the wait.
        scope = TaskScope(Pool(0), 1)
        scope.submit(fork)
        scope.submit(say, "second")
        scope.wait()

        if not children:
            os._exit(0)

        assert os.waitpid(children[0], 0)[1] == 0
        scope.end()
        """,
        allow_fork=True,
    )
    assert [line for line in said if "WARNING" not in line] == ["second"]


@forks
def test_multiprocessing() -> None:
    """A child that multiprocessing forks in a view can use threads, and ends."""
    said = run_program(
        """
        import multiprocessing

        @app.get("/fork")
        def fork():
            run(gate, "parent's task")
            assert begun.wait(10)
            child = multiprocessing.get_context("fork").Process(target=use)
            child.start()
            child.join(20)
            opened.set()
            return f"exit code {child.exitcode}"

        say(app.test_client().get("/fork").text)
        """,
        allow_fork=True,
    )
    assert said == ["[0, 1]", "parent's task", "exit code 0"]


def test_system_without_forks() -> None:
    """The threads work on a system without fork()."""
    printed = run_script("""
        import os

        for name in ("fork", "register_at_fork"):
            if hasattr(os, name):
                delattr(os, name)

        from flask_apitask.executor.pool import ThreadPool
        from flask_apitask.executor.scope import TaskScope

        with TaskScope(ThreadPool(1), 1) as scope:
            print(scope.submit(len, "abc").result(10))
    """)
    assert printed == "3\n"


@pytest.mark.parametrize("max_workers", [1, 2])
def test_started_tasks_finish_at_exit(max_workers: int) -> None:
    """At interpreter exit, running and queued tasks are done first, silently.

    A task may even submit others (behaviour 19).
    """
    said = run_program(f"""
        def outer():
            until_exit("running")
            scope.submit(say, "submitted at exit")
            scope.shutdown(wait=False)

        # Called in reverse order: before the one that closes pools.
        threading._register_atexit(exiting.set)
        scope = TaskScope(ThreadPool(2), 1)
        scope.submit(outer)
        other = TaskScope(ThreadPool(2), {max_workers})

        for index in range(5):
            other.submit(until_exit, index)

        other.shutdown(wait=False)
        assert begun.wait(10)
        say("main")
        """)
    outer = ["running", "submitted at exit"]
    assert said[0] == "main"
    assert [line for line in said[1:] if line in outer] == outer
    others = [line for line in said[1:] if line not in outer]
    assert (others if max_workers == 1 else sorted(others)) == list("01234")


def test_tasks_of_exit_handlers_run_inline() -> None:
    """No thread can be started any more, and one WARNING says so (behaviour 16)."""
    said = run_program("""
        import atexit

        def say_goodbye():
            with app.test_request_context():
                future = run(threading.get_ident)
                assert future.result(0) == threading.get_ident()

            with TaskScope(app.extensions["apitask"].pool, 2) as scope:
                for index in range(3):
                    scope.submit(say, threading.current_thread().name, index)

        atexit.register(say_goodbye)
        use()
        """)
    inline = [f"MainThread {index}" for index in range(3)]
    assert said == ["[0, 1]", "WARNING No thread c", *inline]


STUCK = """
        def connect():
            ours, theirs = socket.socketpair()
            # Nobody closes it.
            theirs.detach()
            return ours

        @task("stuck")
        def stuck():
            begun.set()
            {}

        app.config["APITASK_TIMEOUT"] = 0.1
        del app.extensions["apitask"]
        ApiTask(app)

        @app.get("/stuck")
        def leave():
            run(stuck)
            assert begun.wait(10)
            return "ok"

        def get_stuck():
            say(app.test_client().get("/stuck").text)
"""

HOLDS = {
    "lock": "threading.Event().wait()",
    "socket": "connect().recv(1)",
    "c": "os.read(os.pipe()[0], 1)",
    "python": "while True: pass",
}

GONE_ON = ["WARNING Stopped wai", "ok"]
LEFT = "WARNING The process"


def run_stuck(script: str, hold: str = "lock", **options: t.Any) -> list[str]:
    """Run a program with a task that is stuck for ever, and return what it says."""
    said = run_program(STUCK.format(HOLDS[hold]) + script, **options)
    # Without the stack.
    return [line for line in said if line and line[0] not in " '"]


@pytest.mark.parametrize("hold", HOLDS)
def test_exit_with_a_stuck_task(hold: str) -> None:
    """A process whose task is stuck ends, without an error."""
    assert run_stuck("        get_stuck()", hold) == [*GONE_ON, LEFT]


def test_exit_finishes_tasks_that_are_not_abandoned() -> None:
    """A process that leaves a stuck task behind finishes what else was started."""
    said = run_stuck("""
        get_stuck()
        scope = TaskScope(app.extensions["apitask"].pool, 1)
        begun.clear()
        scope.submit(until_exit, "running")
        scope.submit(say, "queued")
        assert begun.wait(10)
        scope.shutdown(wait=False)
        threading._register_atexit(exiting.set)
        say("main")
        """)
    assert said == [*GONE_ON, "main", "running", "queued", LEFT]


def test_exit_begins_before_the_deadline() -> None:
    """A process that ends while a request waits ends with the request's deadline."""
    said = run_stuck("""
        threading.Thread(target=get_stuck).start()
        assert begun.wait(10)
        """)
    # The request and the exit go on at the same moment.
    assert sorted(said) == sorted([*GONE_ON, LEFT])


def test_exit_in_a_process_of_greenlets() -> None:
    """A process whose threads are gevent's ends as well, with its stuck task."""
    pytest.importorskip("gevent")
    patch = "import gevent.monkey\ngevent.monkey.patch_all()\n"
    assert run_stuck("        get_stuck()", first=patch) == [*GONE_ON, LEFT]


@forks
@pytest.mark.parametrize("hold", HOLDS)
def test_exit_of_a_forked_child(hold: str) -> None:
    """A multiprocessing child and its parent both end, each with a stuck task."""
    said = run_stuck(
        """
        import multiprocessing

        get_stuck()
        begun.clear()
        child = multiprocessing.get_context("fork").Process(target=get_stuck)
        child.start()
        child.join(20)
        say("exit code", child.exitcode)
        """,
        hold,
        allow_fork=True,
    )
    assert said == [*GONE_ON, *GONE_ON, LEFT, "exit code 0", LEFT]


GRACE = """
        app.config["APITASK_TIMEOUT"] = 0.01
        del app.extensions["apitask"]
        ApiTask(app)

        @app.get("/late")
        def late():
            run(work)
            assert begun.wait(10)
            return "ok"

        say(app.test_client().get("/late").text)
        threading._register_atexit(exiting.set)
"""


@pytest.mark.parametrize("task", ["work", "functools.partial(work)", "Work()"])
def test_exit_waits_for_a_task_as_long_as_it_says(task: str) -> None:
    """A task past its deadline may finish, and is then not left behind."""
    said = run_program(
        """
        import functools

        def work():
            begun.set()
            assert exiting.wait(10)
            # The time of its scope has passed once more.
            assert not threading.Event().wait(0.1)
            say("done")

        work.exit_grace = None

        class Work:
            name = "work"
            run = staticmethod(work)
        """
        + GRACE.replace("run(work)", f"run({task})")
    )
    assert said == [*GONE_ON, "done"]


@pytest.mark.parametrize("grace", ["0", "0.05", "False"])
def test_exit_does_not_wait_longer_than_a_task_says(grace: str) -> None:
    """A task with an ``exit_grace`` is left behind after that, and named."""
    said = run_program(
        f"""
        logging.getLogger().handlers[0].setFormatter(None)

        @task("endless")
        def work():
            begun.set()
            threading.Event().wait()

        work.exit_grace = {grace}
        """
        + GRACE
    )
    assert said[-1] == (
        "The process exits without waiting any longer for 1 task(s) past their"
        " deadline: 'endless'"
    )


def test_mail_arrives_though_the_process_exits() -> None:
    """A mail that a slow server is about to take past the deadline is delivered."""
    reached, opened = threading.Event(), threading.Event()

    class SlowServer(ScriptedServer):
        def next_fault(self, stage: Stage) -> Fault | bytes | None:
            if stage is Stage.DATA:
                reached.set()
                assert opened.wait(PATIENCE)

            return super().next_fault(stage)

    program = PROGRAM + textwrap.dedent("""
        from flask_apitask import task_started
        from flask_mail import Mail

        del app.extensions["apitask"]
        app.config.update(
            APITASK_TIMEOUT=0.01,
            APITASK_MAIL_BACKGROUND=True,
            MAIL_PORT=int(sys.argv[1]),
        )
        mail = Mail(app)
        ApiTask(app)

        @task_started.connect_via(app)
        def note(app, **extra):
            begun.set()

        @app.get("/mail")
        def send():
            mail.send_message("late", sender="a@example.com", recipients=["b@x.org"])
            assert begun.wait(10)
            return "answered"

        say(app.test_client().get("/mail").text)
        threading._register_atexit(lambda: say("exits"))
        """)

    with SlowServer() as server:
        command = [sys.executable, "-c", program, str(server.port)]

        with ChildProcess(command) as child:
            child.expect("(answered)")
            child.expect("(exits)")
            assert reached.wait(PATIENCE)
            assert server.taken == []
            opened.set()
            assert child.wait() == 0

        assert [taken.recipients for taken in server.taken] == [("b@x.org",)]
        assert child.output.count("WARNING") == 1
