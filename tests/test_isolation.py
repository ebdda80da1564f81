"""What is bound to a thread, by libraries that many apps use, is never shared."""

from __future__ import annotations

import asyncio
import functools
import json
import pathlib
import sqlite3
import subprocess
import sys
import threading
import typing as t

import peewee
import pytest
import sqlalchemy
from conftest import PATIENCE
from flask import Flask
from flask import g
from late_threads import make_late
from playhouse.flask_utils import FlaskDB  # type: ignore[import-untyped]
from sqlalchemy import orm

from flask_apitask import ApiTask
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import scoped
from flask_apitask import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from conftest import AppFactory

    Work = cabc.Callable[[], object]


def at_the_end(work: Work) -> None:
    """The request waits for the task."""
    run(work)


def in_wait(work: Work) -> None:
    """The view waits for it."""
    run(work)
    wait()


def in_block(work: Work) -> None:
    """A block waits for it."""
    with open_scope():
        run(work)


@scoped
def in_scoped(work: Work) -> None:
    """The view's own scope waits for it."""
    run(work)


def by_result(work: Work) -> None:
    """The view asks for its result."""
    run(work).exception(PATIENCE)


def by_callback(work: Work) -> None:
    """A done callback does the work."""
    run(str).add_done_callback(lambda future: work())


def by_late_callback(work: Work) -> None:
    """A done callback added after the task is done does the work."""
    future = run(str)
    future.result(PATIENCE)
    future.add_done_callback(lambda future: work())


def by_callback_of_cancelled(work: Work) -> None:
    """A done callback of a task that never ran does it."""
    with open_scope(max_workers=1) as scope:
        release = threading.Event()
        run(release.wait, PATIENCE)
        future = scope.submit(str)
        future.add_done_callback(lambda future: work())
        assert future.cancel()
        release.set()


def in_event_loop(work: Work) -> None:
    """A coroutine awaits it, when it is done."""

    async def view() -> None:
        done = run(work)
        done.exception(PATIENCE)
        # It is done already, so what asyncio adds to it is called at once.
        await asyncio.gather(done, asyncio.wrap_future(done), return_exceptions=True)

    asyncio.run(view())


# How a view starts a task, and waits for it.
WAYS = pytest.mark.parametrize(
    "way",
    [
        at_the_end,
        in_wait,
        in_block,
        in_scoped,
        by_result,
        by_callback,
        by_late_callback,
        by_callback_of_cancelled,
        in_event_loop,
    ],
)
# Whether a thread is free, or a scope that is waited for needs one more.
LATE = pytest.mark.parametrize("late", [False, True], ids=["free", "full"])


@WAYS
@LATE
def test_no_task_runs_on_the_thread_of_a_request(
    make_app: AppFactory, way: cabc.Callable[[Work], None], late: bool
) -> None:
    """Whatever waits, a user's code has another thread (behaviour 19a)."""
    app = make_late(make_app()) if late else make_app()
    threads: list[int] = []
    torn_down: list[int] = []

    @app.teardown_appcontext
    def note(exc: BaseException | None) -> None:
        torn_down.append(threading.get_ident())

    with app.test_request_context():
        way(lambda: threads.append(threading.get_ident()))

    assert threads
    assert threading.get_ident() not in threads
    # That of the request's own context.
    assert torn_down.count(threading.get_ident()) == 1


@WAYS
@LATE
def test_thread_local(
    make_app: AppFactory, way: cabc.Callable[[Work], None], late: bool
) -> None:
    """A view and its tasks see nothing of each other, nor does the next request."""
    app = make_app()
    local = threading.local()
    found: list[dict[str, t.Any]] = []

    if late:
        make_late(app)

    def work() -> None:
        found.append(dict(vars(local)))
        local.name = "task"

    @app.teardown_appcontext
    def clear(exc: BaseException | None) -> None:
        vars(local).clear()

    @app.get("/")
    def index() -> str:
        assert not vars(local)
        local.name = "view"
        way(work)
        return str(local.name)

    for _ in range(2):
        assert app.test_client().get("/").text == "view"
        assert not vars(local)

    assert found
    assert all(not values for values in found)


def test_nothing_that_a_task_leaves_meets_a_request(make_app: AppFactory) -> None:
    """State that a task leaves on its thread stays there, however it is waited for."""
    app = make_late(make_app())
    local = threading.local()

    @app.get("/")
    def index() -> list[str]:
        found = list(vars(local))

        for way in (at_the_end, in_wait, in_block, in_scoped, by_result):
            way(functools.partial(setattr, local, "left", True))

        return found

    assert [app.test_client().get("/").json for _ in range(2)] == [[], []]


# SQLAlchemy, with a session for each thread, as Flask's documentation draws it.


class Base(orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str]


