from __future__ import annotations

from blinker import NamedSignal
from blinker import Namespace

_signals = Namespace()

task_started: NamedSignal = _signals.signal(
    "task-started",
    doc="""\
Sent before a task runs, in its thread and context. The sender is the
:class:`~flask.Flask` app. Keyword arguments:

-   ``name``: the task's name, see :func:`.task`.
-   ``how``: ``"thread"`` on a thread of the pool; ``"inline"`` in a plain call, in
    ``commit()`` (see :func:`.run_on_commit`), or if no thread was available;
    ``"celery"`` in a Celery worker. Handing a task over to Celery sends no signal.
-   ``args``, ``kwargs``: what the task is called with.
-   ``submitted``, ``started``: seconds of :func:`time.monotonic`. In a Celery worker,
    both are the time at which the task starts.

Not sent for a plain call outside any app context. If a receiver raises, the error is
logged and the task still runs.
""",
)

task_finished: NamedSignal = _signals.signal(
    "task-finished",
    doc="""\
Sent after a task ran, in the same thread and context as :data:`task_started`. The
keyword arguments are the same, plus:

-   ``finished``: seconds of :func:`time.monotonic`.
-   ``exception``: what the task raised, or ``None``.
-   ``result``: what it returned, or ``None``.
""",
)

task_dropped: NamedSignal = _signals.signal(
    "task-dropped",
    doc="""\
Sent for a task that will never run, because it was deferred and then dropped, or
because its future was cancelled. Any thread may send it. The sender is the
:class:`~flask.Flask` app. Keyword arguments: ``name``, ``args``, ``kwargs`` and
``submitted``, as for :data:`task_started`, and ``reason``, a clause such as
``"KeyError was raised"``.
""",
)
