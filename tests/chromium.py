"""A headless Chromium, driven through its DevTools protocol: what a page does and looks like."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect
from websockets.sync.connection import Connection

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS_TO_START, SECONDS_TO_ANSWER = 60.0, 60.0
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, " ": 32, "Enter": 13}


def find() -> str | None:
    """The program; None where none is installed."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. What it says on its console and asks of the network is kept.

    Attributes:
        errors: of the console, and exceptions, in words.
        requests: URLs other than the page's own and what it carries itself.
    """

    def __init__(self, socket: Connection) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._address = ""
        self._is_loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS_TO_ANSWER))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message)

    def resize(self, width: int, height: int = 900, *, dark: bool = False, scale: int = 1) -> Self:
        """As a screen of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def open(self, address: str) -> Self:
        """Go there and wait until it is loaded."""
        self._address, self._is_loaded = address, False
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._is_loaded:
            assert time.monotonic() < deadline, f"{address} does not load"
            self.tell("1")
        return self

    def tell(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 30.0) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.tell(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.1)

    def click(self, selector: str, *, at: float = 0.5) -> None:
        """The mouse on the first such element, `at` from its left to its right."""
        box = self.tell(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height] })()"
        )
        x, y = box[0] + at * box[2], box[1] + box[3] / 2
        for kind, count in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 1)):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count
            )

    def press(self, key: str) -> None:
        """A key, as a person does."""
        code = KEYS.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path, *, of: str | None = None, quality: int = 70) -> None:
        """A screenshot, WebP or PNG by the path's suffix; of an element, beyond the screen too."""
        kind: dict[str, Any] = {"format": path.suffix[1:]}
        if path.suffix == ".webp":
            kind["quality"] = quality
        if of:
            box = self.tell(
                f"(() => {{ const r = document.querySelector({json.dumps(of)})"
                ".getBoundingClientRect(); return {x: r.x + scrollX, y: r.y + scrollY,"
                " width: r.width, height: r.height, scale: 1} })()"
            )
            kind |= {"clip": box, "captureBeyondViewport": True}
        shot = self.call("Page.captureScreenshot", **kind)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: Mapping[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", str(details)))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(a.get("value", a)) for a in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                address = params["request"]["url"]
                if not address.startswith(("data:", "blob:")) and address != self._address:
                    self.requests.append(address)


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A tab in a Chromium of its own, ended with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless=new", "--disable-gpu", "--no-first-run", "--mute-audio"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
        command += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions"]
        command += ["--disable-background-networking", "--disable-component-update"]
        if os.getuid() == 0:
            command.append("--no-sandbox")  # it refuses to sandbox for root
        process = subprocess.Popen(
            [*command, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with connect(_address(process, Path(profile)), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: "subprocess.Popen[bytes]", profile: Path) -> str:
    """Of the tab's socket."""
    import urllib.request

    port = profile / "DevToolsActivePort"
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        assert time.monotonic() < deadline, "Chromium does not start"
        if port.exists() and (lines := port.read_text().splitlines()):
            listing = f"http://127.0.0.1:{lines[0]}/json/list"
            with urllib.request.urlopen(listing, timeout=SECONDS_TO_ANSWER) as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
