from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import PATIENCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

PRELUDE = """\
from __future__ import annotations

import os
import signal
import sys
import threading
import warnings

from flask import Flask

from flask_apitask import ApiTask, current_scope, open_scope, run, wait

# Python 3.12 warns of a fork with threads, which is what these tests are about.
warnings.simplefilter("ignore", DeprecationWarning)
signal.alarm({patience})
app = Flask("site")
ApiTask(app)
app.add_url_rule("/", "index", lambda: run(threading.get_ident).result(5) and "ok")


def in_child(fn):
    child = os.fork()

    if child == 0:
        signal.alarm({patience})

        try:
            fn()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

        os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run_script(script: str, *, warns: bool = False) -> str:
    """Run a script in a fresh interpreter, and return what it printed."""
    prelude = PRELUDE.format(patience=int(PATIENCE))
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert warns or result.stderr == ""
    return result.stdout


def test_child_of_a_process_that_used_threads() -> None:
    """A child forked after use runs its tasks on threads of its own (behaviour 19)."""
    output = run_script(
        """
        def request():
            assert app.test_client().get("/").text == "ok"

        request()
        assert threading.active_count() == 2
        in_child(request)
        in_child(lambda: in_child(request))
        request()
        print("done")
        """
    )
    assert output == "done\n"


def test_child_of_a_process_that_used_none() -> None:
    """A child forked before use, as with a preloaded app, works too (behaviour 19)."""
    output = run_script(
        """
        def request():
            assert app.test_client().get("/").text == "ok"

        assert threading.active_count() == 1
        in_child(request)
        request()
        print("done")
        """
    )
    assert output == "done\n"


@pytest.mark.parametrize(
    "outermost", ["app.test_request_context()", "app.app_context(), open_scope()"]
)
def test_child_leaves_open_scopes_to_its_parent(outermost: str) -> None:
    """A child forked in a request runs none of its parent's tasks (behaviour 19)."""
    output = run_script(
        f"""
        begun, release = threading.Event(), threading.Event()
        parent = os.getpid()

        def work():
            begun.set()
            assert release.wait(5)
            assert os.getpid() == parent
            print("task", flush=True)

        def child():
            # No wait for a thread that is not there, and nothing is run twice.
            wait()
            assert current_scope() is None
            assert run(os.getpid).result(0) == os.getpid()
            assert run(threading.get_ident).result(0) == threading.get_ident()

            if not {outermost.startswith("app.test")}:
                return

            assert app.test_client().get("/").text == "ok"

        with {outermost}:
            run(work)
            assert begun.wait(5)
            in_child(child)
            release.set()

        print("done")
        """
    )
    assert output == "task\ndone\n"


def test_block_that_is_left_in_a_child() -> None:
    """A child that leaves its parent's block waits for no task (behaviour 19)."""
    output = run_script(
        """
        begun, release = threading.Event(), threading.Event()

        def work():
            begun.set()
            assert release.wait(5)
            # At once, unlike print(): the other task writes as well.
            os.write(1, b"task\\n")

        with app.app_context():
            parent = os.getpid()

            with open_scope():
                run(work)
                assert begun.wait(5)
                run(os.write, 1, b"queued\\n")
                child = os.fork()

                if child:
                    status = os.waitpid(child, 0)[1]
                    assert os.waitstatus_to_exitcode(status) == 0
                    release.set()

        if os.getpid() != parent:
            os._exit(0)

        print("done")
        """
    )
    assert sorted(output.split()) == ["done", "queued", "task"]


def test_started_tasks_finish_at_exit() -> None:
    """At interpreter exit, tasks that were started finish first (behaviour 19)."""
    output = run_script(
        """
        begun, exiting = threading.Event(), threading.Event()

        def work(name):
            begun.set()
            assert exiting.wait(5)
            print(name, flush=True)

        app.app_context().push()
        scope = open_scope(max_workers=1)
        scope.__enter__()
        run(work, "running")
        run(work, "queued")
        assert begun.wait(5)
        # Called in reverse order: before the one that joins the threads of pools.
        threading._register_atexit(exiting.set)
        print("main", flush=True)
        """,
        # A scope that was never ended is told of when it is collected.
        warns=True,
    )
    assert output == "main\nrunning\nqueued\n"


def test_tasks_at_exit_run_inline() -> None:
    """What is submitted while the interpreter exits runs inline (behaviour 16)."""
    output = run_script(
        """
        import atexit

        def late():
            with app.test_request_context():
                future = run(threading.get_ident)
                assert future.result(0) == threading.get_ident()

            assert app.test_client().get("/").text == "ok"
            print("late", flush=True)

        # Called once no pool of the process takes calls any more.
        atexit.register(late)
        assert app.test_client().get("/").text == "ok"
        """
    )
    assert output == "late\n"
