from __future__ import annotations

import functools
import math
import operator
import typing as t
from unittest import mock

import pytest

from flask_apitask import task
from flask_apitask.executor.task import exit_grace
from flask_apitask.executor.task import make_callable
from flask_apitask.executor.task import task_name


def plain() -> None:
    """Do nothing, without a name."""


@task("mailer.named")
def named(number: int = 0) -> int:
    """Do nothing, with a name."""
    return number


class Welcome:
    """A task object, and a home of methods."""

    name: object = "mailer.welcome"

    def run(self) -> str:
        return "sent"

    def method(self) -> None: ...

    @task("mailer.method")
    def named_method(self) -> None: ...

    @staticmethod
    def static() -> None: ...

    @classmethod
    def of_class(cls) -> None: ...


class Caller:
    """An object that can be called."""

    def __call__(self, *args: object) -> tuple[object, ...]:
        return args


class CallerWithName(Caller):
    """An object that can be called and has a name of its own."""

    task_name = "mailer.caller"
    name = "not this one"


NAMES: list[tuple[t.Any, str]] = [
    (plain, "test_tasks.plain"),
    (named, "mailer.named"),
    (lambda: None, "test_tasks.<lambda>"),
    (Welcome().method, "test_tasks.Welcome.method"),
    (Welcome().named_method, "mailer.method"),
    (Welcome.named_method, "mailer.method"),
    (Welcome.static, "test_tasks.Welcome.static"),
    (Welcome.of_class, "test_tasks.Welcome.of_class"),
    (Caller, "test_tasks.Caller"),
    (Caller(), "test_tasks.Caller"),
    (CallerWithName(), "mailer.caller"),
    (functools.partial(plain), "test_tasks.plain"),
    (functools.partial(functools.partial(named), 1), "mailer.named"),
    (functools.partial(Caller(), 1), "test_tasks.Caller"),
    (task("partial")(functools.partial(named)), "partial"),
    (functools.lru_cache(plain), "test_tasks.plain"),
    (functools.wraps(named)(lambda: None), "mailer.named"),
    (print, "builtins.print"),
    (operator.attrgetter("id"), "operator.attrgetter"),
    # It has every attribute, and its text has an id.
    (mock.Mock(), "unittest.mock.Mock"),
    (mock.Mock(task_name="mailer.mocked"), "mailer.mocked"),
    (functools.partial(mock.MagicMock()), "unittest.mock.MagicMock"),
    # A method of a built-in type has no module.
    ([].append, "list.append"),
    (str.upper, "str.upper"),
    (dict.fromkeys, "dict.fromkeys"),
    (functools.partial("".join, ""), "str.join"),
]


def test_names() -> None:
    """A task has the name it was given, or that of the code it is, and stays itself."""
    for fn, name in NAMES:
        assert task_name(fn) == name
        assert make_callable(fn) is fn


def test_task_returns_the_function_itself() -> None:
    """A named function is the very function, and is called as before."""

    def greet(name: str) -> str:
        return f"hello {name}"

    assert task("greeter")(greet) is greet
    assert greet("you") == "hello you"


@pytest.mark.parametrize("name", ["", None, plain, Welcome])
def test_task_needs_a_name(name: t.Any) -> None:
    """A bare ``@task`` raises where it is written, not where the function is called."""
    with pytest.raises(TypeError) as caught:
        task(name)

    assert str(caught.value) == (
        "task() takes the task's name first, as in @task('mailer.welcome'),"
        f" not {name!r}."
    )


@pytest.mark.parametrize("fn", [len, [].append, pytest.MonkeyPatch().undo])
def test_task_that_takes_no_name(fn: t.Any) -> None:
    """A callable without attributes is refused, with what to name instead."""
    with pytest.raises(TypeError, match=r"can't be named, .* functools.partial of it"):
        task("any.name")(fn)


@pytest.mark.parametrize("name", ["mailer.welcome", 7])
def test_task_object_is_run_by_its_name(name: object) -> None:
    """Of an object with a name and ``run``, the method is called; names are text."""
    welcome = Welcome()
    welcome.name = name
    run = make_callable(welcome)
    assert task_name(run) == str(name)
    assert run() == "sent"


NO_TASKS: list[object] = [
    None,
    "mailer.welcome",
    type("NoRun", (), {"name": "x"})(),
    type("NoName", (), {"run": plain})(),
    type("RunIsNoMethod", (), {"name": "x", "run": True})(),
]


@pytest.mark.parametrize("bad", NO_TASKS)
def test_what_is_no_task_is_refused(bad: object) -> None:
    """The error shows what was given, and the likely mistake."""
    with pytest.raises(TypeError) as caught:
        make_callable(bad)

    assert str(caught.value) == (
        f"A task is a callable, or an object with 'name' and 'run()', not {bad!r}."
        " Pass the function and its arguments separately: run(fn, x), not run(fn(x))."
    )


def test_exit_grace_is_found() -> None:
    """A function says it for its partials and for the tasks that call it.

    What says nothing has the time of its scope.
    """

    def endless() -> None: ...

    def quick() -> None: ...

    class Named:
        name = "named"

        def run(self) -> None: ...

    class Patient(Named):
        exit_grace = 3

    class Delivering(Named):
        run = staticmethod(endless)

    endless.exit_grace = None  # type: ignore[attr-defined]
    assert exit_grace(endless, 1.0) == math.inf
    partial = functools.partial(functools.partial(endless), 1)
    assert exit_grace(partial, 1.0) == math.inf
    assert exit_grace(make_callable(Delivering()), 1.0) == math.inf
    assert exit_grace(make_callable(Patient()), 1.0) == 3

    for silent in (quick, functools.partial(quick), make_callable(Named())):
        assert exit_grace(silent, 1.0) == 1.0

    # It has every attribute.
    assert exit_grace(mock.Mock(), 1.0) == 1.0