@pytest.fixture
def engine(tmp_path: pathlib.Path) -> cabc.Iterator[sqlalchemy.Engine]:
    """Return a database with a table of rows."""
    engine = sqlalchemy.create_engine(
        f"sqlite:///{tmp_path / 'orders.db'}", connect_args={"timeout": PATIENCE}
    )
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@WAYS
@LATE
@pytest.mark.parametrize("fails", [False, True])
def test_scoped_session(
    make_app: AppFactory,
    engine: sqlalchemy.Engine,
    way: cabc.Callable[[Work], None],
    late: bool,
    fails: bool,
) -> None:
    """Only a view commits its own rows, and only a task the task's."""
    app = make_app()
    session = orm.scoped_session(orm.sessionmaker(engine))
    app.teardown_appcontext(lambda exc: session.remove())

    if late:
        make_late(app)

    def audit() -> None:
        session.add(Row(name="audit"))
        session.commit()

    @app.get("/")
    def index() -> str:
        # Not flushed: the database would lock the task out.
        session.add(Row(name="order"))
        way(audit)

        if fails:
            raise LookupError

        session.commit()
        return "ok"

    for _ in range(5):
        app.test_client().get("/")

    with orm.Session(engine) as own:
        names = sorted(own.scalars(sqlalchemy.select(Row.name)))

    assert names == ["audit"] * 5 + ([] if fails else ["order"] * 5)


# Peewee, with a connection for each thread, and its own Flask integration.


@LATE
@pytest.mark.parametrize("extension_first", [False, True])
def test_peewee(
    make_app: AppFactory, tmp_path: pathlib.Path, late: bool, extension_first: bool
) -> None:
    """FlaskDB finds its thread's state as it left it, whatever tasks have queried."""
    app = Flask(__name__)
    threads_with_connection: list[bool] = []

    if extension_first:
        ApiTask(app)

    flask_db = FlaskDB(app, f"sqlite:///{tmp_path / 'rows.db'}")
    database: t.Any = flask_db.database

    class Note(flask_db.Model):  # type: ignore[misc, name-defined]
        name = peewee.TextField()

    with database:
        database.create_tables([Note])

    if not extension_first:
        ApiTask(app)

    if late:
        make_late(app)

    # What databases.md has an app do whose tasks use a connection for each thread.
    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        if not database.is_closed():
            database.close()

    @app.get("/<way>")
    def index(way: str) -> str:
        threads_with_connection.append(not database.is_closed())

        for start in (at_the_end, in_wait, in_block, in_scoped, by_result):
            if way == "task":
                start(functools.partial(Note.create, name="task"))

        assert not database.is_closed()
        Note.create(name="view")
        return "ok"

    client = app.test_client()
    assert [client.get(f"/{way}").status_code for way in ["task", "plain"] * 3] == (
        [200] * 6
    )
    assert threads_with_connection == [True] * 6

    with database:
        names = [note.name for note in Note.select()]

    assert (names.count("task"), names.count("view")) == (15, 6)


# sqlite3, whose connections are for the thread that made them.


@WAYS
@LATE
def test_connection_that_is_passed(
    make_app: AppFactory,
    tmp_path: pathlib.Path,
    way: cabc.Callable[[Work], None],
    late: bool,
) -> None:
    """A connection of the view is refused in each task, never in some (case 14)."""
    app = make_late(make_app()) if late else make_app()
    errors: list[str] = []

    def query(connection: sqlite3.Connection) -> None:
        try:
            connection.execute("select 1")
        except sqlite3.ProgrammingError as error:
            errors.append(str(error))

    @app.get("/")
    def index() -> str:
        connection = sqlite3.connect(tmp_path / "notes.db")
        way(functools.partial(query, connection))
        g.connection = connection
        return "ok"

    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        if "connection" in g:
            g.pop("connection").close()

    for number in range(1, 6):
        assert app.test_client().get("/").status_code == 200
        assert len(errors) == number
        assert "can only be used in that same thread" in errors[-1]


@WAYS
@LATE
def test_connection_of_its_own(
    make_app: AppFactory,
    tmp_path: pathlib.Path,
    way: cabc.Callable[[Work], None],
    late: bool,
) -> None:
    """With one on g, as in Flask's tutorial, each task and each view has its own."""
    app = make_late(make_app()) if late else make_app()
    made: list[sqlite3.Connection] = []
    values: list[int] = []

    def connect() -> sqlite3.Connection:
        if "connection" not in g:
            g.connection = sqlite3.connect(tmp_path / "notes.db")
            made.append(g.connection)

        return t.cast("sqlite3.Connection", g.connection)

    @app.teardown_appcontext
    def close(exc: BaseException | None) -> None:
        if "connection" in g:
            g.pop("connection").close()

    def query() -> None:
        values.append(connect().execute("select 1").fetchone()[0])

    @app.get("/")
    def index() -> str:
        query()
        way(query)
        query()
        return "ok"

    for _ in range(2):
        assert app.test_client().get("/").status_code == 200

    assert values == [1] * 6
    assert len(made) == 4
    # Some are of other threads, which have closed them.
    made.clear()


def test_sentry() -> None:
    """With Sentry's defaults, a thread of the pool keeps nothing of a request.

    A task that fails is one event, of its request, whether or not the view asks for it.
    """
    script = pathlib.Path(__file__).parent / "sentry_app.py"
    child = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    found = json.loads(child.stdout)
    assert found["threads"] == ["apitask_0"] * 3
    assert found["alive"] == [False] * 3
    assert found["events"] == [
        ["http://localhost/fails", "ZeroDivisionError"],
        ["http://localhost/fails/asked", "ZeroDivisionError"],
    ]
