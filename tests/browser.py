"""A headless Chromium, driven over two pipes: its DevTools protocol, JSON objects that each end in a zero byte."""

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120  # for one answer


class Browser:
    """One page. `events` are all that the browser has told without being asked."""

    def __init__(self):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            raise RuntimeError(
                f"no browser: none of {', '.join(NAMES)} is installed here (Debian: apt install chromium)"
            )
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(
            [program, *options],
            close_fds=False,  # Python's own close by themselves
            preexec_fn=lambda: [os.dup2(end, i) for i, end in enumerate(ends, 3)],  # the protocol's are 3 and 4
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        os.set_blocking(self.back, False)
        self.read, self.asked, self.session, self.events = b"", 0, None, []
        (target,) = (t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def __call__(self, method, **params):
        """What the browser answers."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda told: told.get("id") == self.asked)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait(self, wanted):
        """The next message that is wanted; the others are kept in `events`."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            while b"\0" in self.read:
                line, _, self.read = self.read.partition(b"\0")
                message = json.loads(line)
                if wanted(message):
                    return message
                self.events.append(message)
            try:
                self.read += os.read(self.back, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        raise TimeoutError(f"the browser has not answered for {SECONDS} s")

    def open(self, file: Path, width, height=900, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=file.resolve().as_uri())
        if not any(told.get("method") == "Page.loadEventFired" for told in self.events):
            self.events.append(self.wait(lambda told: told.get("method") == "Page.loadEventFired"))

    def run(self, script):
        """The value of a JavaScript expression, after what it promises."""
        told = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"])
        return told["result"].get("value")

    def press(self, key):
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, " ": 32}
        how = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        self("Input.dispatchKeyEvent", type="rawKeyDown", **how)
        self("Input.dispatchKeyEvent", type="keyUp", **how)

    def pixels(self, selector=None):
        """What is painted now, of the first element or of the whole page: (h,w,3) uint8."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        clip = {}
        if selector:
            box = self.run(
                f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height, scale: 1}; })()"
            )
            clip = {"clip": box}
        data = self("Page.captureScreenshot", captureBeyondViewport=True, **clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)

    def complaints(self):
        """Errors, warnings and requests that are not for the page itself."""
        found = []
        for told in self.events:
            method, params = told.get("method"), told.get("params", {})
            if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                found.append(told)
            url = params.get("request", {}).get("url", "data:")
            if method == "Network.requestWillBeSent" and not url.startswith(("data:", "file:")):
                found.append(url)
        return found
