"""What tests of scopes and their threads have in common."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import typing as t

import pytest
from conftest import PATIENCE

from flask_apitask.executor.pool import ThreadPool
from flask_apitask.executor.scope import TaskScope

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.worker import Worker

forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no process forks on this system"
)

# A fork of a process with threads is what these tests are about.
ALLOW_FORK = "ignore:This process:DeprecationWarning"


class Payload:
    """An argument or a result that a weak reference can point to."""


class Gate:
    """A task that is under way until it is let through."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.opened = threading.Event()
        # Those that have come.
        self.threads: list[threading.Thread] = []

    def __call__(self, *args: object) -> str:
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.opened.wait(PATIENCE)
        return "through"


class RefusedPool(ThreadPool):
    """A pool that can start no thread."""

    def __init__(self) -> None:
        super().__init__(1)

    def _start(self, worker: Worker) -> None:
        raise RuntimeError("can't start new thread")


def make_scope(
    max_workers: int = 2, pool: ThreadPool | None = None, **options: t.Any
) -> TaskScope:
    """Make a scope, of a pool with threads to spare."""
    return TaskScope(pool or ThreadPool(4), max_workers, **options)


def start(fn: cabc.Callable[..., object], *args: t.Any) -> threading.Thread:
    """Call a function on another thread."""
    thread = threading.Thread(target=fn, args=args, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    """Wait until threads have ended."""
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread} does not end"


def fail(error: BaseException) -> t.NoReturn:
    """Raise an exception, as a task."""
    raise error


def nothing() -> None:
    """Do nothing, as a task."""


@contextlib.contextmanager
def no_collector() -> cabc.Iterator[None]:
    """Leave it to reference counts alone to free what a block used."""
    gc.collect()
    gc.disable()

    try:
        yield
    finally:
        gc.enable()


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
