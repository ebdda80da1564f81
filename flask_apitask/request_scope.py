from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
import typing as t
import weakref

from flask import got_request_exception
from flask import request_finished

from .context import find_request_context
from .context import get_app_context
from .context import get_request_context
from .context import is_pushed_again
from .context import MERGED
from .context import mix_in
from .executor.scope import TaskScope
from .own_session import OwnSessions
from .runner import TaskRunner

if t.TYPE_CHECKING:
    from flask import Flask
    from flask import Response
    from flask.ctx import RequestContext as _Base

    from .config import Config
    from .executor.pool import ThreadPool
else:
    _Base = object

# An attribute of what Flask pushes for a request. A copy of the context, in another
# thread or in the same, has none, and a nested request has its own. So neither sees the
# scope or ends it.
_SCOPE: t.Final = "_flask_apitask_scope"
# An attribute of an app context, before Flask 3.2: the scopes of requests that use it.
_LEFTOVERS: t.Final = "_flask_apitask_leftovers"
# An attribute of a response: what is waited for when it is closed.
_CLOSINGS: t.Final = "_flask_apitask_closings"


class AppState(t.NamedTuple):
    """What ``app.extensions["apitask"]`` holds. It does not refer to the app."""

    config: Config
    pool: ThreadPool


class RequestScope:
    """The scope of a request: a handle, which makes the scope for the first task.

    Several threads may share the context of a request, so one of them may open the
    scope while another ends the request. A thread that opens it looks after that
    whether the request has ended, and one that ends the request says so before it looks
    for the scope. So at least one of them sees the other, and the scope is ended.
    """

    __slots__ = ("_deferred", "_lock", "_scope", "closing", "ended", "raised")

    def __init__(self) -> None:
        # Guards the scope and the deferred ones. Most requests have none.
        self._lock = threading.Lock()
        self._scope: TaskScope | None = None
        # Scopes of views that were left, but that end with the response.
        self._deferred: tuple[TaskScope, ...] = ()
        self.ended: bool = False
        # The response holds it: it is gone if that was thrown away.
        self.closing: weakref.ref[Closing] | None = None
        # What the end of the request is to raise.
        self.raised: BaseException | None = None

    @property
    def is_used(self) -> bool:
        """Whether there is something to wait for."""
        return self._scope is not None or bool(self._deferred)

    def open(self, app_context: t.Any, request_context: t.Any) -> TaskScope | None:
        """Return the scope, which the first caller makes; ``None`` after the end."""
        if self._scope is not None or self.ended:
            return self._scope

        app: Flask = app_context.app
        config, pool = app.extensions["apitask"]
        prepare(request_context, config)
        runner = TaskRunner(app, request_context.request, config.copy_g)

        with self._lock:
            if self._scope is None:
                limits = config.max_workers, config.timeout
                self._scope = TaskScope(pool, *limits, runner)

                if not MERGED:
                    # In tests, many requests may come in one app context.
                    others = getattr(app_context, _LEFTOVERS, ())
                    left = [other for other in others if not other.ended]
                    setattr(app_context, _LEFTOVERS, [*left, self])

            scope = self._scope

        self._end_if_late()
        return scope

    def defer(self, scope: TaskScope) -> None:
        """Have a scope end with the response, or now if the request has ended."""
        scope.shutdown(wait=False)

        with self._lock:
            self._deferred += (scope,)

        self._end_if_late()

    def end(self) -> None:
        """Wait for the tasks, or leave that to the response. Idempotent."""
        self.ended = True

        # Most requests have no task, and each pays for this.
        if self._scope is None and not self._deferred:
            return

        with self._lock:
            scope, self._scope = self._scope, None
            deferred, self._deferred = self._deferred, ()

        now: tuple[TaskScope, ...] = () if scope is None else (scope,)
        closing = None if self.closing is None else self._find_closing(self.closing)

        if closing is None:
            now = deferred + now
        elif closing.answers_first:
            closing.add(*deferred, *now)
            now = ()
        else:
            closing.add(*deferred)

        _end_all(now)
        self.raised = self.raised or _take_raised(now)

    def take_raised(self) -> BaseException | None:
        """Return what the end of the request is to raise, if anything, and drop it."""
        failure, self.raised = self.raised, None
        return failure

    def _end_if_late(self) -> None:
        if self.ended:
            self.end()

    def _find_closing(self, closing: weakref.ref[Closing]) -> Closing | None:
        """Return the closing of a response if that is going to be closed."""
        # With an exception on its way the server gets no response. But a GeneratorExit
        # is raised where the server closes a generator that has the request's context.
        error = sys.exc_info()[1]
        is_sent = error is None or isinstance(error, GeneratorExit)
        return closing() if is_sent else None


