"""What type checkers have to find in calls of the public functions. It is not run.

An ``ignore`` comment is a claim as well: that there is an error, and of which kind. Both
mypy and pyright are set up to refuse one that is not needed.
"""

from __future__ import annotations

import collections.abc as cabc
import typing as t

from sqlalchemy.orm import scoped_session
from sqlalchemy.orm import Session
from sqlalchemy.orm import sessionmaker
from typing_extensions import assert_type

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_commit
from flask_apitask import run_on_success
from flask_apitask import scoped
from flask_apitask import task
from flask_apitask import TaskScope
from flask_apitask.executor.future import TaskFuture
from flask_apitask.testing import record_tasks
from flask_apitask.testing import RecordedTask

if t.TYPE_CHECKING:
    from concurrent.futures import Future

    from flask import Flask


def double(number: int, *, times: int = 1) -> int:
    return number * times


async def fetch(url: str) -> bytes:
    return url.encode()


@task("numbers.half")
def half(number: int) -> float:
    return number / 2


class Count:
    name = "numbers.count"

    def run(self) -> int:
        return 1


def results_keep_their_types() -> None:
    assert_type(run(double, 1), TaskFuture[int])
    future: Future[int] = run(double, 1)
    assert_type(future.result(), int)
    assert_type(run(double, 1, times=2).result(), int)
    assert_type(run(half, 3), TaskFuture[float])
    assert_type(run(fetch, "a"), TaskFuture[bytes])
    assert_type(run(Count()), TaskFuture[int])


def what_is_put_off_keeps_its_type(session: Session) -> None:
    assert_type(run_on_success(half, 3), TaskFuture[float])
    assert_type(run_on_success(fetch, "a"), TaskFuture[bytes])
    assert_type(run_on_success(Count()), TaskFuture[int])
    assert_type(run_on_commit(session, half, 3), TaskFuture[float])
    assert_type(run_on_commit(session, fetch, "a"), TaskFuture[bytes])
    assert_type(run_on_commit(scoped_session(sessionmaker()), Count()), TaskFuture[int])
    run_on_success(double, "1")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    run_on_commit(half, 3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def results_can_be_awaited() -> None:
    assert_type(await run(half, 3), float)
    assert_type(await run(fetch, "a"), bytes)


def arguments_are_checked() -> None:
    run(double, "1")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    run(double)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    run(double, 1, size=2)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    run(double(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


@scoped
def view(name: str) -> int:
    return len(name)


@scoped(max_workers=2, timeout=5.0)
async def async_view(name: str) -> int:
    return len(name)


@scoped(wait="close")
def view_that_answers_first(name: str) -> int:
    return len(name)


async def views_keep_their_signatures() -> None:
    assert_type(view_that_answers_first("a"), int)
    scoped(wait="later")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    assert_type(view("a"), int)
    assert_type(await async_view("a"), int)
    view(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await async_view()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def scopes_are_executors(app: Flask) -> None:
    ApiTask(app)
    assert_type(current_scope(), TaskScope | None)

    with open_scope(max_workers=1) as scope:
        assert_type(scope, TaskScope)
        assert_type(scope.submit(double, 1), TaskFuture[int])
        assert_type(scope.map(double, [1, 2]), cabc.Iterator[int])


def records_are_typed(app: Flask) -> None:
    with record_tasks(app) as tasks:
        assert_type(tasks, list[RecordedTask])
        assert_type(tasks[0].exception, BaseException | None)
        assert_type(tasks[0].dropped, bool)
