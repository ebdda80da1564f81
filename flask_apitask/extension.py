from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import typing as t

from flask import current_app
from werkzeug.local import LocalProxy

from . import endings
from . import stack
from .config import Config
from .config import read_count
from .config import read_timeout
from .config import read_word
from .threads import Threads

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from .context import Block
    from .scope import TaskScope

P = t.ParamSpec("P")
T = t.TypeVar("T")


class ApiTask:
    """Give every request of a Flask app a scope for its tasks.

    Only for set-up: :func:`run`, :func:`wait` and the others work wherever the code
    stands, in blueprints and libraries too.

    :param app: The app to set up; leave it out to call :meth:`init_app` later.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the configuration of an app, and have its requests end their scopes.

        For that, :meth:`flask.Flask.do_teardown_request` of the app is replaced by a
        function that calls it first. Who replaces it again has to call that in turn.

        These keys of :attr:`flask.Flask.config` are read, once:

        -   ``APITASK_ENABLED`` (``True``): a scope for every request.
        -   ``APITASK_MAX_WORKERS`` (``8``): most tasks of one request running at once.
        -   ``APITASK_POOL_SIZE`` (``32``): most threads of the app in one
            process.
        -   ``APITASK_TIMEOUT`` (``None``): seconds the end of the request waits.
        -   ``APITASK_WAIT`` (``"teardown"``): when the request waits; ``"close"`` is
            after the response was sent.
        -   ``APITASK_MAIL_BACKGROUND`` (``False``): reroute Flask-Mail.
        -   ``APITASK_MAIL_TIMEOUT`` (``10.0``): seconds of every SMTP socket operation.
        -   ``APITASK_MAIL_CONNECTIONS`` (``4``): most SMTP connections of the
            app in one process.
        -   ``APITASK_MAIL_KEEPALIVE`` (``30.0``): seconds an idle connection is kept;
            ``0`` opens one per batch.
        -   ``APITASK_MAIL_TLS_VERIFY`` (``True``): verify certificate and host name, by
            the system's trust store or by a file of CA certificates, given as its path.

        :param app: The app, with its configuration loaded.
        :raises RuntimeError: The app has an :class:`ApiTask` already, or
            ``APITASK_MAIL_BACKGROUND`` is on and Flask-Mail is not installed.
        :raises ValueError: A key has a value that is not allowed.
        """
        if isinstance(app, LocalProxy):
            app = app._get_current_object()

        if "apitask" in app.extensions:
            raise RuntimeError(
                "An 'ApiTask' instance has already been registered on this Flask app."
                " One is enough: run() and the others find it by the current app."
            )

        config = Config.from_mapping(app.config)

        if config.mail_background:
            _reroute_mail(app, config)

        # In this order, as the app may serve already: a scope needs its end, and a hook
        # on a response needs the state.
        endings.end_with_teardown(app)
        app.extensions["apitask"] = stack.AppState(config, Threads(config.pool_size))

        if config.enabled and config.wait == "close":
            endings.connect(app)


@contextlib.contextmanager
def open_scope(
    *, max_workers: int | None = None, timeout: float | None = None
) -> cabc.Iterator[TaskScope]:
    """Open a scope for a block: in a command, a script, or a part of a view.

    The tasks started in the block are done when it is left, whether it raises or not.
    Scopes nest: a task belongs to the innermost, and each waits for its own.

    :param max_workers: Most tasks that run at once, ``None`` for
        :data:`APITASK_MAX_WORKERS`.
    :param timeout: Seconds that the end of the block waits, ``None`` for
        :data:`APITASK_TIMEOUT`, :data:`math.inf` for as long as it takes.
    :raises ValueError: A limit is not a positive number.
    :raises RuntimeError: There is no app context, or no :class:`ApiTask` on its app.
    """
    block, scope = _open_block(max_workers, timeout)

    try:
        yield scope
    finally:
        stack.leave_block(block)
        scope.end()


@t.overload
def scoped(view: cabc.Callable[P, T], /) -> cabc.Callable[P, T]: ...


@t.overload
def scoped(
    *,
    max_workers: int | None = None,
    timeout: float | None = None,
    wait: t.Literal["return", "close"] = "return",
) -> cabc.Callable[[cabc.Callable[P, T]], cabc.Callable[P, T]]: ...


def scoped(
    view: t.Any = None,
    /,
    *,
    max_workers: int | None = None,
    timeout: float | None = None,
    wait: t.Literal["return", "close"] = "return",
) -> t.Any:
    """Give one view, or any function, a scope of its own.

    Its tasks are done when it returns, not only at the end of the request. Use it with
    ``APITASK_ENABLED = False`` to have scopes where you say, or for limits of its own::

        @app.post("/signup")
        @scoped(max_workers=2, timeout=5.0)
        def signup(): ...

    :param view: A function, sync or ``async def``.
    :param max_workers: As for :func:`open_scope`.
    :param timeout: As for :func:`open_scope`.
    :param wait: When it is waited for the tasks: ``"return"``, or ``"close"`` for after
        the response to the request was sent, where there is a request.
    :raises ValueError: A limit is not a positive number, or ``wait`` is another word.
    """
    _read_limits(max_workers, timeout, Config())
    at_close = read_word("wait", wait, "return", "close") == "close"

    if view is None:
        return functools.partial(
            scoped, max_workers=max_workers, timeout=timeout, wait=wait
        )

    if inspect.iscoroutinefunction(view):

        @functools.wraps(view)
        async def async_view(*args: t.Any, **kwargs: t.Any) -> t.Any:
            block, scope = _open_block(max_workers, timeout)

            try:
                return await view(*args, **kwargs)
            finally:
                if not _leave(block, scope, at_close):
                    # On another thread, as the tasks may need the view's event loop.
                    await asyncio.to_thread(scope.end)

        return async_view

    @functools.wraps(view)
    def sync_view(*args: t.Any, **kwargs: t.Any) -> t.Any:
        block, scope = _open_block(max_workers, timeout)

        try:
            return view(*args, **kwargs)
        finally:
            if not _leave(block, scope, at_close):
                scope.end()

    return sync_view


def _leave(block: Block, scope: TaskScope, at_close: bool) -> bool:
    """Leave a decorated function, and return whether its scope ends later."""
    stack.leave_block(block)

    # A response is not for what a task does: that one ends before.
    if not at_close or stack.is_in_task():
        return False

    return endings.leave_to_response(block.app, scope)


def _open_block(
    max_workers: int | None, timeout: float | None
) -> tuple[Block, TaskScope]:
    """Open the scope of a ``with`` block, or of a decorated function."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]

    if "apitask" not in app.extensions:
        raise RuntimeError(
            f"There is no 'ApiTask' on the current Flask app {app.name!r}. Create one"
            " with ApiTask(app), or call its init_app(app)."
        )

    config: Config = app.extensions["apitask"].config
    max_workers, timeout = _read_limits(max_workers, timeout, config)
    return stack.open_block(app, max_workers, timeout)


def _read_limits(
    max_workers: int | None, timeout: float | None, default: Config
) -> tuple[int, float | None]:
    return (
        default.max_workers
        if max_workers is None
        else read_count("max_workers", max_workers),
        default.timeout if timeout is None else read_timeout("timeout", timeout),
    )


def _reroute_mail(app: Flask, config: Config) -> None:
    try:
        from .mail import reroute
    except ImportError as error:
        if error.name != "flask_mail":
            raise

        raise RuntimeError(
            "APITASK_MAIL_BACKGROUND is on, but Flask-Mail is not installed. Install"
            ' it with: pip install "flask-apitask[mail]"'
        ) from error

    reroute(app, config)
