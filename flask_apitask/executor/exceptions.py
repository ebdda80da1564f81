from __future__ import annotations


class ApiTaskError(Exception):
    """Base class of the exceptions that Flask-ApiTask defines.

    A wrong argument or configuration value is a :exc:`ValueError` or
    :exc:`TypeError`, as elsewhere in Python, and not one of these.
    """


class ScopeClosed(ApiTaskError, RuntimeError):
    """Raised when a task is submitted to a :class:`.TaskScope` that has ended.

    :func:`.run` does not raise it: once the request's scope is closed, it calls the
    task on the spot.
    """
