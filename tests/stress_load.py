from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import logging
import random
import threading
import typing as t

from conftest import PATIENCE
from flask import Flask
from flask import Response
from flask import stream_with_context

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import task

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask.typing import ResponseReturnValue

    from flask_apitask import TaskScope

POOL_SIZE = 4

# Tasks of a request; some of them run tasks of their own.
TASKS = 8

# What tasks raise.
FAILURES: tuple[type[BaseException], ...] = (
    ValueError,
    OSError,
    MemoryError,
    StopIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
)

CONFIGS: dict[str, dict[str, t.Any]] = {
    "patient": {},
    "hurried": {"APITASK_TIMEOUT": 0.02},
    "close": {"APITASK_WAIT": "close"},
}


class Balance(t.NamedTuple):
    """What became of the tasks of a load.

    :param tasks: How many there were.
    :param failed: Those that were reported as failed.
    :param cancelled: Those that never ran.
    :param late: Those among them that a deadline cancelled, each reported.
    """

    tasks: int
    failed: int
    cancelled: int
    late: int


class Load(logging.Handler):
    """Requests to apps, by many threads at once, and the books of their tasks.

    It needs no lock, so that a fork may hit it at any time.

    :param seed: Decides what the requests do.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self.apps = [self._make_app(name) for name in CONFIGS]
        self.begin()

    def begin(self) -> None:
        """Open new books."""
        # By the name of a task; each is used once.
        self.outcomes: dict[str, type[BaseException] | None] = {}
        self.futures: dict[str, concurrent.futures.Future[None]] = {}
        # What was raised to the caller, where there was no scope.
        self.raised: dict[str, type[BaseException]] = {}
        # Of those that are cancelled, which were on purpose.
        self.cancelled: set[str] = set()
        self.ran: collections.deque[str] = collections.deque()
        self.errors: collections.deque[str] = collections.deque()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the ERROR records of tasks."""
        name: str | None = getattr(record, "apitask_task", None)

        if record.levelno == logging.ERROR and name is not None:
            self.errors.append(name)

    def close(self) -> None:
        """Take leave of the loggers, which live as long as the process."""
        for app in self.apps:
            app.logger.removeHandler(self)

        super().close()

    def make_requests(self, numbers: cabc.Iterable[int], threads: int) -> None:
        """Make requests, at most as many at a time as there are threads."""
        with concurrent.futures.ThreadPoolExecutor(threads) as executor:
            for _ in executor.map(self.make_request, numbers, timeout=3 * PATIENCE):
                pass

    def make_request(self, number: int) -> None:
        """Make one of the requests that the seed decides."""
        dice = random.Random(f"{self._seed}/{number}")
        client = dice.choice(self.apps).test_client()
        view = dice.choice(list(VIEWS))

        with client.get(f"/{view}/{number}", buffered=False) as response:
            if dice.random() < 0.5:
                # Else it goes away in the middle of the body.
                assert response.data or view == "fail"

    def balance(self) -> Balance:
        """Close the books: all ran once or were cancelled, and errors were told."""
        unfinished = concurrent.futures.wait(self.futures.values(), PATIENCE).not_done
        assert not unfinished
        cancelled = {name for name, found in self.futures.items() if found.cancelled()}
        ran = self.outcomes.keys() - cancelled
        assert collections.Counter(self.ran) == collections.Counter(ran)
        failed = {name for name in ran - self.raised.keys() if self.outcomes[name]}
        told = failed | (cancelled - self.cancelled)
        assert collections.Counter(self.errors) == collections.Counter(told)

        for name, raised in self.raised.items():
            assert raised is self.outcomes[name]

        for name in self.futures.keys() - cancelled:
            error = self.futures[name].exception(0)
            assert type(error) is (self.outcomes[name] or type(None))

        late = cancelled - self.cancelled
        return Balance(len(self.outcomes), len(failed), len(cancelled), len(late))

    def submit(self, name: str, dice: random.Random) -> None:
        """Run a task that fails, or runs others, or does nothing."""
        outcome = dice.choice(FAILURES) if dice.random() < 0.2 else None
        self.outcomes[name] = outcome
        seed = dice.random()
        work = task(name)(functools.partial(self._work, name, outcome, seed))

        try:
            self.futures[name] = run(work)
        except FAILURES as error:
            self.raised[name] = type(error)

    def _work(
        self, name: str, outcome: type[BaseException] | None, seed: float
    ) -> None:
        dice = random.Random(seed)
        self.ran.append(name)

        if name.count(".") < 3 and dice.random() < 0.1:
            with open_scope(max_workers=dice.randint(1, 3)):
                for index in range(2):
                    self.submit(f"{name}.{index}", dice)

        if outcome is not None:
            raise outcome

    def _make_app(self, name: str) -> Flask:
        app = Flask(f"stress.{name}")
        app.config.update(
            APITASK_POOL_SIZE=POOL_SIZE, APITASK_MAX_WORKERS=3, **CONFIGS[name]
        )
        # Not logged to the tests' own log: its records keep what failed.
        app.logger.handlers = [self]
        app.logger.propagate = False
        ApiTask(app)

        for rule, view in VIEWS.items():
            app.add_url_rule(
                f"/{rule}/<int:number>", rule, functools.partial(self._answer, view)
            )

        return app

    def _answer(self, view: View, number: int) -> ResponseReturnValue:
        dice = random.Random(f"{self._seed}/{number}/view")
        return view(self, f"stress.{number}", dice)


