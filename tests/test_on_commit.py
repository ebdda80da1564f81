from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import sqlite3
import threading
import typing as t
import weakref

import pytest
import sqlalchemy
from conftest import AppFactory
from conftest import PATIENCE
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import exc
from sqlalchemy import orm

from flask_apitask import ApiTask
from flask_apitask import current_scope
from flask_apitask import on_commit
from flask_apitask import open_scope
from flask_apitask import run
from flask_apitask import run_on_commit
from flask_apitask import run_on_success
from flask_apitask import wait
from flask_apitask.testing import record_tasks

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask_apitask.executor.future import TaskFuture
    from flask_apitask.executor.scope import TaskScope


class Base(orm.DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"

    name: orm.Mapped[str] = orm.mapped_column(primary_key=True)


def fail_to_find() -> t.NoReturn:
    """Fail, as a task."""
    raise LookupError


class Card(Base):
    """A row whose account is looked for at the commit, and not before."""

    __tablename__ = "cards"

    account: orm.Mapped[str] = orm.mapped_column(
        sqlalchemy.ForeignKey("accounts.name", deferrable=True, initially="DEFERRED"),
        primary_key=True,
    )


def check_foreign_keys(connection: t.Any, record: object) -> None:
    """Have SQLite do what PostgreSQL does anyway."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA foreign_keys = ON")


class Site:
    """An app whose views write rows, and with each a task that looks for them.

    :param kind: What the session is: Flask-SQLAlchemy's, one per thread as in Flask's
        documentation, or a plain one.
    """

    def __init__(self, url: str, kind: str) -> None:
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        ApiTask(self.app)
        self.db = SQLAlchemy(self.app)

        with self.app.app_context():
            self.engine = self.db.engine

        sqlalchemy.event.listen(self.engine, "connect", check_foreign_keys)
        Base.metadata.create_all(self.engine)
        # The rows that were committed, as a task saw them.
        self.seen: list[tuple[str, list[str]]] = []
        self.futures: list[TaskFuture[None]] = []
        makers = {
            "plain": orm.sessionmaker(self.engine),
            "per thread": orm.scoped_session(orm.sessionmaker(self.engine)),
        }
        make: t.Any = makers.get(kind, self.db.session)
        self.session: t.Any = make() if kind == "plain" else make

    def note(self, name: str) -> None:
        with self.engine.connect() as connection:
            names = sorted(connection.scalars(sqlalchemy.select(Account.name)))

        self.seen.append((name, names))

    def add(self, name: str) -> None:
        """Write a row, with a task that waits for its commit."""
        self.session.add(Account(name=name))
        self.session.flush()
        self.futures.append(run_on_commit(self.session, self.note, name))

    def get(self, view: cabc.Callable[[], object]) -> int:
        """Make a request to a view."""
        self.app.add_url_rule("/", "page", lambda: [view()] and "ok")
        return self.app.test_client().get("/").status_code

    def close(self) -> None:
        self.session.close()
        self.engine.dispose()
        Base.metadata.drop_all(self.engine)
        self.engine.dispose()


@pytest.fixture(params=["Flask-SQLAlchemy", "per thread", "plain"])
def kind(request: pytest.FixtureRequest) -> str:
    """Return what the session is."""
    return str(request.param)


@pytest.fixture
def sites(url: str, kind: str) -> cabc.Iterator[list[Site]]:
    """Return the app of a test, in a list: its threads go with the app."""
    made = [Site(url, kind)]
    yield made

    while made:
        with made[0].app.app_context():
            made.pop().close()


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return why tasks were dropped."""
    texts = [record.getMessage() for record in caplog.records]
    marks = [text.partition(" was dropped: ")[2].removesuffix(".") for text in texts]
    return [mark for mark in marks if mark]


def test_commit(sites: list[Site]) -> None:
    """Tasks start at the commit, not before, and see what it has committed."""
    [site] = sites

    def view() -> None:
        site.add("ada")
        wait(PATIENCE)
        assert site.seen == []

        with pytest.raises(RuntimeError, match="is deferred"):
            site.futures[0].result()

        site.session.commit()
        site.futures[0].result(PATIENCE)
        site.add("bob")
        assert site.seen == [("ada", ["ada"])]
        site.session.commit()

    assert site.get(view) == 200
    assert site.seen == [("ada", ["ada"]), ("bob", ["ada", "bob"])]


def test_call_before_the_transaction(sites: list[Site]) -> None:
    """A task deferred before there is a transaction waits for the next one."""
    [site] = sites

    def view() -> None:
        site.session.commit()
        site.futures.append(run_on_commit(site.session, site.note, "early"))
        # There is nothing to roll back yet.
        site.session.rollback()
        site.session.add(Account(name="ada"))
        site.session.commit()

    assert site.get(view) == 200
    assert site.seen == [("early", ["ada"])]


ENDS: dict[str, tuple[cabc.Callable[[t.Any], object] | None, str]] = {
    "rollback": (lambda session: session.rollback(), "the session was rolled back"),
    "close": (lambda session: session.close(), "the session was rolled back"),
    "end": (None, "its scope ended before the commit"),
}


@pytest.mark.parametrize("end", ENDS)
def test_no_commit(
    sites: list[Site], caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """Without a commit tasks are dropped, for good, and an INFO says why."""
    [site] = sites
    caplog.set_level(logging.INFO)
    act, reason = ENDS[end]

    def view() -> None:
        site.add("ada")

        if act is not None:
            act(site.session)
            assert site.futures[0].cancelled()
            site.session.commit()

    assert site.get(view) == 200
    assert site.futures[0].cancelled()
    assert reasons(caplog) == [reason]
    assert site.seen == []


@pytest.mark.parametrize("refused", ["flush", "commit"])
def test_commit_that_fails(
    sites: list[Site], caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """A commit that the database refuses does not count, however late it is refused."""
    [site] = sites
    caplog.set_level(logging.INFO)

    def view() -> None:
        site.add("ada")
        site.session.commit()
        site.session.expunge_all()
        run_on_commit(site.session, site.note, "twice")
        is_early = refused == "flush"
        site.session.add(Account(name="ada") if is_early else Card(account="bob"))

        with pytest.raises(exc.IntegrityError):
            site.session.commit()

        site.session.rollback()

    assert site.get(view) == 200
    assert site.seen == [("ada", ["ada"])]
    assert reasons(caplog) == ["the session was rolled back"]


def test_two_sessions(sites: list[Site]) -> None:
    """A task goes by its own session, and not by another one of the view."""
    [site] = sites

    def view() -> None:
        with orm.Session(site.engine) as other:
            other.begin()
            dropped = run_on_commit(other, site.note, "other")
            site.add("ada")
            site.session.commit()
            site.futures[0].result(PATIENCE)
            assert not dropped.done()

        assert dropped.cancelled()

    assert site.get(view) == 200
    assert site.seen == [("ada", ["ada"])]


def test_blocks(sites: list[Site]) -> None:
    """The end of a block that has begun a transaction is a commit, or a rollback."""
    [site] = sites

    def view() -> None:
        with orm.Session(site.engine) as session:
            early = run_on_commit(session, site.note, "early")

            with session.begin():
                session.add(Account(name="ada"))
                late = run_on_commit(session, site.note, "late")
                assert not early.done()

            with contextlib.suppress(LookupError), session.begin():
                dropped = run_on_commit(session, site.note, "dropped")
                fail_to_find()

        assert dropped.cancelled()
        concurrent.futures.wait([early, late], PATIENCE)

    assert site.get(view) == 200
    assert sorted(site.seen) == [("early", ["ada"]), ("late", ["ada"])]


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_savepoints(
    sites: list[Site], caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    """A savepoint that is rolled back takes its tasks along, and those within it."""
    [site] = sites
    caplog.set_level(logging.INFO)

    def view() -> None:
        site.add("kept")

        with site.session.begin_nested():
            site.add("released")

            with site.session.begin_nested():
                site.add("released twice")

            dropped = site.session.begin_nested()
            site.add("dropped")

            with site.session.begin_nested():
                site.add("released and dropped")

            assert not site.futures[-1].done()
            dropped.rollback()
            assert [future.done() for future in site.futures[3:]] == [True, True]

        site.add("after")
        assert site.seen == []
        getattr(site.session, outcome)()

    site.get(view)
    kept = ["after", "kept", "released", "released twice"]
    expected = [(name, kept) for name in kept] if outcome == "commit" else []
    assert sorted(site.seen) == expected
    savepoint = ["the savepoint was rolled back"] * 2
    session = ["the session was rolled back"] * (4 if outcome == "rollback" else 0)
    assert reasons(caplog) == savepoint + session


def test_outer_rollback_ends_savepoints(sites: list[Site]) -> None:
    """A rollback, or a commit, of all ends the savepoints that are still open."""
    [site] = sites

    def view() -> None:
        site.session.begin_nested()
        site.add("dropped")
        site.session.rollback()
        site.session.begin_nested()
        site.add("kept")
        site.session.commit()

    site.get(view)
    assert site.seen == [("kept", ["kept"])]
    assert site.futures[0].cancelled()


def test_failing_request(sites: list[Site]) -> None:
    """Only the commit counts, whatever becomes of the request."""
    [site] = sites

    def view() -> None:
        site.add("ada")
        site.session.commit()
        raise ZeroDivisionError

    assert site.get(view) == 500
    assert site.seen == [("ada", ["ada"])]


@pytest.mark.parametrize("where", ["context", "task", "no app"])
def test_without_scope(
    sites: list[Site], caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """Without a scope, what commits makes the calls, and no commit raises for them."""
    [site] = sites

    def work() -> None:
        threads = [threading.get_ident()]
        session = orm.Session(site.engine)
        session.add(Account(name="ada"))
        failing = run_on_commit(session, int, "no number")
        future = run_on_commit(session, site.note, "ada")
        run_on_commit(
            session, lambda: threads.append(threading.get_ident())
        ).add_done_callback(lambda _: threads.append(threading.get_ident()))
        assert site.seen == []
        session.commit()
        assert isinstance(failing.exception(), ValueError)
        assert future.done()
        assert site.seen == [("ada", ["ada"])]
        assert threads[1:] == threads[:1] * 2
        dropped = run_on_commit(session, int)
        session.begin()
        session.close()
        assert dropped.cancelled()

    if where == "no app":
        work()
    else:
        with site.app.app_context():
            if where == "context":
                work()
            else:
                with open_scope():
                    run(work).result(PATIENCE)

    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].startswith("Task 'builtins.int' failed")


def commit_in_task(app: Flask, task: cabc.Callable[[], object], status: int) -> None:
    """Make a request, in a task of which a commit calls another one."""

    def work() -> None:
        with orm.Session() as session, session.begin():
            run_on_commit(session, task)

    def view() -> tuple[str, int]:
        run(work).result(PATIENCE)
        return "", status

    app.add_url_rule("/", "page", view)
    assert app.test_client().get("/").status_code == status


@pytest.mark.parametrize("status", [200, 404])
def test_success_after_a_commit_in_a_task(make_app: AppFactory, status: int) -> None:
    """A task that a commit calls within a task defers others as that one does."""
    done: list[str] = []

    def put_off() -> None:
        run_on_success(done.append, "succeeded")

    commit_in_task(make_app(), put_off, status)
    assert done == (["succeeded"] if status == 200 else [])


def test_no_commit_in_a_task(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that a commit would call is dropped at the end of its request."""
    caplog.set_level(logging.INFO)
    app, done = make_app(), list[int]()

    with orm.Session() as session:

        @app.get("/")
        def page() -> str:
            run(run_on_commit, session, done.append, 1).result(PATIENCE)
            return ""

        assert app.test_client().get("/").status_code == 200
        assert "was dropped: its scope ended before the commit." in caplog.text

        with session.begin():
            pass

    assert done == []


@pytest.mark.usefixtures("without_gc")
def test_no_cycle_through_what_a_commit_calls(make_app: AppFactory) -> None:
    """Not even if it raises, in a task or without any scope."""
    app, arguments = make_app(), []

    class Argument: ...

    def fail(argument: Argument) -> t.NoReturn:
        raise LookupError

    def work() -> None:
        argument = Argument()
        arguments.append(weakref.ref(argument))

        with orm.Session() as session, session.begin():
            run_on_commit(session, fail, argument)

    # A record that a handler keeps has the traceback.
    logging.disable()

    try:
        with app.app_context(), open_scope():
            run(work)

        work()
    finally:
        logging.disable(logging.NOTSET)

    assert [argument() for argument in arguments] == [None, None]


def test_failure_after_a_commit_in_a_task(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """What a commit calls in a task fails the test of a request as that task does."""
    with pytest.raises(LookupError):
        commit_in_task(make_app(APITASK_PROPAGATE=True), fail_to_find, 200)

    assert len(caplog.records) == 1


def test_nested_request_in_a_task(make_app: AppFactory) -> None:
    """A request that a task makes is not part of the one that the task is in."""
    app = make_app()
    done: list[str] = []

    def work() -> None:
        with app.test_request_context(), orm.Session() as session:
            t.cast("TaskScope", current_scope()).shutdown()

            with session.begin():
                run_on_commit(session, run_on_success, done.append, "inner")

            assert done == ["inner"]

    app.add_url_rule("/", "page", lambda: [run(work).result(PATIENCE)] and ("", 404))
    assert app.test_client().get("/").status_code == 404


@pytest.mark.parametrize("name", ["no app", "with ApiTask", "without"])
def test_async_tasks(make_app: AppFactory, name: str) -> None:
    """A coroutine is run to its end, with an app and without."""
    apps = {"with ApiTask": make_app(), "without": Flask(__name__)}
    app = apps.get(name)

    async def half(number: int) -> float:
        await asyncio.sleep(0)
        return number / 2

    with contextlib.nullcontext() if app is None else app.app_context():
        with record_tasks() as tasks, orm.Session() as session, session.begin():
            future = run_on_commit(session, half, 3)

    assert future.result() == 1.5
    # What tells of a task is a signal of its app.
    assert [task.result for task in tasks] == ([] if app is None else [1.5])


def test_without_apitask(sites: list[Site], caplog: pytest.LogCaptureFixture) -> None:
    """In a request of an app without ApiTask, one WARNING says what is missing."""
    [site] = sites

    with Flask("shop").test_request_context(), orm.Session(site.engine) as session:
        session.add(Account(name="ada"))
        run_on_commit(session, site.note, "ada")
        run_on_commit(session, int)
        session.commit()

    assert site.seen == [("ada", ["ada"])]
    assert caplog.messages == [
        "A task was started in a request of 'shop', which has no ApiTask, so nothing"
        " ran in the background. Create one with ApiTask(app), or call its"
        " init_app(app)."
    ]


@pytest.mark.parametrize("session", [object(), orm.sessionmaker(), None])
def test_no_session(session: t.Any) -> None:
    """Anything but a session is refused, with what to pass instead."""
    with pytest.raises(TypeError, match=r"a SQLAlchemy session first, .*'db.session'"):
        run_on_commit(session, print)


def test_async_session() -> None:
    """An async session is refused, and the one that works is named."""
    session = pytest.importorskip("sqlalchemy.ext.asyncio").AsyncSession()

    with pytest.raises(TypeError, match="Pass its 'sync_session'"):
        run_on_commit(session, print)

    assert not run_on_commit(session.sync_session, print).done()


def test_mistakes_are_raised_at_the_call() -> None:
    """A task that can't be called is an error at once."""
    task: t.Any = 1

    with pytest.raises(TypeError, match="not 1"):
        run_on_commit(orm.Session(), task)


@pytest.mark.usefixtures("without_gc")
def test_nothing_is_kept() -> None:
    """A session listens once, keeps no task that is over, and goes with the last one.

    It goes as it would without this: by the count of its references.
    """
    session = orm.Session()
    app = Flask(__name__)
    ApiTask(app)

    class Argument: ...

    arguments, futures = [], []

    for _ in range(3):
        with app.app_context(), open_scope():
            argument = Argument()
            arguments.append(weakref.ref(argument))
            futures.append(run_on_commit(session, id, argument))
            del argument

    listeners = session.dispatch.after_transaction_end
    assert len(list(listeners)) == 1
    [[held]] = vars(session)["_flask_apitask_commits"]._held.values()
    assert held.future is futures[-1]
    assert [argument() for argument in arguments] == [None] * 3
    session_ref = weakref.ref(session)
    del session, listeners, held
    assert session_ref() is None


@pytest.mark.parametrize("savepoints", [False, True])
def test_many_tasks(monkeypatch: pytest.MonkeyPatch, savepoints: bool) -> None:
    """Deferring a task costs the same however many others wait."""
    number, looks = 100, 0

    class Counting(on_commit._Held):
        def __getattribute__(self, name: str) -> t.Any:
            nonlocal looks
            looks += 1
            return super().__getattribute__(name)

    monkeypatch.setattr(on_commit, "_Held", Counting)
    done: list[int] = []

    with orm.Session() as session, session.begin():
        for count in range(number):
            nested = session.begin_nested() if savepoints else contextlib.nullcontext()

            with nested:
                run_on_commit(session, done.append, count)

    assert done == list(range(number))
    assert looks < 10 * number


@pytest.fixture
def engine() -> cabc.Iterator[sqlalchemy.Engine]:
    """Return an engine for a database in memory."""
    made = sqlalchemy.create_engine("sqlite://")
    yield made
    made.dispose()


def test_shared_info(engine: sqlalchemy.Engine) -> None:
    """Sessions may have the same ``info``, and each has its own tasks."""
    done: list[str] = []

    with orm.Session(engine) as session, session.begin():
        run_on_commit(session, done.append, "outer")

        with orm.Session(engine, info=session.info) as other, other.begin():
            run_on_commit(other, done.append, "inner")

        assert done == ["inner"]

    assert done == ["inner", "outer"]


@pytest.mark.parametrize("event", [None, "after_commit", "after_rollback"])
def test_cleared_info(engine: sqlalchemy.Engine, event: str | None) -> None:
    """The app may clear what it keeps in the session's ``info``."""
    done: list[str] = []

    with orm.Session(engine) as session:
        if event is not None:
            sqlalchemy.event.listen(session, event, lambda _: session.info.clear())

        for name, end in ("a", session.commit), ("b", session.rollback):
            for _ in range(2):
                session.execute(sqlalchemy.text("SELECT 1"))
                run_on_commit(session, done.append, name)
                session.info.clear()
                end()

    assert done == ["a", "a"]


def test_other_sessions_are_left_alone() -> None:
    """Only sessions that have tasks get listeners."""
    session, other = orm.Session(), orm.Session()
    run_on_commit(session, int)
    assert list(other.dispatch.after_commit) == []
    assert other.info == {}


def test_commit_by_another_thread(sites: list[Site]) -> None:
    """A commit races with the end of the scope: the task runs, or it is dropped."""
    [site] = sites

    for _ in range(50):
        race_commit(site)


def race_commit(site: Site) -> None:
    """Have a thread commit while the scope of a task ends."""
    session = orm.Session(site.engine)
    started = threading.Event()
    ran: list[int] = []

    def commit() -> None:
        started.set()
        session.commit()

    thread = threading.Thread(target=commit)

    with site.app.app_context():
        with open_scope():
            future = run_on_commit(session, ran.append, 1)
            thread.start()
            assert started.wait(PATIENCE)

        assert future.done()
        assert ran == ([] if future.cancelled() else [1])

    thread.join(PATIENCE)
    session.close()
