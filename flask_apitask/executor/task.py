from __future__ import annotations

import functools
import math
import types
import typing as t
import weakref

if t.TYPE_CHECKING:
    import collections.abc as cabc

T_co = t.TypeVar("T_co", covariant=True)
F = t.TypeVar("F", bound="cabc.Callable[..., t.Any]")

# The functions named by task(), by name, for as long as they live.
_named: dict[str, list[weakref.ref[types.FunctionType]]] = {}
# Each is called with a name and its functions, the newest last, and may raise to refuse
# the newest.
naming_checks: list[cabc.Callable[[str, list[types.FunctionType]], None]] = []


class Task(t.Protocol[T_co]):
    """A unit of work with a name, which :func:`.run` takes instead of a callable.

    Write one for a task that carries its own state; otherwise a function will do.
    """

    @property
    def name(self) -> str:
        """Its name in logs and signals. Keep it low-cardinality: no ids in it."""
        ...

    def run(self) -> T_co:
        """Do the work."""
        ...


def task(name: str) -> cabc.Callable[[F], F]:
    """Name a function for logs and signals, and return it otherwise unchanged.

    By default, a task's name is its module and qualified name, which is enough for
    most tasks. Set a name if that keeps changing, or if several functions do the same
    kind of work. ::

        @task("mailer.welcome")
        def send_welcome(user_id): ...

    :param name: Low-cardinality: ``"mailer.welcome"``, with no ids in it.
    :raises TypeError: The name is missing, as in a bare ``@task``, or the object can't
        be named.
    :raises ValueError: Another function has this name, and :data:`APITASK_ROUTES`
        sends it to Celery, which knows a task by its name alone.
    """
    if not (isinstance(name, str) and name.strip()):  # type: ignore[redundant-expr]
        raise TypeError(
            f"task() takes the task's name first, as in @task('mailer.welcome'),"
            f" not {name!r}."
        )

    def decorator(fn: F) -> F:
        if not callable(fn):
            raise TypeError(
                f"task({name!r}) names a function, not {fn!r}. Put it right above the"
                " 'def'."
            )

        try:
            fn.task_name = name  # type: ignore[attr-defined]
        except AttributeError:
            raise TypeError(
                f"{fn!r} can't be named, like all bound methods and built-in functions."
                " Name the function where it is defined, or a functools.partial of it."
            ) from None

        if isinstance(fn, types.FunctionType):
            function: types.FunctionType = fn
            functions = [*find_named(name), function]

            for check in naming_checks:
                check(name, functions)

            _named[name] = [weakref.ref(known) for known in functions]

        return fn

    return decorator


def find_named(name: str) -> list[types.FunctionType]:
    """Return the functions with this name, the newest last."""
    functions = [reference() for reference in _named.get(name, ())]
    return [function for function in functions if function is not None]


def all_names() -> list[str]:
    """Return the names given so far."""
    return list(_named)


def make_callable(task: t.Any) -> t.Any:
    """Return a callable as it is, or the ``run`` of a :class:`Task`, with its name.

    :raises TypeError: The task is neither, or is the class of a :class:`Task`. The
        message shows it, and names the likely mistake.
    """
    if isinstance(task, type) and _is_task(task):
        raise TypeError(
            f"A call of {task!r} only makes a task, and does not run it. Pass an"
            f" instance: run({task.__name__}(...))."
        )

    if callable(task):
        return task

    if not _is_task(task):
        raise TypeError(
            f"A task is a callable, or an object with 'name' and 'run()', not {task!r}."
            " Pass the function and its arguments separately: run(fn, x), not"
            " run(fn(x))."
        )

    run = functools.partial(task.run)
    run.task_name = str(task.name)  # type: ignore[attr-defined]

    if hasattr(task, "exit_grace"):
        run.exit_grace = task.exit_grace  # type: ignore[attr-defined]

    return run


def _is_task(value: t.Any) -> bool:
    return hasattr(value, "name") and callable(getattr(value, "run", None))


def task_name(task: t.Any) -> str:
    """Return the name of a callable: its own, or its module and qualified name."""
    task = _unwrap(task, "task_name")

    if isinstance(name := look_up(task, "task_name"), str):
        return name

    named = task if isinstance(look_up(task, "__qualname__"), str) else type(task)
    # A method of a type written in C may have no module.
    module = getattr(named, "__module__", None)
    return f"{module}.{named.__qualname__}" if module else named.__qualname__


def exit_grace(task: t.Any, timeout: float) -> float:
    """Return how many seconds the process's exit waits for a task past its deadline.

    :param timeout: The default for a task without an ``exit_grace`` attribute.
    """
    grace = look_up(_unwrap(task, "exit_grace"), "exit_grace", timeout)

    if grace is None:
        return math.inf

    return grace if isinstance(grace, (int, float)) else timeout


def look_up(task: t.Any, attribute: str, default: object = None) -> t.Any:
    """Return an attribute of a task, or the default if it is missing or can't be read.

    The value may be of any type: a mock or a proxy has every attribute.
    """
    try:
        return getattr(task, attribute, default)
    except Exception:
        return default


def _unwrap(task: t.Any, attribute: str) -> t.Any:
    """Return the outermost partial with an attribute, or the callable inside."""
    while isinstance(task, functools.partial) and not hasattr(task, attribute):
        task = task.func

    return task