View: t.TypeAlias = "cabc.Callable[[Load, str, random.Random], ResponseReturnValue]"


def _submit_some(load: Load, name: str, dice: random.Random) -> list[str]:
    names = [f"{name}.{index}" for index in range(TASKS)]

    for each in names:
        load.submit(each, dice)

    return names


def _answer(load: Load, name: str, dice: random.Random) -> str:
    _submit_some(load, name, dice)
    return "ok"


def _fail(load: Load, name: str, dice: random.Random) -> str:
    _submit_some(load, name, dice)
    raise LookupError("the view itself")


def _cancel(load: Load, name: str, dice: random.Random) -> str:
    for each in _submit_some(load, name, dice)[::2]:
        if load.futures[each].cancel():
            load.cancelled.add(each)

    return "ok"


def _shut_down(load: Load, name: str, dice: random.Random) -> str:
    scope: TaskScope

    with open_scope(max_workers=1) as scope:
        load.cancelled.update(_submit_some(load, name, dice))
        scope.shutdown(wait=dice.random() < 0.5, cancel_futures=True)

    return "ok"


def _nest(load: Load, name: str, dice: random.Random) -> str:
    load.submit(f"{name}.0", dice)

    with open_scope(max_workers=dice.randint(1, 3)):
        load.submit(f"{name}.1", dice)

        with open_scope():
            load.submit(f"{name}.2", dice)

        load.submit(f"{name}.3", dice)

    load.submit(f"{name}.4", dice)
    return "ok"


def _stream(load: Load, name: str, dice: random.Random) -> Response:
    def body() -> cabc.Iterator[str]:
        for index in range(TASKS):
            load.submit(f"{name}.{index}", dice)
            yield str(index)

    return Response(stream_with_context(body()))


def _miss_deadline(load: Load, name: str, dice: random.Random) -> str:
    left = threading.Event()
    asking = threading.get_ident()
    first = f"{name}.first"
    load.outcomes[first] = None

    def outlast() -> None:
        load.ran.append(first)

        # It is called on the spot where no thread can be had, as at exit.
        if threading.get_ident() != asking:
            assert left.wait(PATIENCE)

    try:
        with open_scope(max_workers=1, timeout=0.005):
            load.futures[first] = run(task(first)(outlast))
            _submit_some(load, name, dice)
    finally:
        left.set()

    return "ok"


VIEWS: dict[str, View] = {
    "answer": _answer,
    "fail": _fail,
    "cancel": _cancel,
    "shut-down": _shut_down,
    "nest": _nest,
    "stream": _stream,
    "miss-deadline": _miss_deadline,
}
