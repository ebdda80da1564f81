from __future__ import annotations

import ast
import asyncio
import io
import logging
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import types
import typing as t

import pytest
from brokers import find_port
from child_process import ChildProcess
from conftest import PATIENCE
from conftest import wait_until
from mailbox_server import Mailbox

if t.TYPE_CHECKING:
    import collections.abc as cabc

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.md"
ADDRESS = "127.0.0.1:5000"
LAST = "Step 7: Test it"


class Section(t.NamedTuple):
    """The files as they are after a section of the page, and what it shows of a run."""

    files: dict[str, str]
    #: Each command for ``curl`` with its output.
    calls: list[tuple[str, str]]
    #: Lines of a log.
    texts: list[str]

    @property
    def seconds(self) -> int:
        """The seconds that it shows for the last command."""
        match = re.search(r"^(\d)\.\d+ s$", self.calls[-1][1], re.M)
        assert match is not None
        return int(match[1])


def read_page() -> dict[str, Section]:
    """Type all blocks in order, and return the sections by their headings."""
    files: dict[str, str] = {}
    sections = {}

    for text in re.split("^## ", PAGE.read_text("utf-8"), flags=re.M)[1:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)

        for code in [code for language, code in blocks if language == "python"]:
            name = re.match(r"# (\w+\.py)\n", code)

            if name is None:
                files["app.py"] = type_in(files.get("app.py", ""), code)
            else:
                files[name[1]] = code

        console = "".join(code for language, code in blocks if language == "console")
        calls = re.findall(r"^\$ (curl .*)\n((?:[^$].*\n)*)", console, re.M)
        texts = [code.strip() for language, code in blocks if language == "text"]
        sections[text.partition("\n")[0]] = Section(dict(files), calls, texts)

    return sections


def type_in(source: str, block: str) -> str:
    """Put the statements of a block into a file in the way that the page asks for."""
    file, statements = ast.parse(source).body, ast.parse(block).body
    names = [name_statement(statement) for statement in file]
    known = [names.index(n) for n in map(name_statement, statements) if n in names]
    place = max(known) + 1 if known else len(file)

    for statement in reversed(statements):
        name = name_statement(statement)

        if name in names:
            place = names.index(name)
            file[place] = statement
        else:
            file.insert(place, statement)
            names.insert(place, name)

    return ast.unparse(ast.Module(file, []))


def name_statement(statement: ast.stmt) -> str:
    """Return what a statement has in common with one that replaces it."""
    start = re.split(r"\(| = | import ", ast.unparse(statement))[0]
    name: str = getattr(statement, "name", start)
    return name


SECTIONS = read_page()


class Meeting:
    """Lets slow things go on only in groups that are slow at the same time.

    :param sizes: How many there are in each group.
    """

    def __init__(self, *sizes: int) -> None:
        groups = [threading.Barrier(size) for size in sizes]
        self._places = iter([group for group in groups for _ in range(group.parties)])
        # Guards the iterator.
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        """Take part in place of sleeping."""
        with self._lock:
            group = next(self._places)

        group.wait(PATIENCE)

    async def sleep_async(self, seconds: float) -> None:
        """Do it in place of :func:`asyncio.sleep`."""
        await asyncio.to_thread(self.sleep, seconds)


class SlowMailbox(Mailbox):
    """Takes a mail when the mail server of the page has done so."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        server = execute("slow_mail", SECTIONS["A slow mail server"].files)
        server.asyncio = types.SimpleNamespace(sleep=meeting.sleep_async)
        self._server = server.SlowMail(io.StringIO())

    async def handle_DATA(self, *args: t.Any) -> str:
        reply: str = await self._server.handle_DATA(*args)
        assert reply == "250 OK"
        return await super().handle_DATA(*args)


def execute(name: str, files: cabc.Mapping[str, str]) -> t.Any:
    """Return a typed file as a module."""
    module = types.ModuleType(name)
    exec(compile(files[f"{name}.py"], f"{name}.py", "exec"), vars(module))
    return module


class Running(t.NamedTuple):
    """The app of a section, with its mail server."""

    app: t.Any
    mailbox: Mailbox
    meeting: Meeting

    def sign_up(self, **form: str) -> t.Any:
        """Do what the command for ``curl`` does, and leave the response open."""
        form = {"email": "ada@example.org", **form}
        return self.app.test_client().post("/signup", data=form)


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch,
) -> cabc.Iterator[cabc.Callable[..., Running]]:
    """Return what starts the app of a section, with its slow things in groups."""
    monkeypatch.setenv("FLASK_APITASK_MAIL_KEEPALIVE", "0")
    mailboxes: list[Mailbox] = []

    def start_app(title: str, *sizes: int) -> Running:
        meeting = Meeting(*sizes)
        mailboxes.append(SlowMailbox(meeting).__enter__())
        monkeypatch.setenv("FLASK_MAIL_PORT", str(mailboxes[-1].port))
        module = execute("app", SECTIONS[title].files)
        module.time = types.SimpleNamespace(sleep=meeting.sleep)
        return Running(module.app, mailboxes[-1], meeting)

    yield start_app

    for mailbox in mailboxes:
        mailbox.__exit__()


def find_title(number: int) -> str:
    """Return the heading of a step."""
    (title,) = [title for title in SECTIONS if title.startswith(f"Step {number}:")]
    return title


@pytest.mark.parametrize(
    ("number", "sizes"), [(1, [1, 1]), (2, [2]), (3, [3]), (4, [2, 3])]
)
def test_all_is_done_when_the_response_is_there(
    start: cabc.Callable[..., Running],
    number: int,
    sizes: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is slow overlaps so that it takes as many seconds as the page shows."""
    title = find_title(number)
    running = start(title, *sizes)
    response = running.sign_up()
    assert response.status_code == 201
    assert SECTIONS[title].calls[0][1].startswith(response.text)
    assert SECTIONS[title].seconds == len(sizes)
    assert sorted(running.mailbox.subjects) == ["A new member", "Welcome"]
    hooks = ["webhook: ada@example.org has signed up"] if number > 2 else []
    assert caplog.messages == hooks


