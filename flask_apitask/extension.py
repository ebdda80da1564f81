from __future__ import annotations

import typing as t
import weakref

from flask import request_started

from . import request_scope
from .api import warn_without_apitask
from .config import Config
from .config import find_late_keys
from .config import find_mistakes
from .config import is_true
from .context import MERGED
from .context import unwrap_app
from .executor.pool import ThreadPool
from .log import log_once
from .watching import watch
from .watching import watch_responses

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

# The apps that have had no request yet.
_unserved: weakref.WeakSet[Flask] = weakref.WeakSet()


class ApiTask:
    """Give every request of a Flask app a scope for its tasks.

    You need it only for set-up: :func:`run`, :func:`wait` and the other functions find
    the current app themselves, in blueprints and libraries too.

    :param app: The app to set up; leave it out to call :meth:`init_app` later.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the configuration of an app, and give its requests their scopes.

        A :meth:`~flask.Flask.before_request` function makes the scope, and a
        :meth:`~flask.Flask.teardown_request` function waits for its tasks. Flask calls
        teardown functions in reverse order, so those registered before this call run
        after the wait.

        These keys of :attr:`flask.Flask.config` are read once:

        -   ``APITASK_ENABLED`` (``True``): a scope for every request.
        -   ``APITASK_MAX_WORKERS`` (``8``): maximum number of tasks of one request that
            run at once.
        -   ``APITASK_POOL_SIZE`` (``32``): maximum number of threads of the app in one
            process.
        -   ``APITASK_TIMEOUT`` (``None``): maximum seconds a request waits for its
            tasks; ``None`` waits indefinitely.
        -   ``APITASK_WAIT`` (``"teardown"``): when the request waits; ``"close"`` means
            after the response was sent.
        -   ``APITASK_COPY_G`` (``()``): names to copy from ``g`` to the ``g`` of each
            task when it is started.
        -   ``APITASK_PROPAGATE`` (``False``): raise a task's exception at the end of
            its scope; for tests.
        -   ``APITASK_MAIL_BACKGROUND`` (``False``): send the mail of Flask-Mail and
            Flask-Mailman in tasks.
        -   ``APITASK_MAIL_START`` (``"send"``): when to send it; ``"success"`` means
            once the request has succeeded.
        -   ``APITASK_MAIL_TIMEOUT`` (``10.0``): seconds for each step of sending mail.
        -   ``APITASK_MAIL_CONNECTIONS`` (``4``): maximum number of SMTP connections of
            the app in one process.
        -   ``APITASK_MAIL_KEEPALIVE`` (``30.0``): seconds to keep an idle connection,
            but at most half of ``APITASK_MAIL_TIMEOUT``, so 5 s by default; ``0`` opens
            one per batch.
        -   ``APITASK_MAIL_TLS_VERIFY`` (``True``): verify certificate and host name
            against the system's trust store, or against the CA file at this path.
        -   ``APITASK_ROUTES`` (``{}``): a dict of patterns of task names to
            ``"celery"`` or ``"thread"``; the first match counts.
        -   ``APITASK_CELERY_TIMEOUT`` (``2.0``): seconds after which a broker that has
            not confirmed a task counts as down.
        -   ``APITASK_CELERY_MAIL_RETRIES`` (``20``): maximum number of retries per
            message.
        -   ``APITASK_CELERY_MAIL_BACKOFF`` (``5.0``): maximum delay before the first
            retry, in seconds; doubles each time. The delay is random, between half of
            this and all of it.
        -   ``APITASK_CELERY_MAIL_SIZE`` (``1048576``): maximum size of a message that
            goes to Celery, in bytes.

        :param app: The app, with its configuration loaded.
        :raises RuntimeError: The app has an :class:`ApiTask` already, or
            ``APITASK_MAIL_BACKGROUND`` is on and no mail library is installed, or
            ``APITASK_ROUTES`` names Celery, which is not installed.
        :raises TypeError: ``app`` is not a Flask app.
        :raises ValueError: A key has a value that is not allowed, or two functions
            share a name that is routed to Celery.
        """
        app = unwrap_app(app, "ApiTask takes the Flask app")

        if "apitask" in app.extensions:
            raise RuntimeError(
                "An 'ApiTask' instance has already been registered on this Flask app."
                " One is enough: run() and the other functions use the current app's."
            )

        config = Config.from_mapping(app.config)
        _warn_of_mistakes(app)
        set_ups = _find_set_ups(config)
        # First: if Flask refuses them because the app has served a request, nothing
        # else has been changed.
        _add_hooks(app, config)

        for set_up in set_ups:
            set_up(app, config)

        state = request_scope.AppState(config, ThreadPool(config.pool_size))
        app.extensions["apitask"] = state
        _unserved.add(app)
        request_started.connect(_warn_of_late_keys, app)
        request_started.disconnect(_warn_of_missing)

        if config.mail_background and config.mail_start == "success":
            watch(app)

        if config.enabled and config.wait == "close":
            watch_responses(app)


def _add_hooks(app: Flask, config: Config) -> None:
    """Have Flask call what makes and ends the scopes of requests."""
    app.teardown_request(request_scope.end_request)

    if config.enabled:
        app.before_request(request_scope.begin_request)

    if not MERGED:
        app.teardown_appcontext(request_scope.end_leftovers)


@request_started.connect
def _warn_of_missing(app: Flask, **extra: object) -> None:
    """Warn if an app without ApiTask has background mail on, while no app has one."""
    if is_true(app.config.get("APITASK_MAIL_BACKGROUND")):
        warn_without_apitask(app, "APITASK_MAIL_BACKGROUND was on")


def _warn_of_late_keys(app: Flask, **extra: object) -> None:
    """Warn in the first request. Later ones pay nothing, once all apps have had one."""
    request_started.disconnect(_warn_of_late_keys, app)
    _unserved.discard(app)

    if not _unserved:
        request_started.disconnect(_warn_of_late_keys)

    for key in find_late_keys(app.config, app.extensions["apitask"].config):
        log_once(
            app,
            key,
            "%s was changed after ApiTask(app) had read it, which has no effect. Set it"
            " before ApiTask(app).",
            key,
        )

    _warn_of_mistakes(app)


def _warn_of_mistakes(app: Flask) -> None:
    for mistake in find_mistakes(app.config):
        log_once(app, mistake, "%s", mistake)


def _find_set_ups(config: Config) -> list[cabc.Callable[[Flask, Config], None]]:
    """Return the set-ups for mail and Celery, imported only if the app uses them."""
    set_ups: list[cabc.Callable[[Flask, Config], None]] = []

    if config.mail_background:
        from .mail import find_reroute

        set_ups.append(find_reroute())

    if config.uses_celery:
        try:
            from .celery import use_celery
        except ImportError as error:
            if error.name != "celery":
                raise

            raise RuntimeError(
                "APITASK_ROUTES sends tasks to Celery, but Celery is not installed."
                ' Install it with: pip install "flask-apitask[celery]"'
            ) from error

        set_ups.append(use_celery)

    return set_ups
