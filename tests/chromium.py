from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import tempfile
import typing as t

from child_process import ChildProcess
from child_process import PATIENCE

if t.TYPE_CHECKING:
    import collections.abc as cabc

DRIVER = shutil.which("chromedriver")
# No sandbox, as root can't have one in a container; and no host but this one.
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# The key of an element's number (https://www.w3.org/TR/webdriver2/#elements).
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


@contextlib.contextmanager
def start_chromium() -> cabc.Iterator[Chromium]:
    """Start a browser for a block."""
    command = [DRIVER or "chromedriver", "--port=0"]

    # They leave files behind. A process of the browser may still be writing some.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        ChildProcess(command, {"TMPDIR": directory}) as driver,
    ):
        port = int(driver.expect(r"started successfully on port (\d+)"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

        with contextlib.closing(connection):
            chromium = Chromium(connection)

            try:
                yield chromium
            finally:
                chromium.close()


class Chromium:
    """A real browser, driven by the WebDriver protocol of the W3C.

    What takes a selector waits for such an element to be there. A click on what leads
    to another page does not wait for it: wait for an element that only that one has.

    :param connection: To chromedriver.
    """

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        options = {
            "goog:chromeOptions": {"args": _ARGUMENTS},
            "timeouts": {"implicit": int(PATIENCE * 500)},
        }
        capabilities = {"capabilities": {"alwaysMatch": options}}
        session = self._command("POST", "/session", capabilities)["sessionId"]
        self._session = f"/session/{session}"

    def close(self) -> None:
        """End the browser."""
        self._command("DELETE", self._session)

    def open(self, url: str) -> None:
        """Load a page."""
        self._command("POST", f"{self._session}/url", {"url": url})

    def reload(self) -> None:
        """Load the page again, as the reload button does."""
        self._command("POST", f"{self._session}/refresh", {})

    def click(self, selector: str) -> None:
        """Click on an element."""
        self._command("POST", f"{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Enter text into a field that is empty."""
        self._command("POST", f"{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """Return the text of an element as it is rendered."""
        return str(self._command("GET", f"{self._find(selector)}/text"))

    def label(self, selector: str) -> str:
        """Return the name of an element that assistive technology is told."""
        return str(self._command("GET", f"{self._find(selector)}/computedlabel"))

    def screenshot(self) -> bytes:
        """Return a picture of the viewport, as PNG."""
        picture = self._command("GET", f"{self._session}/screenshot")
        return base64.b64decode(picture)

    def wait_for(self, selector: str) -> None:
        """Wait for an element to be there."""
        self._find(selector)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the viewport, which can be narrower than a window."""
        metrics = {"width": width, "height": height}
        parameters = {**metrics, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": parameters}
        self._command("POST", f"{self._session}/goog/cdp/execute", command)

    def prefer(self, scheme: str) -> None:
        """Ask pages for ``"light"`` or ``"dark"`` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command = {
            "cmd": "Emulation.setEmulatedMedia",
            "params": {"features": features},
        }
        self._command("POST", f"{self._session}/goog/cdp/execute", command)

    def evaluate(self, expression: str) -> t.Any:
        """Return the value of an expression in JavaScript."""
        script = {"script": f"return {expression}", "args": []}
        return self._command("POST", f"{self._session}/execute/sync", script)

    def _find(self, selector: str) -> str:
        query = {"using": "css selector", "value": selector}
        element = self._command("POST", f"{self._session}/element", query)
        return f"{self._session}/element/{element[_ELEMENT]}"

    def _command(self, method: str, path: str, body: object = None) -> t.Any:
        text = None if body is None else json.dumps(body)
        self._connection.request(method, path, text)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer["value"]["message"]
        return answer["value"]
