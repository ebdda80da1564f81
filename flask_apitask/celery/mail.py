from __future__ import annotations

import base64
import collections
import dataclasses
import importlib
import random
import time
import typing as t

from celery import shared_task
from celery.exceptions import Reject
from celery.exceptions import Retry
from celery.exceptions import TaskPredicate

from ..calling import call_observed
from ..calling import HandsOver
from ..exceptions import DeliveryError
from ..exceptions import DeliveryUnknown
from ..log import log_once
from ..mail.envelope import Envelope
from ..mail.replies import Reply
from ..mail.replies import show
from ..mail.sending import deliveries
from ..mail.sending import EXTENSIONS
from ..mail.sending import join_failures
from ..mail.sending import log_silenced
from ..mail.settings import is_suppressed
from ..mail.stream import ConnectionLost
from ..task_log import log_failure
from .state import find_celery
from .state import find_state
from .state import find_submitted
from .state import raises_to_caller
from .worker import app_context

if t.TYPE_CHECKING:
    import celery
    from flask import Flask

    from ..calling import Call
    from ..mail.envelope import SMTPSettings
    from ..mail.sending import Batch
    from ..mail.sending import ReroutedMail
    from .state import CeleryState

# Maximum seconds between two attempts. Brokers limit how long a worker may hold a task
# back: 30 minutes for RabbitMQ and an hour for Redis, by default.
_LONGEST: t.Final = 600.0


def find_handover(name: str) -> MailHandover | None:
    """Return the task that hands a library's mail over to Celery, if it goes there.

    :param name: The name of the task that delivers the library's mail.
    :raises RuntimeError: There is no Celery app.
    """
    found = find_state()

    if found is None or not found[1].takes(name):
        return None

    find_celery(found[0], name)
    return MailHandover(found[1], name)


class MailHandover(HandsOver):
    """A task that hands messages over to Celery, and delivers all others itself."""

    exit_grace = None

    def __init__(self, state: CeleryState, name: str) -> None:
        self._state = state
        self.task_name = name

    def hand_over(self, call: Call) -> DeliveryError | None:
        pool, batch, before, fail_silently = call.args
        is_configured = _is_configured(call.app, self.task_name, pool.settings)
        count, told = len(batch), []
        failures: list[DeliveryError] = []
        left: Batch = collections.deque()

        while batch:
            envelope, then = batch.popleft()

            try:
                if not (is_configured and self._publish(call, envelope, fail_silently)):
                    left.append((envelope, then))
                elif then is not None:
                    told.append(then)
            except DeliveryError as error:
                # It was sent here, with task_always_eager and APITASK_PROPAGATE.
                failures.append(error.with_traceback(None))

        for then in told:
            then()

        silenced: DeliveryError | None = None

        if left:
            call = call._replace(args=(pool, left, before, fail_silently))

            try:
                silenced = call.run_here(deliveries[self.task_name])
            except DeliveryError as error:
                failures.append(error)

        if failed := join_failures(failures, count):
            raise failed

        return silenced

    def _publish(self, call: Call, envelope: Envelope, fail_silently: bool) -> bool:
        if len(envelope.content) > self._state.config.celery_mail_size:
            return False

        name = self.task_name
        return publish(call.app, name, envelope, fail_silently, call.submitted)


def _find_mail(app: Flask, name: str) -> tuple[ReroutedMail, t.Any]:
    """Return how an app's mail is rerouted, and the object of its mail library."""
    try:
        return app.extensions["apitask_mail"], app.extensions[EXTENSIONS[name]]
    except KeyError as error:
        raise RuntimeError(
            f"The app {app.name!r} of this worker can't send the mail of {name!r}: it"
            f" has no app.extensions[{error}]. Set APITASK_MAIL_BACKGROUND and call"
            " Mail(app) there as well."
        ) from None


def _is_configured(app: Flask, name: str, settings: SMTPSettings) -> bool:
    """Tell whether a mail's settings are those of the configuration, as in a worker."""
    rerouted, mail = _find_mail(app, name)
    library = importlib.import_module(name.partition(".")[0])

    try:
        configured = rerouted.settings(library.Mail().init_mail(app.config))

        # A worker has its own app.debug.
        if settings == dataclasses.replace(configured, debug=settings.debug):
            return True

        is_changed = settings == rerouted.settings(mail)
    except ValueError:
        # These are of no use, unlike those of this mail.
        return False

    if is_changed:
        log_once(
            app,
            f"mail_settings_{name}",
            "The mail settings in app.extensions[%r] are not those of app.config, which"
            " a worker has. So mail sent with them stays on threads, although"
            " APITASK_ROUTES sends it to Celery.",
            EXTENSIONS[name],
        )

    return False


