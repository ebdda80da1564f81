from __future__ import annotations

import functools
import operator
import typing as t

import pytest

from flask_apitask import task
from flask_apitask.executor.task import make_callable
from flask_apitask.executor.task import task_name


def plain() -> None: ...


@task("mailer.named")
def named(number: int = 0) -> int:
    return number


class Welcome:
    """A task object, a home of methods, and a class that can be called."""

    name = "mailer.welcome"

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


def make_local() -> t.Any:
    def local() -> None: ...

    return local


def test_task_returns_the_function_itself() -> None:
    """A named function is the very function, and is called as before."""

    def greet(name: str) -> str:
        return f"hello {name}"

    assert task("greeter")(greet) is greet
    assert greet("you") == "hello you"


@pytest.mark.parametrize("name", ["", None, plain, Welcome])
def test_task_needs_a_name(name: t.Any) -> None:
    """A bare ``@task`` is refused where it stands, not where the function is called."""
    with pytest.raises(TypeError) as caught:
        task(name)

    assert str(caught.value) == (
        "task() takes the task's name first, as in @task('mailer.welcome'),"
        f" not {name!r}."
    )


@pytest.mark.parametrize("fn", [len, [].append, pytest.MonkeyPatch().undo])
def test_task_that_takes_no_name(fn: t.Any) -> None:
    """A callable without attributes is refused, with what to name instead."""
    with pytest.raises(TypeError, match=r"takes no name: .* functools.partial of it"):
        task("any.name")(fn)


def test_names() -> None:
    """A task has the name it was given, or that of the code it is."""
    names: list[tuple[t.Any, str]] = [
        (plain, "test_tasks.plain"),
        (named, "mailer.named"),
        (make_local(), "test_tasks.make_local.<locals>.local"),
        (lambda: None, "test_tasks.test_names.<locals>.<lambda>"),
        (Welcome().method, "test_tasks.Welcome.method"),
        (Welcome().named_method, "mailer.method"),
        (Welcome.named_method, "mailer.method"),
        (Welcome.static, "test_tasks.Welcome.static"),
        (Welcome.of_class, "test_tasks.Welcome.of_class"),
        (Welcome, "test_tasks.Welcome"),
        (Caller(), "test_tasks.Caller"),
        (CallerWithName(), "mailer.caller"),
        (functools.partial(plain), "test_tasks.plain"),
        (functools.partial(named, 1), "mailer.named"),
        (functools.partial(functools.partial(named), 1), "mailer.named"),
        (functools.partial(Caller(), 1), "test_tasks.Caller"),
        (task("partial")(functools.partial(named)), "partial"),
        (functools.lru_cache(plain), "test_tasks.plain"),
        (functools.wraps(named)(lambda: None), "mailer.named"),
        (print, "builtins.print"),
        (operator.attrgetter("id"), "operator.attrgetter"),
    ]

    for callable_, name in names:
        assert task_name(callable_) == name


def test_names_of_methods_written_in_c() -> None:
    """A method of a built-in type has no module, and is a task all the same."""
    numbers: list[int] = []
    names: list[tuple[t.Any, str]] = [
        (numbers.append, "list.append"),
        ("a".upper, "str.upper"),
        (str.upper, "str.upper"),
        (dict.fromkeys, "dict.fromkeys"),
        (functools.partial(numbers.append, 1), "list.append"),
    ]

    for method, name in names:
        assert task_name(method) == name


def test_callable_is_what_it_is() -> None:
    """Whatever can be called is the task, and called as it is."""
    for good in [plain, Caller(), Welcome, functools.partial(plain), print]:
        assert make_callable(good) is good


def test_task_object_is_run_by_its_name() -> None:
    """Of an object with a name and ``run``, the method is called."""
    welcome = make_callable(Welcome())
    assert task_name(welcome) == "mailer.welcome"
    assert welcome() == "sent"


def test_name_of_a_task_object_is_text() -> None:
    """Whatever the name of a task object is, logs and signals get text."""

    class Numbered:
        name = 7

        def run(self) -> None: ...

    assert task_name(make_callable(Numbered())) == "7"


class NoRun:
    """It has a name, and nothing that runs."""

    name = "x"


class NoName:
    """It runs, and has no name."""

    def run(self) -> None: ...


class RunIsNoMethod:
    """Its ``run`` can't be called."""

    name = "x"
    run = True


@pytest.mark.parametrize(
    "bad", [None, 3, "mailer.welcome", NoRun(), NoName(), RunIsNoMethod()]
)
def test_what_is_no_task_is_refused(bad: object) -> None:
    """The error shows what was given, and the likely mistake."""
    with pytest.raises(TypeError) as caught:
        make_callable(bad)

    assert str(caught.value) == (
        f"A task is a callable, or an object with 'name' and 'run()', not {bad!r}."
        " Pass the function and its arguments apart: run(fn, x), not run(fn(x))."
    )
