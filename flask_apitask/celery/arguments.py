from __future__ import annotations

import inspect
import math
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Kombu's JSON takes a dict with these keys for its own marker of another type.
_MARKER: t.Final = {"__type__", "__value__"}


class _Unfit(Exception):
    """Raised when JSON can't carry a value exactly."""

    # The value's place in the argument, as a subscript.
    path = ""


def copy_arguments(
    name: str,
    fn: cabc.Callable[..., object],
    args: tuple[t.Any, ...],
    kwargs: dict[str, t.Any],
) -> tuple[tuple[t.Any, ...], dict[str, t.Any]]:
    """Copy the arguments of a task, and check that JSON can carry them exactly.

    A worker gets them as they are now, and so does the task if it runs here after all.

    :param name: The task's name.
    :raises TypeError: JSON can't. The message names the task, argument and its type,
        but not its value, which may be a secret.
    """
    given: dict[int | str, t.Any] = dict(enumerate(args))
    given.update(kwargs.items())
    copied: dict[int | str, t.Any] = {}

    for place, value in given.items():
        try:
            copied[place] = _copy(value)
        except _Unfit as error:
            cause, path = str(error), error.path
        except RecursionError:
            cause, path = "is nested too deeply, or contains itself", ""
        else:
            continue

        raise TypeError(
            f"Task {name!r} goes to Celery (APITASK_ROUTES), but JSON can't carry its"
            f" argument {_name_argument(fn, place)}{path} exactly, because it {cause}."
            " Pass an object's id, or plain JSON: strings, finite numbers, True, False,"
            " None, and lists and dicts of those, with strings as keys."
        )

    positional = tuple(copied[place] for place in range(len(args)))
    return positional, {place: copied[place] for place in kwargs}


def _copy(value: t.Any) -> t.Any:
    kind = type(value)

    if kind is list:
        return [_copy_item(index, item) for index, item in enumerate(value)]

    if kind is dict:
        if any(type(key) is not str for key in value):
            raise _Unfit("has a key that is not a string")

        if value.keys() == _MARKER:
            raise _Unfit("has the keys with which Kombu marks other types")

        return {key: _copy_item(key, item) for key, item in value.items()}

    if kind is float and not math.isfinite(value):
        raise _Unfit("is not finite")

    if value is not None and kind not in (str, int, bool, float):
        raise _Unfit(f"is of type {kind.__qualname__!r}")

    return value


def _copy_item(key: int | str, item: t.Any) -> t.Any:
    try:
        return _copy(item)
    except _Unfit as error:
        error.path = f"[{key!r}]{error.path}"
        raise


def _name_argument(fn: cabc.Callable[..., object], place: int | str) -> str:
    if isinstance(place, str):
        return place

    parameters = list(inspect.signature(fn).parameters.values())
    named = parameters[place : place + 1]
    is_named = named and named[0].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD
    return named[0].name if is_named else f"number {place + 1}"