def publish(
    app: Flask,
    name: str,
    envelope: Envelope,
    fail_silently: bool,
    submitted: float,
    **options: t.Any,
) -> bool:
    """Publish a message for a worker; return whether the broker confirmed it."""
    content = base64.b64encode(envelope.content).decode()
    payload = {**vars(envelope), "content": content, "fail_silently": fail_silently}
    # What events and monitors show in place of the addresses.
    shown = {"argsrepr": "()", "kwargsrepr": repr({"message_id": envelope.message_id})}
    options |= shown
    state: CeleryState = app.extensions["apitask_celery"]
    return state.publish(app, name, (), payload, submitted, **options) is not None


def _send(
    task: celery.Task, content: str, fail_silently: bool = False, **fields: t.Any
) -> None:
    """Send a message in a worker, and try again later if that may help.

    :param fields: The other fields of its :class:`.Envelope`.
    """
    with app_context(task.app) as app:
        attempt = _Attempt(task, app, fail_silently, time.monotonic())

        try:
            envelope = Envelope(content=base64.b64decode(content), **fields)
            attempt.deliver(envelope)
        except TaskPredicate:
            # Not an error: the message is tried again later.
            raise
        except Exception as error:
            if fail_silently or not raises_to_caller(task):
                attempt.log(error)

            if not fail_silently:
                raise


for _name in EXTENSIONS:
    shared_task(
        name=_name,
        bind=True,
        acks_late=True,
        ignore_result=True,
        reject_on_worker_lost=True,
        throws=(Exception,),
        typing=False,
    )(_send)


class _Attempt(t.NamedTuple):
    """A worker's attempt to deliver a message."""

    task: celery.Task
    app: Flask
    fail_silently: bool
    started: float

    def deliver(self, envelope: Envelope) -> None:
        rerouted, mail = _find_mail(self.app, self.task.name)

        if is_suppressed(mail):
            return

        batch: Batch = collections.deque([(envelope, None)])
        work = rerouted.pool(mail), batch, None, False
        submitted = find_submitted(self.task, self.started)

        try:
            fn = deliveries[self.task.name]
            call_observed(self.app, "celery", submitted, fn, work, {})
        except DeliveryError as error:
            if not self.task.request.is_eager:
                self._try_again(envelope, error)

            raise

    def log(self, error: Exception) -> None:
        """Log that a message was not delivered."""
        if self.fail_silently and isinstance(error, DeliveryError):
            log_silenced(error)
        else:
            fn, duration = deliveries[self.task.name], time.monotonic() - self.started
            log_failure(self.app, fn, error, duration)

    def _try_again(self, envelope: Envelope, error: DeliveryError) -> None:
        """Publish a message for the recipients it may still reach; end this attempt.

        Returns if there are no such recipients or no attempts left, or if the broker
        does not confirm the message and only some of the recipients are left.
        """
        config = self.app.extensions["apitask_celery"].config
        recipients = _find_recipients(error, envelope.recipients)
        request = self.task.request
        number = request.retries + 1

        if not recipients or number > config.celery_mail_retries:
            return

        # The cap on the exponent keeps the power small. It has reached _LONGEST by
        # then.
        doubled = config.celery_mail_backoff * 2 ** min(number - 1, 30)
        longest = min(doubled, _LONGEST)
        options = {
            "countdown": random.uniform(longest / 2, longest),
            "retries": number,
            "task_id": request.id,
            # Celery's defaults come from the current thread, which may not publish.
            "root_id": request.root_id or request.id,
            "parent_id": request.parent_id or request.id,
            "priority": (request.delivery_info or {}).get("priority"),
        }
        left = dataclasses.replace(envelope, recipients=recipients)

        if publish(
            self.app, self.task.name, left, self.fail_silently, self.started, **options
        ):
            self._log_refused(envelope, error, recipients)
            raise Retry(exc=error, when=options["countdown"])

        if recipients == envelope.recipients:
            # The broker still has the message, for all its recipients, and delivers it
            # again.
            raise Reject(error, requeue=True)

    def _log_refused(
        self, envelope: Envelope, error: DeliveryError, recipients: tuple[str, ...]
    ) -> None:
        """Log the recipients who are not tried again, if there are any."""
        replies = error.recipients.items()
        refused = {path: reply for path, reply in replies if path not in recipients}

        if refused:
            shown = show((Reply(*reply) for reply in refused.values()), refused)
            self.log(
                DeliveryError(
                    f"{len(refused)} of {len(envelope.recipients)} recipients were"
                    f" refused for good: {shown}. {len(recipients)} will be tried"
                    " again.",
                    message_id=envelope.message_id,
                    stage="RCPT",
                    recipients=refused,
                )
            )


def _find_recipients(
    error: DeliveryError, recipients: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the recipients whom a message has not reached but may reach later."""
    if error.recipients:
        replies = error.recipients.items()
        return tuple(path for path, (code, _) in replies if code // 100 == 4)

    if isinstance(error, DeliveryUnknown):
        return ()

    if error.smtp_code is not None:
        is_transient = error.smtp_code // 100 == 4
    else:
        # Other errors mean that the configuration does not fit the server. An error
        # without a stage says that all connections are in use.
        is_transient = isinstance(error, ConnectionLost) or error.stage is None

    return recipients if is_transient else ()
