from __future__ import annotations

import sys
import threading
import typing as t

from .closing import Closing
from .closing import end_all
from .closing import raise_error
from .context import find_app_context
from .context import find_request_context
from .context import is_pushed_again
from .context import MERGED
from .context import mix_in
from .outcome import find_failure
from .own_session import OwnSessions
from .task_runner import TaskRunner

if t.TYPE_CHECKING:
    import weakref

    from flask import Flask
    from flask.ctx import RequestContext as _Base

    from .config import Config
    from .executor.pool import ThreadPool
    from .executor.scope import TaskScope
else:
    _Base = object

# An attribute of the context that Flask pushes for a request. A copy of the context, in
# this or another thread, does not have it, and a nested request has its own. So neither
# sees the scope or ends it.
_SCOPE: t.Final = "_flask_apitask_scope"
# An attribute of an app context before Flask 3.2: the scopes of the requests in it.
_LEFTOVERS: t.Final = "_flask_apitask_leftovers"


class AppState(t.NamedTuple):
    """What ``app.extensions["apitask"]`` holds. It does not refer to the app."""

    config: Config
    pool: ThreadPool


class RequestScope:
    """A handle for the scope of a request; the scope is made for the first task.

    Several threads may share the context of a request, so one of them may open the
    scope while another ends the request. After opening the scope, the first checks
    whether the request has ended. The second sets ``ended`` before it looks for the
    scope. So at least one of them notices the other and ends the scope.
    """

    __slots__ = (
        "_deferred",
        "_lock",
        "_scope",
        "closing",
        "ended",
        "failure",
        "raised",
    )

    def __init__(self) -> None:
        # Guards the scope and the deferred ones.
        self._lock = threading.Lock()
        self._scope: TaskScope | None = None
        # Scopes of views that have returned, which end when the response closes.
        self._deferred: tuple[TaskScope, ...] = ()
        self.ended: bool = False
        # Why the request has not succeeded, as far as is known.
        self.failure: str | None = None
        # The response holds the closing, which is gone if the response was discarded.
        self.closing: weakref.ref[Closing] | None = None
        # The exception that the end of the request is to raise.
        self.raised: BaseException | None = None

    @property
    def defers(self) -> bool:
        """Whether there are scopes that end when the response closes."""
        return bool(self._deferred)

    @property
    def is_used(self) -> bool:
        """Whether there is something to wait for."""
        return self._scope is not None or bool(self._deferred)

    def open(self, app_context: t.Any, request_context: t.Any) -> TaskScope | None:
        """Return the scope, made by the first caller; ``None`` after the end."""
        if self._scope is not None or self.ended:
            return self._scope

        app: Flask = app_context.app
        config, pool = app.extensions["apitask"]
        prepare(request_context, config)
        runner = TaskRunner(app, request_context.request, config.copy_g)
        limits = config.max_workers, config.timeout

        with self._lock:
            if self._scope is None:
                self._scope = runner.make_scope(pool, *limits)

                if not MERGED:
                    # In tests, one app context may see many requests.
                    others = getattr(app_context, _LEFTOVERS, ())
                    left = others and [other for other in others if not other.ended]
                    setattr(app_context, _LEFTOVERS, [*left, self])

            scope = self._scope

        self._end_if_late()
        return scope

    def open_holding(
        self, app_context: t.Any, request_context: t.Any
    ) -> TaskScope | None:
        """Return the scope for tasks that wait for the success of the request."""
        app: Flask = app_context.app
        scope = self.open(app_context, request_context)

        if scope is None and self.failure is not None:
            # A task deferred after the request has failed is dropped too.
            runner = TaskRunner(app, request_context.request)
            scope = runner.make_scope(app.extensions["apitask"].pool, 1, None)
            scope.settle(self.failure)

        return scope

    def note(self, error: BaseException | None) -> None:
        """Note an exception at the end of the request."""
        if isinstance(error, GeneratorExit) and self.closing is not None:
            closing = self.closing()

            # The server closes a generator with the request's context, whether it was
            # read to the end or not. The WatchedBody knows which.
            if closing is not None and closing.is_stream:
                return

        self.failure = self.failure or find_failure(error)

    def defer(self, scope: TaskScope) -> None:
        """End a scope when the response closes, or now if the request has ended."""
        scope.shutdown(wait=False)

        with self._lock:
            self._deferred += (scope,)

        self._end_if_late()

    def end(self) -> None:
        """Wait for the tasks, or leave that to the response's close. Idempotent."""
        self.ended = True

        # A fast path: most requests have no task.
        if self._scope is None and not self._deferred:
            return

        with self._lock:
            scope, self._scope = self._scope, None
            deferred, self._deferred = self._deferred, ()

        own: tuple[TaskScope, ...] = () if scope is None else (scope,)
        closing = None if self.closing is None else self._find_closing(self.closing)

        if scope is not None and (self.failure or not (closing and closing.settles)):
            scope.settle(self.failure)

        if closing is None:
            self._keep(end_all(deferred + own))
        elif closing.answers_first:
            self._keep(closing.add(*deferred, *own))
        else:
            self._keep(closing.add(*deferred))
            is_sent = False

            try:
                self._keep(end_all(own))
                is_sent = self.raised is None
            finally:
                # A task may have deferred another one, or may do so until the close.
                self._keep(closing.add(*own, waited_for=True))

                if not is_sent:
                    self._keep(closing.end("no response was sent"))

    def _keep(self, raised: BaseException | None) -> None:
        """Keep the first exception. Raising it here would stop the teardown."""
        self.raised = self.raised or raised

    def take_raised(self) -> BaseException | None:
        """Return the exception that the end of the request is to raise; forget it."""
        error, self.raised = self.raised, None
        return error

    def _end_if_late(self) -> None:
        if self.ended:
            self.end()

    def _find_closing(self, closing: weakref.ref[Closing]) -> Closing | None:
        """Return the closing of a response if the response is going to be closed."""
        # If an exception is propagating, the server gets no response. But GeneratorExit
        # only means that the server closes a generator with the request's context.
        error = sys.exc_info()[1]
        is_sent = error is None or isinstance(error, GeneratorExit)
        return closing() if is_sent else None


