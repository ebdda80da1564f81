from __future__ import annotations

from blinker import NamedSignal
from blinker import Namespace

_signals = Namespace()

task_started: NamedSignal = _signals.signal(
    "task-started",
    doc="""\
Sent before a task runs, in the thread and in the context that it runs in. The sender
is the :class:`~flask.Flask` app. Keyword arguments:

-   ``name``: the task's name, see :func:`.task`.
-   ``how``: ``"thread"`` on a thread of the pool, ``"inline"`` for a plain call, or
    if no thread was available, ``"celery"`` in a worker of Celery. To hand a task over
    to Celery sends no signal.
-   ``args``, ``kwargs``: what the task is called with.
-   ``submitted``, ``started``: seconds of :func:`time.monotonic`. A worker of Celery
    knows no other time of submission than that at which it begins.

Not sent for a plain call outside of any application context. If a receiver raises, the
error is logged and the task runs all the same.
""",
)

task_finished: NamedSignal = _signals.signal(
    "task-finished",
    doc="""\
Sent after a task ran, in the same thread and context as :data:`task_started` and with
its keyword arguments, and:

-   ``finished``: seconds of :func:`time.monotonic`.
-   ``exception``: what the task raised, or ``None``.
-   ``result``: what it returned, or ``None``.
""",
)

task_dropped: NamedSignal = _signals.signal(
    "task-dropped",
    doc="""\
Sent for a task that never runs, as it was put off and is dropped, or as its future was
cancelled, by whichever thread finds that. The sender is the :class:`~flask.Flask` app.
Keyword arguments: ``name``, ``args``, ``kwargs`` and ``submitted``, as for
:data:`task_started`, and ``reason``, part of a sentence.
""",
)