class Propagating(_Base):
    """A request context whose last pop raises what a task has raised.

    Not a function for ``teardown_request``: before Flask 3.2, one that raises keeps
    others from being called, and since then Flask raises a group of exceptions.
    """

    def pop(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().pop(*args, **kwargs)
        scope: RequestScope | None = getattr(self, _SCOPE, None)

        if scope is not None:
            _raise(scope.take_raised())


class Closing:
    """What is waited for when the server closes a response.

    :param answers_first: The request's own scope ends here, too.
    """

    def __init__(self, answers_first: bool) -> None:
        self.answers_first = answers_first
        # Flask pops the request's contexts before. What is logged finds them here.
        self._context = contextvars.copy_context()
        # Guards the others: a scope may come while another thread closes.
        self._lock = threading.Lock()
        self._scopes: tuple[TaskScope, ...] = ()
        self._closed = False

    def add(self, *scopes: TaskScope) -> None:
        """Have scopes ended at the close, or now if that was before."""
        for scope in scopes:
            scope.shutdown(wait=False)

        with self._lock:
            self._scopes += scopes
            closed = self._closed

        if closed:
            self.close()

    def close(self) -> None:
        """End the scopes, each once."""
        with self._lock:
            self._closed = True
            scopes, self._scopes = self._scopes, ()

        # In a copy, as another thread may be in this one.
        self._context.copy().run(end_scopes, *scopes)


def begin_request() -> None:
    """Give a request its scope; for :meth:`flask.Flask.before_request`."""
    request_context = get_request_context()

    # A task that was started before has made it already.
    if getattr(request_context, _SCOPE, None) is None:
        # Not by vars(): it makes Flask's own reads of the context slower from then on.
        setattr(request_context, _SCOPE, RequestScope())


def end_request(error: BaseException | None = None) -> None:
    """End the request's scope; for :meth:`flask.Flask.teardown_request`."""
    find_request_scope(get_request_context()).end()


def end_leftovers(error: BaseException | None = None) -> None:
    """End what is left of a request; for :meth:`flask.Flask.teardown_appcontext`.

    Before Flask 3.2, a function for ``teardown_request`` that raises keeps those that
    were registered before it from being called, :func:`end_request` among them.
    """
    # Each task has an app context, too, and pays for this.
    for scope in getattr(get_app_context(), _LEFTOVERS, ()):
        if scope.ended:
            continue

        # An app context may end within a request, and that goes on.
        if scope is not getattr(find_request_context(), _SCOPE, None):
            scope.end()


def prepare(request_context: t.Any, config: Config) -> None:
    """Have the context of a request behave as its tasks need it. Idempotent."""
    mix_in(request_context, OwnSessions)

    if config.propagate:
        mix_in(request_context, Propagating)


def find_request_scope(request_context: t.Any) -> RequestScope:
    """Return the scope of a request, which may be looked for before it has begun."""
    scope: RequestScope | None = getattr(request_context, _SCOPE, None)

    if scope is None:
        # In one step, as several threads may share the context.
        scope = vars(request_context).setdefault(_SCOPE, RequestScope())
    elif scope.ended and is_pushed_again(request_context):
        scope.ended = False
        # It may have been popped meanwhile. Whoever pops it looks for leftovers later.
        scope.ended = not is_pushed_again(request_context)

    return scope


def answer_first(app: Flask) -> None:
    """Have the app's responses wait for tasks when they are closed. Idempotent."""
    request_finished.connect(_hook_response, app)
    got_request_exception.connect(_unhook_response, app)


def _hook_response(app: Flask, response: Response, **extra: object) -> None:
    """Have a response wait when it is closed; for :data:`flask.request_finished`."""
    scope = find_request_scope(find_request_context())
    answers_first = app.extensions["apitask"].config.wait == "close"

    # A task may come later, in the body or in a teardown function. But without one a
    # file is best left to the server, which may have its own way to send it.
    if scope.is_used or (answers_first and not response.direct_passthrough):
        closing = Closing(answers_first)
        _close_with(response, closing)
        scope.closing = weakref.ref(closing)


def _unhook_response(app: Flask, **extra: object) -> None:
    """Expect another response; for :data:`flask.got_request_exception`."""
    request_context = find_request_context()

    # Others send this signal too, wherever they are.
    if request_context is not None:
        find_request_scope(request_context).closing = None


def _close_with(response: Response, closing: Closing) -> None:
    """Have a response wait when the server closes it."""
    # Else the server is given the body alone, and closes that alone.
    response.direct_passthrough = False
    closings: list[Closing] | None = vars(response).get(_CLOSINGS)

    # Some apps answer with one object for ever: it is hooked once.
    if closings is None:
        closings = vars(response)[_CLOSINGS] = []
        response.call_on_close(lambda: _close(closings))

    closings.append(closing)


def _close(closings: list[Closing]) -> None:
    for closing in tuple(closings):
        closing.close()

        # Another thread may close the same object, as the response to its own request.
        with contextlib.suppress(ValueError):
            closings.remove(closing)


def end_scopes(*scopes: TaskScope) -> None:
    """End scopes in order, and raise what a task has raised if that is configured."""
    _end_all(scopes)
    _raise(_take_raised(scopes))


def _end_all(scopes: tuple[TaskScope, ...]) -> None:
    """End scopes in order, all of them though one wait is interrupted."""
    for count, scope in enumerate(scopes, 1):
        try:
            scope.end()
        except BaseException:
            _end_all(scopes[count:])
            raise


def _take_raised(scopes: tuple[TaskScope, ...]) -> BaseException | None:
    return next(filter(None, [scope.take_raised() for scope in scopes]), None)


def _raise(failure: BaseException | None) -> None:
    try:
        if failure is not None:
            raise failure
    finally:
        # Its traceback refers to this frame: no cycle through it.
        del failure
