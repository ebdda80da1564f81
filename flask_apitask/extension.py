from __future__ import annotations

import logging
import typing as t
import weakref

from flask import Flask
from flask import request_started
from werkzeug.local import LocalProxy

from . import request_scope
from .config import Config
from .config import find_late_keys
from .config import find_mistakes
from .context import MERGED
from .executor.pool import ThreadPool
from .log import log
from .log import log_once
from .watching import watch
from .watching import watch_responses

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Those that have had no request yet.
_unserved: weakref.WeakSet[Flask] = weakref.WeakSet()


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
        """Read the configuration of an app, and give its requests their scopes.

        A function for :meth:`flask.Flask.before_request` makes the scope, and one for
        :meth:`flask.Flask.teardown_request` waits for its tasks. Flask calls the latter
        in reverse order: those that were registered before this come after the wait.

        These keys of :attr:`flask.Flask.config` are read, once:

        -   ``APITASK_ENABLED`` (``True``): a scope for every request.
        -   ``APITASK_MAX_WORKERS`` (``8``): most tasks of one request running at once.
        -   ``APITASK_POOL_SIZE`` (``32``): most threads of the app in one
            process.
        -   ``APITASK_TIMEOUT`` (``None``): seconds the end of the request waits.
        -   ``APITASK_WAIT`` (``"teardown"``): when the request waits; ``"close"`` is
            after the response was sent.
        -   ``APITASK_COPY_G`` (``()``): names that a task finds in its own ``g``, as
            they were when it was started.
        -   ``APITASK_PROPAGATE`` (``False``): the end of a scope raises what one of its
            tasks has raised; for tests.
        -   ``APITASK_MAIL_BACKGROUND`` (``False``): reroute Flask-Mail and
            Flask-Mailman.
        -   ``APITASK_MAIL_START`` (``"send"``): when it is sent; ``"success"`` is once
            the request has succeeded.
        -   ``APITASK_MAIL_TIMEOUT`` (``10.0``): seconds of every SMTP socket operation.
        -   ``APITASK_MAIL_CONNECTIONS`` (``4``): most SMTP connections of the
            app in one process.
        -   ``APITASK_MAIL_KEEPALIVE`` (``30.0``): seconds an idle connection is kept;
            ``0`` opens one per batch.
        -   ``APITASK_MAIL_TLS_VERIFY`` (``True``): verify certificate and host name, by
            the system's trust store or by a file of CA certificates, given as its path.
        -   ``APITASK_ROUTES`` (``{}``): patterns of task names, with ``"celery"`` or
            ``"thread"`` each, of which the first that matches counts.
        -   ``APITASK_CELERY_TIMEOUT`` (``2.0``): seconds after which a broker that does
            not confirm counts as down.
        -   ``APITASK_CELERY_MAIL_RETRIES`` (``20``): most further attempts at a mail.
        -   ``APITASK_CELERY_MAIL_BACKOFF`` (``5.0``): seconds before the first of them,
            which double each time.
        -   ``APITASK_CELERY_MAIL_SIZE`` (``1048576``): most bytes of a mail that goes
            to Celery.

        :param app: The app, with its configuration loaded.
        :raises RuntimeError: The app has an :class:`ApiTask` already, or
            ``APITASK_MAIL_BACKGROUND`` is on and no mail library is installed, or
            ``APITASK_ROUTES`` names Celery, which is not installed.
        :raises TypeError: ``app`` is no Flask app.
        :raises ValueError: A key has a value that is not allowed, or two functions
            have a name that is routed to Celery.
        """
        if isinstance(app, LocalProxy):
            app = app._get_current_object()

        if not isinstance(app, Flask):
            raise TypeError(f"ApiTask takes the Flask app, and not {app!r}.")

        if "apitask" in app.extensions:
            raise RuntimeError(
                "An 'ApiTask' instance has already been registered on this Flask app."
                " One is enough: run() and the others find it by the current app."
            )

        config = Config.from_mapping(app.config)

        for mistake in find_mistakes(app.config):
            log(app.logger, logging.WARNING, "%s", mistake)

        reroute = None

        if config.mail_background:
            # Only such an app pays for the import.
            from .mail import find_reroute

            reroute = find_reroute()

        use_celery = _find_use_celery() if config.uses_celery else None

        # Flask refuses these once the app has served. Then nothing else has been done.
        app.teardown_request(request_scope.end_request)

        if config.enabled:
            app.before_request(request_scope.begin_request)

        if not MERGED:
            app.teardown_appcontext(request_scope.end_leftovers)

        if reroute is not None:
            reroute(app, config)

        if use_celery is not None:
            use_celery(app, config)

        state = request_scope.AppState(config, ThreadPool(config.pool_size))
        app.extensions["apitask"] = state
        _unserved.add(app)
        request_started.connect(_warn_of_late_keys, app)

        if reroute is not None and config.mail_start == "success":
            watch(app)

        if config.enabled and config.wait == "close":
            watch_responses(app)


def _warn_of_late_keys(app: Flask, **extra: object) -> None:
    """Warn in the first request; no other one pays for it, if all apps have served."""
    request_started.disconnect(_warn_of_late_keys, app)
    _unserved.discard(app)

    if not _unserved:
        request_started.disconnect(_warn_of_late_keys)

    for key in find_late_keys(app.config, app.extensions["apitask"].config):
        log_once(
            app,
            key,
            "%s was changed after ApiTask(app) had read it, which has no effect. Set it"
            " before that.",
            key,
        )


def _find_use_celery() -> cabc.Callable[[Flask, Config], None]:
    try:
        from .celery import use_celery
    except ImportError as error:
        if error.name != "celery":
            raise

        raise RuntimeError(
            "APITASK_ROUTES sends tasks to Celery, but Celery is not installed. Install"
            ' it with: pip install "flask-apitask[celery]"'
        ) from error

    return use_celery
