from __future__ import annotations

import collections
import concurrent.futures
import functools
import pathlib
import threading
import typing as t

import pytest
import sqlalchemy
from conftest import PATIENCE
from flask import Flask
from flask_mail import Mail
from flask_mail import Message
from flask_sqlalchemy import SQLAlchemy
from late_threads import make_late
from mailbox_server import Mailbox
from sqlalchemy import exc
from sqlalchemy import orm

from flask_apitask import ApiTask
from flask_apitask import run
from flask_apitask import scoped
from flask_apitask import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Whether a thread is free, or a scope that is waited for needs one more.
BOTH = pytest.mark.parametrize("late", [False, True], ids=["free", "full"])
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "databases.md"


class Base(orm.DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    name: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    visits: orm.Mapped[int] = orm.mapped_column(default=0)


class Site:
    """An app with a table of users, of which there is one at first.

    :param late: Take the threads from the app: a task then runs while the request
        waits, and at no other time.
    :param database_first: Whether ``SQLAlchemy`` comes to the app before ``ApiTask``.
    :param release: Whether the function for ``teardown_request`` that the documentation
        recommends comes ``"before"`` ``ApiTask``, or ``"after"`` it.
    :param lock_timeout: Seconds that a statement waits for a lock of the database.
    """

    def __init__(
        self,
        url: str,
        *,
        late: bool = False,
        database_first: bool = False,
        release: str | None = None,
        lock_timeout: float = PATIENCE,
        pool: dict[str, t.Any] | None = None,
        **config: t.Any,
    ) -> None:
        if url.startswith("sqlite"):
            arguments: dict[str, t.Any] = {"timeout": lock_timeout}
        else:
            arguments = {"options": f"-c lock_timeout={lock_timeout * 1000:.0f}"}

        self.app = Flask(__name__)
        self.app.config.update(config, SQLALCHEMY_DATABASE_URI=url)
        self.db = SQLAlchemy(engine_options={"connect_args": arguments, **(pool or {})})
        start = [ApiTask().init_app, self.db.init_app]

        if release == "before":
            self.app.teardown_request(self.release_connection)

        for init_app in reversed(start) if database_first else start:
            init_app(self.app)

        self._view: cabc.Callable[[], object] = str
        self.app.add_url_rule("/", "index", lambda: [self._view()] and "ok")
        # Comes before the wait, and after the next one: the last comes first.
        self.waiting = threading.Semaphore(0)
        self.app.teardown_request(lambda error: self.waiting.release())

        if release == "after":
            self.app.teardown_request(self.release_connection)

        if late:
            make_late(self.app)

        with self.app.app_context():
            self.engine = self.db.engine
            Base.metadata.create_all(self.engine)
            self.add("ada")
            self.db.session.commit()

    def get(self, view: cabc.Callable[[], object]) -> int:
        """Make a request to a view, and return the status of its response."""
        self._view = view
        # Buffered, so that the response is closed as a server does it.
        return self.app.test_client().get("/", buffered=True).status_code

    def add(self, name: str) -> None:
        self.db.session.add(User(name=name))
        self.db.session.flush()

    def find(self, name: str = "ada") -> User:
        return self.db.session.get_one(User, name)

    def visit(self) -> None:
        """Count a visit, with an ``UPDATE`` that is not committed yet."""
        self.find().visits += 1
        self.db.session.flush()

    def names(self) -> list[str]:
        """Return the names that are committed."""
        with self.engine.connect() as connection:
            return sorted(connection.scalars(sqlalchemy.select(User.name)))

    def checked_out(self) -> int:
        """Return how many connections are not in the pool."""
        return t.cast("sqlalchemy.QueuePool", self.engine.pool).checkedout()

    def release_connection(self, error: BaseException | None = None) -> None:
        """Do what the documentation has an app do at the end of its requests."""
        self.db.session.remove()

    def close(self) -> None:
        # First of all, so that no lock of a connection left behind is in the way.
        self.engine.dispose()
        Base.metadata.drop_all(self.engine)
        self.engine.dispose()


SiteFactory = t.Callable[..., Site]


@pytest.fixture
def make_site(url: str) -> cabc.Iterator[SiteFactory]:
    """Return what makes the app of a test."""
    made: list[Site] = []

    def factory(**options: t.Any) -> Site:
        made.append(Site(url, **options))
        return made[-1]

    yield factory

    # What made them is kept for longer than threads may live on.
    while made:
        made.pop().close()


@BOTH
def test_task_has_a_session_of_its_own(make_site: SiteFactory, late: bool) -> None:
    """A task has its own database session, which is gone after it (behaviour 12)."""
    site = make_site(late=late)
    sessions: list[object] = []

    def work(name: str) -> None:
        sessions.append(site.db.session())
        site.add(name)
        site.db.session.commit()

    def view() -> None:
        sessions.append(site.db.session())
        site.add("request")
        site.db.session.rollback()
        run(work, "first")
        wait()
        run(work, "second")
        wait()
        assert site.db.session() is sessions[0]

    assert site.get(view) == 200
    assert site.names() == ["ada", "first", "second"]
    assert len({id(session) for session in sessions}) == len(sessions) == 3
    assert site.checked_out() == 0


@BOTH
def test_failing_task_leaves_no_transaction(make_site: SiteFactory, late: bool) -> None:
    """A task that fails halfway keeps no connection and no row (behaviour 12)."""
    site = make_site(late=late)

    def work() -> None:
        site.add("halfway")
        raise LookupError

    def view() -> None:
        run(work)
        wait()
        assert site.checked_out() == 0
        site.add("request")
        site.db.session.commit()

    assert site.get(view) == 200
    assert site.names() == ["ada", "request"]


@BOTH
def test_failing_statement_breaks_no_other_session(
    make_site: SiteFactory, late: bool
) -> None:
    """A statement that fails in a task is rolled back in its session alone."""
    site = make_site(late=late)
    futures: list[concurrent.futures.Future[None]] = []

    def view() -> None:
        site.find()
        futures.append(run(site.add, "ada"))
        wait()
        # The transaction of the request goes on.
        site.add("request")
        site.db.session.commit()

    assert site.get(view) == 200
    assert site.names() == ["ada", "request"]
    assert isinstance(futures[0].exception(PATIENCE), exc.IntegrityError)


def test_failing_statement_does_not_break_the_next_task(make_site: SiteFactory) -> None:
    """The task that comes next on the thread of a failed one has a sound session."""
    site = make_site(APITASK_POOL_SIZE=1)
    threads: list[int] = []

    def work(name: str) -> None:
        threads.append(threading.get_ident())
        site.add(name)
        site.db.session.commit()

    def view() -> None:
        # One by one, so on the only thread.
        assert isinstance(run(work, "ada").exception(PATIENCE), exc.IntegrityError)
        run(work, "bob").result(PATIENCE)

    assert site.get(view) == 200
    assert site.names() == ["ada", "bob"]
    assert len(threads) == 2
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_tasks_write_at_once(make_site: SiteFactory) -> None:
    """Two tasks that write at the same time wait for each other, and both succeed."""
    site = make_site()
    meeting = threading.Barrier(2)

    def work(letter: str) -> None:
        for number in range(5):
            meeting.wait(PATIENCE)
            site.add(f"{letter}{number}")
            site.db.session.commit()

    def view() -> None:
        for future in [run(work, "b"), run(work, "c")]:
            future.result(PATIENCE)

    assert site.get(view) == 200
    assert site.names() == ["ada", *(f"{a}{n}" for a in "bc" for n in range(5))]


def test_view_that_has_not_committed_locks_out_its_task(make_site: SiteFactory) -> None:
    """A task waits in vain for a row that its own request has not committed.

    The request waits for the task, which no database can know. So it is the limit of
    the database that ends it.
    """
    site = make_site(late=True, lock_timeout=0.1)
    futures: list[concurrent.futures.Future[None]] = []

    def view() -> None:
        site.visit()
        futures.append(run(site.visit))

    assert site.get(view) == 200
    error = futures[0].exception(PATIENCE)
    assert isinstance(error, exc.OperationalError)
    sqlite = site.engine.dialect.name == "sqlite"
    expected = "database is locked" if sqlite else "due to lock timeout"
    assert expected in str(error)


@pytest.mark.parametrize("released", ["commit", "release_connection"])
def test_view_that_has_let_go_does_not_lock_out_its_task(
    make_site: SiteFactory, released: str
) -> None:
    """A task writes what its request wrote before it, if that has let go of it."""
    release = "after" if released == "release_connection" else None
    site = make_site(late=True, lock_timeout=0.1, release=release)
    visits: list[int] = []

    def work() -> None:
        site.visit()
        visits.append(site.find().visits)

    def view() -> None:
        site.visit()

        if released == "commit":
            site.db.session.commit()

        run(work)

    assert site.get(view) == 200
    # What was not committed is rolled back, as it is at the end of any request.
    assert visits == [2 if released == "commit" else 1]


def test_object_is_bound_to_the_session_of_the_request(make_site: SiteFactory) -> None:
    """An object passed to a task is read, if it has expired, by the view's session."""
    site = make_site(late=True)
    seen: list[object] = []

    def work(user: User) -> None:
        assert site.checked_out() == 0
        seen.append(user.visits)
        # A connection for the thread of the task, and not by the task's session.
        seen.append(site.checked_out())
        seen.append(site.db.session().in_transaction())

        with pytest.raises(exc.InvalidRequestError, match="already attached to sess"):
            site.db.session.add(user)

        seen.append("refused")

    def view() -> None:
        user = site.find()
        site.db.session.commit()
        run(work, user)

    assert site.get(view) == 200
    assert seen == [0, 1, False, "refused"]


def test_object_whose_session_is_gone(make_site: SiteFactory) -> None:
    """An object passed to a task has, without its session, only what was loaded."""
    site = make_site(late=True, release="after")
    futures: dict[bool, concurrent.futures.Future[int]] = {}

    def work(user: User) -> int:
        return user.visits

    def view(*, commit: bool) -> None:
        user = site.find()

        if commit:
            site.db.session.commit()

        futures[commit] = run(work, user)

    assert site.get(functools.partial(view, commit=False)) == 200
    assert site.get(functools.partial(view, commit=True)) == 200
    assert futures[False].result(PATIENCE) == 0
    assert isinstance(futures[True].exception(PATIENCE), orm.exc.DetachedInstanceError)


def no_query(site: Site, task: cabc.Callable[[], None]) -> None:
    """makes no query"""
    run(task)


def read(site: Site, task: cabc.Callable[[], None]) -> None:
    """reads"""
    site.find()
    run(task)


def write(site: Site, task: cabc.Callable[[], None]) -> None:
    """writes, and does not commit"""
    site.visit()
    run(task)


def fail(site: Site, task: cabc.Callable[[], None]) -> None:
    """reads, and raises"""
    site.find()
    run(task)
    raise LookupError


def commit(site: Site, task: cabc.Callable[[], None]) -> None:
    """writes and commits"""
    site.visit()
    run(task)
    site.db.session.commit()


def close(site: Site, task: cabc.Callable[[], None]) -> None:
    """reads, and closes the session"""
    site.find()
    run(task)
    site.db.session.close()


def commit_then_read(site: Site, task: cabc.Callable[[], None]) -> None:
    """commits, and reads an attribute after that"""
    user = site.find()
    site.visit()
    site.db.session.commit()
    run(task)
    assert user.name == "ada"


def read_then_wait(site: Site, task: cabc.Callable[[], None]) -> None:
    """reads, and calls `wait()`"""
    site.find()
    run(task)
    wait()


def commit_then_wait(site: Site, task: cabc.Callable[[], None]) -> None:
    """commits, and calls `wait()`"""
    site.visit()
    site.db.session.commit()
    run(task)
    wait()


@scoped
def read_scoped(site: Site, task: cabc.Callable[[], None]) -> None:
    """reads, in `@scoped`"""
    read(site, task)


@scoped
def commit_scoped(site: Site, task: cabc.Callable[[], None]) -> None:
    """commits, in `@scoped`"""
    commit(site, task)


# Each row of the table in the documentation speaks of one of these.
VIEWS = {
    str(view.__doc__): view
    for view in (
        no_query,
        read,
        write,
        fail,
        commit,
        close,
        commit_then_read,
        read_then_wait,
        commit_then_wait,
        read_scoped,
        commit_scoped,
    )
}


def read_table() -> dict[str, dict[str, int]]:
    """Return the columns of the table in the documentation, by their headings."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line[:1] == "|"]
    heading, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    ]
    return {
        name: {row[0]: int(row[number]) for row in rows}
        for number, name in enumerate(heading)
        if number
    }


@pytest.mark.parametrize("database_first", [False, True])
@pytest.mark.parametrize("column", read_table())
def test_checked_out_connections(
    make_site: SiteFactory, column: str, database_first: bool
) -> None:
    """The documented number of connections is out while a request waits."""
    options: dict[str, t.Any] = {"database_first": database_first}

    if "APITASK_WAIT" in column:
        options["APITASK_WAIT"] = "close"
    elif "release_connection" in column:
        options["release"] = "after"

    site = make_site(late=True, **options)
    measured: dict[str, list[int]] = {}

    for name, view in VIEWS.items():
        counts = measured[name] = []
        task = functools.partial(lambda to: to.append(site.checked_out()), counts)
        site.get(functools.partial(view, site, task))
        assert site.checked_out() == 0

    expected = {name: [count] for name, count in read_table()[column].items()}
    assert measured == expected


@pytest.mark.parametrize("release", [None, "before", "after"])
def test_request_starves_its_own_task(
    make_site: SiteFactory, release: str | None
) -> None:
    """A task needs a connection of its own, next to that which the view keeps.

    The function that gives that back helps if it is registered after ``ApiTask(app)``:
    Flask calls it before the wait, and one that was registered earlier after it.
    """
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    site = make_site(late=True, release=release, pool=pool)
    futures: list[concurrent.futures.Future[User]] = []

    def view() -> None:
        site.find()
        futures.append(run(site.find))

    assert site.get(view) == 200
    error = futures[0].exception(PATIENCE)

    if release == "after":
        assert error is None
    else:
        assert isinstance(error, exc.TimeoutError)
        assert "QueuePool limit of size 1" in str(error)


class Load(t.NamedTuple):
    """What became of some requests whose mail is held up by its server."""

    statuses: dict[int, int]
    held: set[int]
    delivered: int


def send_while_mail_is_slow(make_site: SiteFactory, order: str) -> Load:
    """Make six requests at once, with two connections to the database.

    No mail is answered before all requests are waiting for theirs, or have failed.
    """
    with Mailbox() as mailbox:
        mailbox.lock()
        site = make_site(
            # Where there is none to wait for, it does not matter how long one waits.
            pool={
                "pool_size": 2,
                "max_overflow": 0,
                "pool_timeout": 0.2 if order == "naive" else PATIENCE,
            },
            MAIL_PORT=mailbox.port,
            MAIL_DEFAULT_SENDER="shop@example.org",
            APITASK_MAIL_BACKGROUND=True,
            APITASK_MAIL_CONNECTIONS=6,
            APITASK_MAIL_KEEPALIVE=0,
            release="after" if order == "release_connection" else None,
        )
        mail = Mail(site.app)

        def view() -> None:
            recipient = f"{site.find().name}@example.org"

            if order == "commit":
                site.db.session.commit()

            mail.send(Message("Welcome", [recipient], body="Hello."))

        with concurrent.futures.ThreadPoolExecutor(6) as executor:
            requests = [executor.submit(site.get, view) for _ in range(6)]

            try:
                for _ in requests:
                    assert site.waiting.acquire(timeout=PATIENCE)

                held = count_held(site)
            finally:
                mailbox.unlock()

            statuses = [request.result(PATIENCE) for request in requests]

    return Load(dict(collections.Counter(statuses)), held, len(mailbox.messages))


def count_held(site: Site) -> set[int]:
    """Count the connections in use, and have PostgreSQL count its idle transactions.

    They are one number if both are right.
    """
    counts = {site.checked_out()}

    if site.engine.dialect.name == "postgresql":
        idle = "SELECT count(*) FROM pg_stat_activity WHERE state='idle in transaction'"
        url = site.engine.url
        # Not through the pool, which is what is measured.
        outside = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)

        with outside.connect() as connection:
            counts.add(connection.execute(sqlalchemy.text(idle)).scalar_one())

    return counts


def test_slow_mail_exhausts_the_pool(make_site: SiteFactory) -> None:
    """Requests that keep a connection while waiting for mail leave none for others."""
    load = send_while_mail_is_slow(make_site, "naive")
    assert load == Load({200: 2, 500: 4}, held={2}, delivered=2)


@pytest.mark.parametrize("order", ["commit", "release_connection"])
def test_slow_mail_does_not_exhaust_the_pool(
    make_site: SiteFactory, order: str
) -> None:
    """Requests that give theirs back hold no connection while they wait for mail."""
    load = send_while_mail_is_slow(make_site, order)
    assert load == Load({200: 6}, held={0}, delivered=6)
