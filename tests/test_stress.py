from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until
from scopes import ALLOW_FORK
from scopes import forks
from stress_load import Load
from stress_load import POOL_SIZE

if t.TYPE_CHECKING:
    from flask_apitask.executor.pool import ThreadPool

pytestmark = pytest.mark.stress

TESTS = pathlib.Path(__file__).parent


def expect_rest(load: Load) -> None:
    """Expect that no pool has more threads than it may, and that all of them sleep."""
    for app in load.apps:
        wait_until(functools.partial(is_at_rest, app.extensions["apitask"].pool))


def is_at_rest(pool: ThreadPool) -> bool:
    """Return whether nothing is left to do, and no thread too many."""
    nothing_left = not (pool._busy or pool._abandoned or pool._waiting)
    return nothing_left and len(pool._idle) <= POOL_SIZE


def run_load(script: str, *options: str) -> str:
    """Run a script with a load in development mode, and return what it prints.

    A run that hangs tells where, and fails.
    """
    seed = random.SystemRandom().getrandbits(32)
    prelude = f"""
        import faulthandler, sys
        faulthandler.dump_traceback_later({PATIENCE * 3}, exit=True)
        from stress_load import Load

        load = Load({seed})
        """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", *options]
        + ["-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        text=True,
        timeout=PATIENCE * 4,
    )
    assert (done.stderr, done.returncode) == ("", 0), f"seed {seed}"
    return done.stdout


def test_load() -> None:
    """Of thousands of tasks, none is lost, run twice, or fails in silence."""
    seed = random.SystemRandom().getrandbits(32)

    with contextlib.closing(Load(seed)) as load:
        load.make_requests(range(1000), threads=100)
        balance = load.balance()
        # Else the seed has decided on nothing.
        assert balance.tasks > 5000, f"seed {seed}"
        assert 0 < balance.late < balance.cancelled
        assert balance.failed > 500
        expect_rest(load)


def test_load_in_development_mode() -> None:
    """The same in Python's development mode, with warnings as errors."""
    printed = run_load("""
        load.make_requests(range(150), threads=50)
        print("balanced", load.balance().tasks > 500)
        """)
    assert printed == "balanced True\n"


@forks
def test_fork_in_the_middle() -> None:
    """Children that are forked in the middle have loads of their own, and balance."""
    printed = run_load(
        """
        import os, signal, threading, traceback
        from conftest import wait_until

        # The watch of faulthandler is a thread, and does not come along to a child.
        faulthandler.cancel_dump_traceback_later()
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(30)

        # No child can go on with what a thread was just importing.
        load.make_requests(range(2000, 2050), threads=1)
        load.balance()
        load.begin()

        def has_own_threads():
            pools = [app.extensions["apitask"].pool for app in load.apps]
            names = [thread.name for thread in threading.enumerate()]
            alive = sum(name.startswith("apitask_") for name in names)
            return 0 < alive == sum(len(pool._idle) for pool in pools)

        def follow():
            signal.alarm(15)

            try:
                load.begin()
                load.make_requests(range(1000, 1050), threads=20)
                load.balance()
                wait_until(has_own_threads)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)

        threads = [
            threading.Thread(target=load.make_requests, args=(range(n, 200, 4), 10))
            for n in range(4)
        ]

        for thread in threads:
            thread.start()

        children = []

        while len(children) < 3:
            child = os.fork()

            if not child:
                follow()

            children.append(child)
            # Somewhere else in the load.
            threads[0].join(0.05)

        print([os.waitpid(child, 0)[1] for child in children])

        for thread in threads:
            thread.join()

        print("balanced", load.balance().tasks > 500)
        """,
        "-W",
        ALLOW_FORK,
    )
    assert printed == "[0, 0, 0]\nbalanced True\n"


def test_exit_in_the_middle() -> None:
    """Tasks that are queued, running or submitted at interpreter exit are done.

    One WARNING of each pool at most says that there are no threads any more, and
    another one what was left behind.
    """
    printed = run_load("""
        import atexit, logging, threading, time

        class Counting(logging.Handler):
            refused = left = 0

            def emit(self, record):
                text = record.getMessage()
                self.refused += text.startswith("No thread can be started")
                self.left += text.startswith("The process exits")

        def work(start):
            for number in range(start, 150, 10):
                load.make_request(number)

        def finish():
            pools = len(load.apps)
            quiet = warnings.refused <= pools and warnings.left <= pools
            print("balanced", load.balance().tasks > 500, quiet)

        warnings = Counting()
        logging.getLogger("flask_apitask").addHandler(warnings)
        # Called when all threads are done but those of the pools.
        atexit.register(finish)

        for start in range(10):
            threading.Thread(target=work, args=(start,)).start()

        # Some tasks run and some are queued by now.
        while len(load.outcomes) < 100:
            time.sleep(0)
        """)
    assert printed == "balanced True True\n"
