from __future__ import annotations


class ApiTaskError(Exception):
    """Base class of every exception that Flask-ApiTask raises on its own account.

    A wrong argument or a wrong configuration value is a :exc:`ValueError` or a
    :exc:`TypeError`, as everywhere in Python, and not one of these.
    """


class ScopeClosed(ApiTaskError, RuntimeError):
    """Raised when a task is submitted to a :class:`.TaskScope` that was ended.

    :func:`.run` does not raise it: where the request's scope is closed already, it
    calls the task on the spot.
    """