class Propagating(_Base):
    """A request context whose last pop raises what a task raised.

    A ``teardown_request`` function would not do: before Flask 3.2, one that raises
    keeps others from being called, and since then Flask raises an exception group.
    """

    def pop(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().pop(*args, **kwargs)
        # In Flask 3.2, a task has a copy of the context, without a scope.
        scope: RequestScope | None = getattr(self, _SCOPE, None)
        raise_error(None if scope is None else scope.take_raised())


class ClosesUnsent(_Base):
    """A request context that ends what waits for the close of an unsent response.

    If a teardown function raises, the server gets no response that it could close.
    """

    def pop(self, *args: t.Any, **kwargs: t.Any) -> None:
        try:
            super().pop(*args, **kwargs)
        except BaseException as error:
            scope: RequestScope | None = getattr(self, _SCOPE, None)
            closing = scope and scope.closing and scope.closing()

            if closing:
                closing.end(find_failure(error))

            raise


def begin_request() -> None:
    """Give a request its scope; for :meth:`flask.Flask.before_request`."""
    request_context = find_request_context()

    # A task started earlier, in another before_request function, has made it already.
    if getattr(request_context, _SCOPE, None) is None:
        # Not with vars(), which would make Flask's own reads of the context slower.
        setattr(request_context, _SCOPE, RequestScope())


def end_request(error: BaseException | None = None) -> None:
    """End the request's scope; for :meth:`flask.Flask.teardown_request`."""
    scope = find_request_scope(find_request_context())

    if error is not None:
        scope.note(error)

    scope.end()


def end_leftovers(error: BaseException | None = None) -> None:
    """End the scopes still open; for :meth:`flask.Flask.teardown_appcontext`.

    Before Flask 3.2, a ``teardown_request`` function that raises keeps those registered
    before it from being called, :func:`end_request` among them.
    """
    # Keep this cheap: the app context of each task calls it too.
    for scope in getattr(find_app_context(), _LEFTOVERS, ()):
        # An app context may end within a request that goes on.
        if not (scope.ended or scope is getattr(find_request_context(), _SCOPE, None)):
            scope.note(sys.exc_info()[1] or error)
            scope.end()


def prepare(request_context: t.Any, config: Config) -> None:
    """Make the context of a request behave as its tasks need it to. Idempotent."""
    mix_in(request_context, OwnSessions)

    if config.propagate:
        mix_in(request_context, Propagating)


def find_request_scope(request_context: t.Any) -> RequestScope:
    """Return the scope of a request, even before :func:`begin_request` has made it."""
    scope: RequestScope | None = getattr(request_context, _SCOPE, None)

    if scope is None:
        # One atomic step, because several threads may share the context.
        scope = vars(request_context).setdefault(_SCOPE, RequestScope())
    elif scope.ended and is_pushed_again(request_context):
        scope.ended = False
        # The context may have been popped meanwhile. If it is popped from here on, the
        # thread that pops it ends the scope.
        scope.ended = not is_pushed_again(request_context)

    return scope
