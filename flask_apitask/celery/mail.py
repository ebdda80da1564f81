from __future__ import annotations

import base64
import collections
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
from ..mail.envelope import Envelope
from ..mail.replies import Reply
from ..mail.replies import show
from ..mail.settings import is_suppressed
from ..mail.stream import ConnectionLost
from ..task_log import log_failure
from .state import find_celery
from .state import find_state
from .state import find_submitted
from .worker import app_context

if t.TYPE_CHECKING:
    import celery
    from flask import Flask

    from ..calling import Call
    from ..mail.sending import Batch
    from .state import CeleryState

MAIL: t.Final = "flask_mail.send"
# Maximum seconds between two attempts. Brokers limit how long a worker may hold a task
# back: 30 minutes for RabbitMQ and an hour for Redis, by default.
_LONGEST: t.Final = 600.0


class MailHandover(HandsOver):
    """A task that hands a batch over to Celery, and delivers the rest itself."""

    task_name = MAIL
    exit_grace = None

    def __init__(self, state: CeleryState) -> None:
        self._state = state

    def find(self) -> MailHandover | None:
        """Return this object where the caller's mail goes to Celery.

        :raises RuntimeError: There is no Celery app.
        """
        found = find_state()

        if found is not None:
            find_celery(found[0], MAIL)

        return None if found is None else self

    def hand_over(self, call: Call) -> None:
        pool, batch, before = call.args
        told = []
        left: Batch = collections.deque()

        while batch:
            envelope, then = batch.popleft()

            if not self._publish(call.app, envelope, call.submitted):
                left.append((envelope, then))
            elif then is not None:
                told.append(then)

        for then in told:
            then()

        if left:
            # Not at the top: this import changes how email encodes any text.
            from ..mail.flask_mail import deliver

            call._replace(args=(pool, left, before)).run_here(deliver)

    def _publish(self, app: Flask, envelope: Envelope, submitted: float) -> bool:
        if len(envelope.content) > self._state.config.celery_mail_size:
            return False

        return publish(self._state, app, envelope, envelope.recipients, submitted)


def publish(
    state: CeleryState,
    app: Flask,
    envelope: Envelope,
    recipients: tuple[str, ...],
    submitted: float,
    **options: t.Any,
) -> bool:
    """Publish a message for some of its recipients; tell whether it was confirmed."""
    payload = {
        "sender": envelope.sender,
        "recipients": list(recipients),
        "content": base64.b64encode(envelope.content).decode(),
        "message_id": envelope.message_id,
        "mail_options": list(envelope.mail_options),
        "rcpt_options": list(envelope.rcpt_options),
    }
    # What events and monitors show in place of the addresses.
    shown = {"argsrepr": "()", "kwargsrepr": repr({"message_id": envelope.message_id})}
    options |= shown
    return state.publish(app, MAIL, (), payload, submitted, **options) is not None


@shared_task(
    name=MAIL,
    bind=True,
    acks_late=True,
    ignore_result=True,
    reject_on_worker_lost=True,
    throws=(Exception,),
    typing=False,
)  # type: ignore[untyped-decorator]
def send(
    self: celery.Task,
    sender: str,
    recipients: list[str],
    content: str,
    message_id: str,
    mail_options: list[str],
    rcpt_options: list[str],
) -> None:
    """Send a message in a worker, and try again later if that may help."""
    with app_context(self.app) as app:
        started = time.monotonic()

        try:
            envelope = Envelope(
                sender,
                tuple(recipients),
                base64.b64decode(content),
                message_id,
                tuple(mail_options),
                tuple(rcpt_options),
            )
            _deliver(self, app, envelope, started)
        except TaskPredicate:
            # Not an error: the message is tried again later.
            raise
        except Exception as error:
            log_failure(app, MailHandover, error, time.monotonic() - started)
            raise


def _deliver(task: celery.Task, app: Flask, envelope: Envelope, started: float) -> None:
    from ..mail.flask_mail import deliver
    from ..mail.flask_mail import find_pool

    mail = app.extensions["mail"]

    if is_suppressed(mail):
        return

    batch: Batch = collections.deque([(envelope, None)])
    work = find_pool(app.extensions["apitask_mail"], mail), batch, None

    try:
        submitted = find_submitted(task, started)
        call_observed(app, "celery", submitted, deliver, work, {})
    except DeliveryError as error:
        if not task.request.is_eager:
            _try_again(task, app, envelope, error, started)

        raise


def _try_again(
    task: celery.Task,
    app: Flask,
    envelope: Envelope,
    error: DeliveryError,
    started: float,
) -> None:
    """Publish a message again for the recipients it may still reach; end this attempt.

    Returns if there are no such recipients or no attempts left, or if the broker does
    not confirm the message and only some of the recipients are left.
    """
    state: CeleryState = app.extensions["apitask_celery"]
    recipients = _find_recipients(error, envelope.recipients)
    attempt = task.request.retries + 1

    if not recipients or attempt > state.config.celery_mail_retries:
        return

    # The cap on the exponent keeps the power small. It has reached _LONGEST by then.
    doubled = state.config.celery_mail_backoff * 2 ** min(attempt - 1, 30)
    longest = min(doubled, _LONGEST)
    options = {
        "countdown": random.uniform(longest / 2, longest),
        "retries": attempt,
        "task_id": task.request.id,
    }

    if publish(state, app, envelope, recipients, started, **options):
        _log_refused(app, envelope, error, recipients, started)
        raise Retry(exc=error, when=options["countdown"])

    if recipients == envelope.recipients:
        # The broker still has the message, for all its recipients, and delivers it
        # again.
        raise Reject(error, requeue=True)


def _log_refused(
    app: Flask,
    envelope: Envelope,
    error: DeliveryError,
    recipients: tuple[str, ...],
    started: float,
) -> None:
    """Log an ERROR about recipients who are not tried again, if there are any."""
    replies = error.recipients.items()
    refused = {path: reply for path, reply in replies if path not in recipients}

    if refused:
        shown = show((Reply(*reply) for reply in refused.values()), refused)
        final = DeliveryError(
            f"{len(refused)} of {len(envelope.recipients)} recipients were refused for"
            f" good: {shown}. {len(recipients)} will be tried again.",
            message_id=envelope.message_id,
            stage="RCPT",
            recipients=refused,
        )
        log_failure(app, MailHandover, final, time.monotonic() - started)


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