@pytest.mark.parametrize(("number", "form"), [(5, {}), (6, {"city": "Turin"})])
def test_response_is_there_first(
    start: cabc.Callable[..., Running], number: int, form: dict[str, str]
) -> None:
    """The client waits for the results that the view needs, and not for the mails."""
    title = find_title(number)
    running = start(title, 2, 4)
    response = running.sign_up(**form)
    assert SECTIONS[title].calls[-1][1].startswith(response.text)
    assert SECTIONS[title].seconds == 1
    assert running.mailbox.subjects == []
    # Only now may the second group go on: this is the fourth of it.
    fourth = threading.Thread(target=running.meeting.sleep, args=[1])
    fourth.start()
    response.close()
    fourth.join(PATIENCE)
    assert sorted(running.mailbox.subjects) == ["A new member", "Welcome"]


def test_nothing_goes_out_if_it_is_refused(
    start: cabc.Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """A sign-up that is refused sends no mail, and the log says what the page says."""
    caplog.set_level(logging.INFO)
    section = SECTIONS[find_title(6)]
    running = start(find_title(6), 2)

    with running.sign_up() as response:
        assert response.status_code == 422
        assert section.calls[0][1].startswith(response.text)

    assert running.mailbox.subjects == []
    assert set(section.texts) <= set(caplog.messages)
    assert len(caplog.messages) == 3


def test_mail_server_is_down(
    start: cabc.Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a mail server the response is the same, and each mail is an ERROR."""
    running = start(find_title(2))
    running.app.extensions["mail"].port = find_port()
    assert running.sign_up().status_code == 201
    (shown,) = SECTIONS[find_title(2)].texts
    pattern = re.escape(shown).replace(r"0\.001", r"\d+\.\d{3}")
    assert len(caplog.records) == 2
    assert all(re.fullmatch(pattern, message) for message in caplog.messages)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_mail_server_is_down_for_plain_flask_mail(
    start: cabc.Callable[..., Running],
) -> None:
    """With Flask-Mail alone, it is an internal server error."""
    running = start(find_title(1))
    running.app.extensions["mail"].port = find_port()
    assert running.sign_up().status_code == 500


@pytest.mark.parametrize(
    ("number", "outcome"), [(5, "1 failed, 1 passed"), (7, "2 passed")]
)
def test_tests_of_the_page(tmp_path: pathlib.Path, number: int, outcome: str) -> None:
    """They pass after the last step, and fail before mail waits for success."""
    app = SECTIONS[find_title(number)].files["app.py"]
    tmp_path.joinpath("app.py").write_text(app)
    tmp_path.joinpath("test_app.py").write_text(SECTIONS[LAST].files["test_app.py"])
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f" {outcome} in " in finished.stdout, finished.stdout


def test_whole_file_is_what_was_typed() -> None:
    """The last block of the page is what the steps make of the file."""
    typed, whole = [
        SECTIONS[title].files["app.py"] for title in (LAST, "The whole file")
    ]
    assert typed == ast.unparse(ast.parse(whole))


@pytest.mark.speed
def test_commands_show_what_the_page_says(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands, run as they stand there, take the seconds that the page shows."""
    if shutil.which("curl") is None:
        assert os.environ.get("APITASK_REQUIRE_SERVICES") != "1"
        pytest.skip("curl is not installed (Debian: curl)")

    monkeypatch.chdir(tmp_path)
    mail, port = find_port(), find_port()
    tmp_path.joinpath("slow_mail.py").write_text(SECTIONS[LAST].files["slow_mail.py"])
    python = [sys.executable, "-m"]
    listen = ["-n", "-l", f"127.0.0.1:{mail}", "-c", "slow_mail.SlowMail"]

    with ChildProcess([*python, "aiosmtpd", *listen]):
        wait_until(lambda: is_open(mail))

        for section in [section for section in SECTIONS.values() if section.calls]:
            tmp_path.joinpath("app.py").write_text(section.files["app.py"])
            flask = [*python, "flask", "run", "--debug", "--no-reload", "-p", str(port)]

            with ChildProcess(flask, {"FLASK_MAIL_PORT": str(mail)}) as server:
                url = server.expect(r"Running on (http://127\.0\.0\.1:\d+)")

                for command, shown in section.calls:
                    words = shlex.split(command.replace(ADDRESS, url))
                    got = subprocess.check_output([*words, "-s"], text=True, timeout=60)
                    result = re.fullmatch(r"(.*\n)(\d\.\d+ s\n)", got, re.S)
                    assert result is not None
                    assert shown.startswith(result[1])
                    assert 0.99 < float(result[2].split()[0]) / section.seconds < 1.5

            # A debug server shows an INFO, too.
            dropped = [text for text in section.texts if "dropped" in text]
            assert all(text in server.output for text in dropped)


def is_open(port: int) -> bool:
    """Tell whether a server listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
