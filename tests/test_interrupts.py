from __future__ import annotations

import itertools
import pathlib
import sys
import threading
import time
import typing as t

import pytest
from conftest import PATIENCE
from conftest import wait_until
from late_threads import in_time
from scopes import Gate
from scopes import join
from scopes import make_scope

from flask_apitask.executor import pool as pool_module
from flask_apitask.executor.barrier import Barrier
from flask_apitask.executor.pool import ThreadPool

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.future import TaskFuture

FOLDER = str(pathlib.Path(pool_module.__file__).parent)


def interrupt(number: int, fn: cabc.Callable[[], object]) -> bool:
    """Call a function, and raise KeyboardInterrupt at a point of the executor's code.

    Python calls signal handlers where a function begins and where a C function has
    returned; in loops too, but each of our loops calls something. Python 3.14 also does
    so just after ``with`` has acquired a lock. Nothing could release the lock then, so
    these points are left out.

    :param number: The number of this point, from 1.
    :return: Whether there are that many points.
    """
    points = itertools.count(1)

    def profile(frame: t.Any, event: str, function: object) -> None:
        entered = getattr(function, "__name__", "") == "__enter__"

        if frame.f_code.co_filename.startswith(FOLDER) and not entered:
            if event in ("call", "c_return") and next(points) == number:
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)

    try:
        fn()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before)

    return False


def make_pool(size: int, idle: int) -> ThreadPool:
    """Make a pool in which some threads are idle."""
    pool, gate = ThreadPool(size), Gate()
    pool.tasks_are_small = False

    with make_scope(size, pool) as scope:
        for _ in range(idle):
            scope.submit(gate)

        wait_until(lambda: len(gate.threads) == idle)
        gate.opened.set()

    wait_until(lambda: len(pool._idle) == idle)
    return pool


def interrupt_scope(number: int, pool: ThreadPool, tasks: int) -> bool:
    """Interrupt the use of a scope, and check that everything still works."""
    done: list[int] = []
    futures: list[TaskFuture[None]] = []
    scope = make_scope(2, pool)

    def use() -> None:
        for index in range(tasks):
            futures.append(scope.submit(done.append, index))

        scope.end()

    interrupted = interrupt(number, use)
    in_time(scope.end)
    assert all(future.done() for future in futures)
    # A task may have been submitted although the call was interrupted.
    assert len(futures) <= len(done) <= tasks

    with make_scope(2, pool) as following:
        assert in_time(following.submit(len, "abc").result) == 3

    # The exit of the process would wait for a thread that counts as busy.
    wait_until(lambda: not pool._busy)
    in_time(pool.close, time.monotonic())
    return interrupted


@pytest.mark.parametrize(
    ("size", "idle", "tasks", "small"),
    [
        pytest.param(2, 2, 1, True, id="idle thread"),
        pytest.param(2, 0, 1, True, id="new thread"),
        pytest.param(0, 0, 2, True, id="extra thread"),
        pytest.param(2, 2, 3, True, id="threads one by one"),
        pytest.param(2, 2, 3, False, id="a thread for each"),
        pytest.param(1, 1, 3, False, id="one thread for all"),
    ],
)
def test_interrupt_at_any_point(size: int, idle: int, tasks: int, small: bool) -> None:
    """Wherever a Ctrl-C hits, no task and no thread is lost, and nothing hangs."""
    for number in itertools.count(1):
        threads, pool = set(threading.enumerate()), make_pool(size, idle)
        pool.tasks_are_small = small

        try:
            interrupted = interrupt_scope(number, pool, tasks)
            join(*set(threading.enumerate()) - threads)
        except BaseException as error:
            raise AssertionError(f"At point {number}: {error}") from error

        if not interrupted:
            assert number > 20
            break


def test_interrupt_of_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that come later are not left to a single thread."""
    pool, gate = ThreadPool(1), Gate()

    def interrupted(self: Barrier, timeout: float | None) -> t.NoReturn:
        raise KeyboardInterrupt

    with make_scope(1, pool) as scope:
        scope.submit(gate)
        assert gate.begun.wait(PATIENCE)
        scope.submit(bool)
        scope.submit(bool)

        monkeypatch.setattr(Barrier, "sleep", interrupted)

        with pytest.raises(KeyboardInterrupt):
            scope.wait()

        monkeypatch.undo()
        assert scope._head_start is None
        gate.opened.set()
