"""Chromium without a window, driven over a pair of pipes: pages are loaded, measured and photographed in tests."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 120.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Texts of one figure that lie on each other, by more than a pixel each way.
OVERLAPS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const a = boxes[i], b = boxes[j];
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const slanted = t => /rotate\\((?!-?0\\))/.test(t.getAttribute('transform') || '');
    if (x > 1 && y > 2 && !slanted(texts[i]) && !slanted(texts[j]))
      found.push(svg.closest('figure').id + ': ' + texts[i].textContent + ' / ' + texts[j].textContent);
  }
  return found;
})
"""
OUTSIDE = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
  }).map(t => svg.closest('figure').id + ': ' + t.textContent);
})
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('figure svg text')].filter(t => t.textContent.trim()).map(t =>
  parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a))
"""
# Contrast of text and of a figure's ink with the page, by the WCAG.
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const back = light(getComputedStyle(document.body).backgroundColor);
  const ratio = c => { const l = light(c); return (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05); };
  const probe = document.createElement('i');
  document.body.append(probe);
  const of = v => { probe.style.color = `var(--${v})`; return ratio(getComputedStyle(probe).color); };
  const text = Math.min(...['ink', 'soft', 'accent', 'good', 'bad', 'warn'].map(of));
  const series = Math.min(...[0,1,2,3,4,5,6,7].map(i => of('series-' + i)));
  const label = document.querySelector('figure svg text');
  return {text, series, label: ratio(getComputedStyle(label).fill)};
})()
"""


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One tab; `send` is a method of the DevTools protocol."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.buffer, self.number, self.session = to, back, b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda found: found.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, wanted: Any) -> dict[str, Any]:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            piece, zero, rest = self.buffer.partition(b"\0")
            if not zero:
                if select.select([self.back], [], [], 1.0)[0]:
                    self.buffer += os.read(self.back, 1 << 20)
                continue
            self.buffer = rest
            found = json.loads(piece)
            if wanted(found):
                return found
        raise TimeoutError("the browser did not answer")

    def show(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Load a page as on a screen of this width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.size(width, 900)
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait(lambda found: found.get("method") == "Page.loadEventFired")

    def size(self, width: int, height: int) -> None:
        mobile = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def photograph(self, path: Path, clip: dict[str, float] | None = None) -> None:
        """The whole page, or a part of it, as a PNG."""
        box = clip or {
            "x": 0,
            "y": 0,
            "width": self.value("document.documentElement.clientWidth"),
            "height": self.value("document.documentElement.scrollHeight"),
        }
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip={**box, "scale": 1})
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser_tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser of our own, which reaches no network and ends with the block."""
    path = find_browser()
    assert path is not None
    their_in, to = os.pipe()
    back, their_out = os.pipe()

    def pipes() -> None:  # the protocol's pipes are descriptors 3 and 4
        one, two = os.dup(their_in), os.dup(their_out)
        os.dup2(one, 3)
        os.dup2(two, 4)

    process = subprocess.Popen(
        [
            path,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
        ],
        preexec_fn=pipes,  # noqa: PLW1509
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_in)
    os.close(their_out)
    try:
        yield Tab(to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)


def check_readable(tab: Tab, width: int, dark: bool) -> None:
    """Fail where the page that is shown scrolls sideways, or where its text is cut, small, pale or on other text."""
    where = f"at {width} px, {'dark' if dark else 'light'}"
    assert tab.value("document.documentElement.scrollWidth") <= width, f"it scrolls sideways {where}"
    assert tab.value(OVERLAPS) == [], where
    assert tab.value(OUTSIDE) == [], where
    assert tab.value(SMALLEST) > 7.5, f"letters are too small {where}"
    contrast = tab.value(CONTRAST)
    assert contrast["text"] >= 4.5, where
    assert contrast["label"] >= 4.5, where
    assert contrast["series"] >= 3, where
