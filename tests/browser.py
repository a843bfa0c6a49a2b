"""A headless Chromium, driven over its debugging port: what a reader's browser does."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=1300,1000",
]


class Browser:
    """One page at a time, with everything that it asked for and complained about.

    Attributes:
        requests: the addresses asked for since the last ``open``.
        complaints: errors and warnings of the console, and uncaught exceptions.
    """

    def __init__(self, folder: Path):
        assert CHROMIUM, "ask for CHROMIUM before making a Browser"
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.search(r"listening on ws://([^/]+)/", line):
                break
        else:
            raise RuntimeError("chromium ended before it listened")
        with urllib.request.urlopen(f"http://{found[1]}/json/list") as reply:
            pages = [page for page in json.load(reply) if page["type"] == "page"]
        self.socket = websocket.create_connection(
            pages[0]["webSocketDebuggerUrl"], timeout=60
        )
        self.numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(
            json.dumps({"id": number, "method": method, "params": parameters})
        )
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message)

    def note(self, message: dict[str, Any]) -> None:
        event, detail = message.get("method"), message.get("params", {})
        if event == "Network.requestWillBeSent":
            self.requests.append(detail["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            thrown = detail["exceptionDetails"]
            text = thrown.get("exception", {}).get("description", thrown["text"])
            self.complaints.append(text)
        elif event == "Runtime.consoleAPICalled" and detail["type"] in (
            "error",
            "warning",
        ):
            values = [str(arg.get("value", "")) for arg in detail["args"]]
            self.complaints.append(" ".join(values))
        elif event == "Log.entryAdded" and detail["entry"]["level"] == "error":
            entry = detail["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def open(self, address: str) -> None:
        """Go to a page, and wait until it is there and its formulas are set."""
        self.requests, self.complaints = [], []
        self.call("Page.navigate", url=address)
        for _ in range(300):
            if (
                self.evaluate("document.readyState") == "complete"
                and self.evaluate("location.href").split("#")[0] == address
            ):
                break
            time.sleep(0.1)
        self.evaluate("window.MathJax?.startup?.promise?.then(() => true) ?? true")
        self.evaluate("new Promise(done => setTimeout(done, 200))")

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
