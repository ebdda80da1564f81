"""Every mail of a load, while the broker, the worker or both are killed."""

from __future__ import annotations

import enum
import json
import os
import re
import secrets
import signal
import time
import typing as t

import ledger
import pytest
from ledger import Load
from ledger_mail import MailServer
from ledger_mail import reserve_port
from ledger_report import Report
from wsgi_servers import serve

from flask_apitask import run

pytest.importorskip("celery")
pytest.importorskip("redis")

from brokers import Worker
from celery_app import double
from redis import Redis

if t.TYPE_CHECKING:
    import pathlib

    from brokers import Broker
    from brokers import Program
    from celery.result import AsyncResult
    from celery_app import Celeries
    from flask import Flask

pytestmark = pytest.mark.servers

# Requests of two mails each, in the ways to be killed together.
REQUESTS: t.Final = int(os.environ.get("APITASK_LEDGER_REQUESTS", "60"))
CLIENTS: t.Final = 2
# Seconds that the mail server takes for a message.
DELAY: t.Final = 0.01
# Seconds without any mail after which no more will come: far longer than it takes Redis
# to give out again the messages of a killed worker.
PATIENCE: t.Final = 20.0
# Seconds without the killed ones.
OUTAGE: t.Final = 0.2
# Seconds after which a broker has given a message to a worker that has asked for it.
GIVEN_WITHIN: t.Final = 0.5
# An hour by default. The other two look for such messages each second.
REDIS: t.Final = {
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}
REPORT: t.Final = Report(
    "celery-ledger",
    labels={"broker": "broker"},
    numbers={
        "requests": "requests",
        "acknowledged": "acknowledged",
        "delivered": "mails delivered",
        "lost": "**acknowledged, not delivered, no ERROR**",
        "errors": "ERRORs",
        "doubled": "**delivered twice**",
    },
)


class Kill(enum.Enum):
    """What is killed with SIGKILL, and started again."""

    BROKER = "the broker"
    WORKER = "the worker"
    BOTH = "both"


def kill(what: Kill, broker: Broker, worker: Worker) -> None:
    """Kill, wait a moment, and start again."""
    programs: list[Program] = []

    if what is not Kill.WORKER:
        programs.append(broker)

    if what is not Kill.BROKER:
        programs.append(worker)

    for program in programs:
        program.kill()

    time.sleep(OUTAGE)

    for program in programs:
        program.start()


def test_celery_ledger(broker: Broker, tmp_path: pathlib.Path) -> None:
    """Each mail of an acknowledged request arrives, or there is an ERROR."""
    key = secrets.token_hex()
    begun = tmp_path / "begun"
    celery: dict[str, t.Any] = {
        "broker_url": broker.url,
        "broker_connection_retry_on_startup": True,
        "task_default_queue": key,
        "worker_prefetch_multiplier": 1,
    }

    is_redis = broker.package == "redis-server"

    if is_redis:
        celery["broker_transport_options"] = REDIS

    with reserve_port() as port, MailServer(port, delay=DELAY) as mail_server:
        environ = ledger.app_environ(
            key=key, begun=begun, mail_port=port, mail="celery"
        ) | {"FLASK_CELERY": json.dumps(celery)}

        with (
            Worker(tmp_path, "ledger_app:celery_app", "prefork", environ) as worker,
            serve("gunicorn-gthread", "ledger_app:app", env=environ) as server,
        ):
            with Load(port=server.port, key=key, clients=CLIENTS) as load:
                for what in Kill:
                    load.wait_for_more(REQUESTS // (len(Kill) + 1))
                    kill(what, broker, worker)

                load.wait_for_more(REQUESTS // (len(Kill) + 1))

            acknowledged = load.of(ledger.Outcome.ACKNOWLEDGED)
            promised = {
                ledger.message_id(number, copy)
                for number in acknowledged
                for copy in range(ledger.COPIES)
            }
            failed: set[str] = set()
            last_count, last_at = -1, time.monotonic()

            while promised - mail_server.delivered.keys() - failed:
                if last_count != mail_server.delivered.total():
                    last_count, last_at = (
                        mail_server.delivered.total(),
                        time.monotonic(),
                    )
                elif time.monotonic() > last_at + PATIENCE:
                    break

                time.sleep(0.1)
                output = server.output() + worker.output()
                named = set(re.findall(r"Message-ID: (<[^<>]+>)", output))
                failed = named & promised

            output = server.output()
            # To end by itself takes it seconds, and there is nothing left to do.
            worker.kill()

    sums = ledger.balance(load, ledger.read_begun(begun), mail_server)
    lost = promised - mail_server.delivered.keys() - failed
    REPORT.add(
        {
            "broker": broker.package.removesuffix("-server"),
            "requests": sums.requests,
            "acknowledged": sums.acknowledged,
            "delivered": sums.delivered,
            "lost": len(lost),
            "errors": len(failed),
            "doubled": sums.doubled,
        }
    )
    # Celery takes a message off Redis, and then notes in Redis that it has it. One that
    # is on its way between the two is lost with either of them.
    assert len(lost) <= (len(Kill) if is_redis else 0), lost
    # The web process was never ended, and had a broker at last.
    assert output.count("Celery's broker did not confirm") >= 1
    assert sums.acknowledged == sums.requests
    assert sums.acknowledged >= REQUESTS // (len(Kill) + 1) * (len(Kill) + 1)


def test_message_on_its_way_to_a_worker(
    broker: Broker, celeries: Celeries, tmp_path: pathlib.Path
) -> None:
    """What a killed worker was given, and has not read yet: Redis has it no more."""
    celery = {
        "broker_url": broker.url,
        "result_backend": f"file://{tmp_path}",
        "task_default_queue": secrets.token_hex(),
    }
    app = celeries.make(CELERY=celery)
    environ = {"FLASK_CELERY": json.dumps(celery)}

    with Worker(tmp_path, "celery_worker:celery_app", "threads", environ) as worker:
        result = stop_with_message(app, worker)
        worker.kill()

        if broker.package == "redis-server":
            # It is not in the queue, nor recorded as given to a worker.
            with Redis(port=broker.port) as client:
                assert client.llen(celery["task_default_queue"]) == 0
                given: t.Any = client.hvals("unacked")
                assert not [one for one in given if result.id.encode() in one]
        else:
            worker.start()
            assert result.get(timeout=PATIENCE) == 8


def stop_with_message(app: Flask, worker: Worker) -> AsyncResult:
    """Stop a worker, and publish what the broker gives to it at once."""
    celery_app = app.extensions["celery"]

    with celery_app.connection_for_read() as connection, app.app_context():
        queue = celery_app.amqp.default_queue(connection.default_channel)

        while True:
            worker.signal(signal.SIGSTOP)
            result: t.Any = run(double, 4).result()
            until = time.monotonic() + GIVEN_WITHIN

            while time.monotonic() < until:
                if not queue.queue_declare().message_count:
                    return result

                time.sleep(0.01)

            # It had not asked Redis for one, which it does again and again.
            worker.signal(signal.SIGCONT)
