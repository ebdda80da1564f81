from __future__ import annotations

import logging
import threading
import time
import typing as t

from . import routes
from .api import current_scope
from .api import find_task_scope
from .api import warn_without_apitask
from .calling import call_observed
from .context import find_app_context
from .context import find_request_context
from .executor.future import TaskFuture
from .executor.runner import Runner
from .executor.task import make_callable
from .executor.task import task_name
from .log import log
from .task_runner import TaskRunner

if t.TYPE_CHECKING:
    import collections.abc as cabc

    import sqlalchemy.orm as orm

    from .executor.runner import How
    from .executor.runner import Work
    from .executor.scope import TaskScope
    from .executor.task import Task

P = t.ParamSpec("P")
T = t.TypeVar("T")
Sessions: t.TypeAlias = "orm.Session | orm.scoped_session[t.Any]"

_logger = logging.getLogger("flask_apitask")

# An attribute of a session, so that its tasks live as long as it does. Its ``info`` is
# the app's, which may clear it, or give it to another session.
_COMMITS: t.Final = "_flask_apitask_commits"


@t.overload
def run_on_commit(
    session: Sessions,
    task: cabc.Callable[P, cabc.Coroutine[t.Any, t.Any, T]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> TaskFuture[T]: ...


@t.overload
def run_on_commit(
    session: Sessions,
    task: cabc.Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> TaskFuture[T]: ...


@t.overload
def run_on_commit(session: Sessions, task: Task[T], /) -> TaskFuture[T]: ...


def run_on_commit(
    session: t.Any, task: t.Any, /, *args: t.Any, **kwargs: t.Any
) -> TaskFuture[t.Any]:
    """Start a task once a SQLAlchemy session has committed, or drop it otherwise.

    The task starts when the session's current transaction (or its next one, if there is
    none yet) has been committed and its connection returned. The task is dropped if
    that transaction, or the savepoint that this is called in, is rolled back; if the
    session is closed before the commit; or if the current request or ``with`` block
    ends first.

    The request waits for the task as it does with :func:`run`. If the task is dropped,
    its future is cancelled and one INFO record says why.

    Where there is no scope, and in a task, ``commit()`` itself calls the task, after
    committing. If the task raises, the exception is logged and kept in its future.
    ``commit()`` does not raise it, as the commit has succeeded.

    :param session: A :class:`sqlalchemy.orm.Session`, or a
        :class:`~sqlalchemy.orm.scoped_session` such as Flask-SQLAlchemy's
        ``db.session``.
    :param task: As for :func:`run`, with its arguments.
    :raises TypeError: ``session`` is not such a session, or as for :func:`run`.
    :return: A future, as for :func:`run`. Waiting for it while the task is deferred is
        a :exc:`RuntimeError`.
    """
    session = _find_session(session)

    if routes.router is not None:
        task, args, kwargs = routes.router(task, args, kwargs)

    own, task_scope = current_scope(), find_task_scope()
    scope, future = own or task_scope, None

    if scope is not None:
        future = scope.hold(task, args, kwargs, for_success=False)

    if future is None:
        scope = None
        work = make_callable(task), args, kwargs, time.monotonic()
        future = TaskFuture(_make_runner(task_scope), None, work)
        future.held = True

    held = _Held(future, scope, own is None)
    _watch(session).add(held, session.get_nested_transaction())
    return future


class _Held(t.NamedTuple):
    """A task that is deferred until a commit.

    :param scope: The scope that holds it, if there is one.
    :param inline: Whether ``commit()`` calls the task even though a scope holds it.
    """

    future: TaskFuture[t.Any]
    scope: TaskScope | None
    inline: bool

    def start(self) -> None:
        if self.scope is not None and not self.inline:
            self.scope.start(self.future)
        elif self.scope is None or self.scope.let_go(self.future):
            # Otherwise the scope has ended and dropped it.
            self.future.held = False
            # Its done callbacks are called here too. Nothing would wait for them
            # elsewhere.
            self.future.thread = threading.get_ident()

            try:
                self.future.run("inline")
            finally:
                # The traceback of a failed task leads back here, by f_back, so this
                # frame must not lead on to the future: avoid a reference cycle.
                del self

    def drop(self, reason: str) -> None:
        if self.scope is not None:
            self.scope.drop(reason, self.future)
        else:
            self.future.drop(reason)


class _Commits:
    """The tasks that wait for the commits of one session, which holds this object.

    For one thread at a time, like the session itself.
    """

    def __init__(self) -> None:
        # By the savepoint that has to be released first; None if there is none.
        self._held: dict[orm.SessionTransaction | None, list[_Held]] = {}
        # The transaction that has been committed and is about to end.
        self.committed: orm.SessionTransaction | None = None

    def add(self, held: _Held, savepoint: orm.SessionTransaction | None) -> None:
        others = self._held.setdefault(savepoint, [])

        # Forget what ended with its request: the session may outlive many requests.
        if others and not others[-1].future.held:
            others[:] = [other for other in others if other.future.held]

        others.append(held)

    def note_commit(self, session: orm.Session) -> None:
        """Note which transaction is committed, or which savepoint is released."""
        transaction = session.get_nested_transaction() or session.get_transaction()
        self.committed = transaction

    def end(self, session: orm.Session, transaction: orm.SessionTransaction) -> None:
        """Start or drop the tasks that wait for a transaction or a savepoint.

        By now the session has returned its connection to the pool, so that a task can
        have it.
        """
        # A flush nests a transaction within another one, which doesn't count.
        if not transaction.nested and transaction.parent is not None:
            return

        committed, self.committed = self.committed is transaction, None
        savepoint = transaction if transaction.nested else None
        ended = self._held.pop(savepoint, [])

        if committed and savepoint:
            outer = session.get_nested_transaction()
            self._held.setdefault(outer, []).extend(ended)
            return

        while ended:
            held = ended.pop(0)

            if committed:
                held.start()
            else:
                what = "the savepoint" if savepoint else "the session"
                held.drop(f"{what} was rolled back")

            # No cycle through this frame: see _Held.start().
            del held


def _find_session(session: t.Any) -> orm.Session:
    """Return the session itself, where an app passes a ``scoped_session``."""
    import sqlalchemy.orm as orm

    found = session() if isinstance(session, orm.scoped_session) else session

    if isinstance(found, orm.Session):
        return found

    hint = (
        "Pass its 'sync_session': the task still starts at the commit."
        if hasattr(found, "sync_session")
        else "With Flask-SQLAlchemy, that is 'db.session'."
    )
    raise TypeError(
        f"run_on_commit() takes a SQLAlchemy session first, not {session!r}. {hint}"
    )


def _watch(session: orm.Session) -> _Commits:
    """Listen for the ends of a session's transactions, once and for its lifetime.

    A listener can't remove itself while it is being called. There is no need to: it
    belongs to this one session and goes away with it.
    """
    import sqlalchemy as sa

    commits: _Commits | None = getattr(session, _COMMITS, None)

    if commits is None:
        commits = _Commits()
        setattr(session, _COMMITS, commits)
        sa.event.listen(session, "after_commit", commits.note_commit)
        sa.event.listen(session, "after_transaction_end", commits.end)

    return commits


def _make_runner(scope: TaskScope | None) -> Runner:
    """Return the runner for a task that no scope holds.

    :param scope: The scope of the calling task, if there is one.
    """
    context, request_context = find_app_context(), find_request_context()

    if context is None or "apitask" not in context.app.extensions:
        return _LoggingRunner()

    if scope is not None:
        return scope.runner

    app, request = context.app, request_context and request_context.request
    return TaskRunner(app, request, app.extensions["apitask"].config.copy_g)


class _LoggingRunner(Runner):
    """Calls a task and logs what it raises, where there is no :class:`ApiTask`."""

    def run(self, work: Work, how: How) -> t.Any:
        task, args, kwargs, submitted = work
        context = find_app_context()
        app = None if context is None else context.app

        if app is not None:
            warn_without_apitask(app, "A task was started")

        try:
            return call_observed(app, how, submitted, task, args, kwargs)
        except BaseException as error:
            name = task_name(task)
            log(_logger, logging.ERROR, "Task %r failed.", name, error=error)
            raise
