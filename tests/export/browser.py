"""A headless Chromium, driven over its DevTools pipe: what a page shows, logs and asks for.

with Browser() as browser:
    page = browser.open("file:///tmp/page.html", width=360)
    page.wait("document.title", seconds=5)
    page.requests            # every address that the page and its workers asked for
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless=new", "--no-sandbox", "--no-first-run", "--disable-quic", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# WebGPU where there is no GPU: computed on the processor, far too slow for anything but a test.
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan,WebGPU",
)  # fmt: skip

Answer = queue.Queue[dict[str, Any]]


class Browser:
    """One Chromium process with a profile of its own, which is removed with it."""

    def __init__(self, *flags: str) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        # Chromium reads its commands from descriptor 3 and writes events to 4.
        script = f'exec "$@" 3<&{commands} 4>&{events}'
        arguments = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *arguments, "about:blank"],
            pass_fds=(commands, events),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(events)
        self._number = 0
        self._answers: dict[int, Answer] = {}
        self._lock = threading.Lock()
        self._pages: dict[str, Page] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.call("Browser.close", seconds=5)
            self._process.wait(10)
        except (OSError, queue.Empty, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)
            self._process.wait(10)
        os.close(self._commands)
        self._profile.cleanup()

    def _read(self) -> None:
        """Give answers to who waits for them, and events to their page."""
        with open(self._events, "rb") as stream:
            rest = b""
            while piece := stream.read1(1 << 20):
                *messages, rest = (rest + piece).split(b"\0")
                for text in messages:
                    message = json.loads(text)
                    if "id" in message:
                        self._answers.pop(message["id"]).put(message)
                    elif page := self._pages.get(message.get("sessionId", "")):
                        page.on_event(message)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Answer:
        """Send a command without waiting for its answer; returns where that will arrive."""
        answer: Answer = queue.Queue()
        with self._lock:  # events are answered in a thread of their own
            self._number += 1
            message = {"id": self._number, "method": method, "params": parameters}
            if session is not None:
                message["sessionId"] = session
            self._answers[self._number] = answer
            text = json.dumps(message).encode() + b"\0"
            while text:
                text = text[os.write(self._commands, text) :]
        return answer

    def call(
        self, method: str, session: str | None = None, seconds: float = 60, **parameters: Any
    ) -> dict[str, Any]:
        """Send a command and return its result."""
        answer = self.send(method, session, **parameters).get(timeout=seconds)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(
        self,
        url: str,
        *,
        width: int = 1000,
        height: int = 800,
        dark: bool = False,
        before: str = "",
    ) -> Page:
        """A new tab with this address; the script `before` runs ahead of the page's own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        page.prepare(width, height, dark)
        if before:
            page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.began = time.perf_counter()
        page.call("Page.navigate", url=url)
        return page

    def adopt(self, session: str, page: Page) -> None:
        """Let a page hear the events of a worker that it started."""
        self._pages[session] = page


class Page:
    """A tab, with all that it asked for and logged."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self.session = browser, session
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.began = 0.0

    def call(self, method: str, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self.session, seconds, **parameters)

    def prepare(self, width: int, height: int, dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def on_event(self, message: dict[str, Any]) -> None:
        """Keep requests and complaints; listen to workers before they begin."""
        method, values = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Target.attachedToTarget":
            session = values["sessionId"]
            self._browser.adopt(session, self)
            for domain in ("Network", "Runtime"):
                self._browser.send(f"{domain}.enable", session)
            self._browser.send("Runtime.runIfWaitingForDebugger", session)
        elif method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            told = details.get("exception", {}).get("description")
            self.problems.append(str(told or details["text"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(values["entry"]["text"])

    def evaluate(self, expression: str, seconds: float = 60) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", seconds,
            expression=expression, awaitPromise=True, returnByValue=True, userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The expression's value as soon as it is true."""
        end = time.perf_counter() + seconds
        while not (value := self.evaluate(expression)):
            assert time.perf_counter() < end, f"{expression}: never; {self.problems}"
            time.sleep(0.02)
        return value

    def key(self, key: str, code: int, *, shift: bool = False, ctrl: bool = False) -> None:
        """Press a key, as a user does."""
        values = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": code,
            "modifiers": 8 * shift + 2 * ctrl,
        }
        if key == "Enter":
            values["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **values)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
