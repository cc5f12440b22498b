"""Run a page in headless Chromium."""

import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

BEFORE = """<script>
  const errors = [];
  for (const name of ["error", "securitypolicyviolation", "unhandledrejection"])
    addEventListener(name, (event) => errors.push(name + " " + (event.message ?? event.blockedURI ?? event.reason)));
  for (const name of ["error", "warn"]) console[name] = (...texts) => errors.push(texts.join(" "));
</script>"""


DARK = "--blink-settings=preferredColorScheme=0"

AFTER = """<script>
  const all_ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const wait = () => new Promise((go) => setTimeout(go, 100));
  addEventListener("load", async () => {
    const found = {};
    try { await wait(); await (async () => { %s })(); } catch (error) { errors.push(String(error)); }
    found.errors = errors;
    const requests = performance.getEntriesByType("resource").map(({ name }) => name);
    found.requests = requests.filter((name) => !name.startsWith("data:"));
    parent.document.title = JSON.stringify(found);
  });
</script>"""


def as_bytes(images: NDArray[Any]) -> str:
    """Return a line of JavaScript that defines ``bytes`` with the bytes of images."""
    text = base64.b64encode(images.tobytes()).decode()
    return f"const bytes = Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0));\n"


def audit() -> str:
    """Return JavaScript that defines ``audit(part)``: what axe-core finds wrong with the page or a part of it."""
    package = pytest.importorskip("axe_core_python")
    source = Path(package.__file__).with_name("axe.min.js").read_text("utf-8")
    return f"""{source};
        const audit = async (part = document) => (await axe.run(part)).violations.map(({{ id, nodes }}) =>
            [id, ...nodes.map(({{ html }}) => html)]);
    """


def in_browser(text: str, script: str, width: int = 1280, *flags: str) -> dict[str, Any]:
    """Run a script in a page in headless Chromium; return the dictionary ``found`` that the script fills."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("this machine does not have Chromium (Debian: apt-get install chromium)")
    with_script = text.replace("<head>", f"<head>{BEFORE}").replace("</body>", AFTER % script + "</body>")
    # in a frame, as windows have a minimum width
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(with_script)}">'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=5000"]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(f'<meta charset="utf-8"><title></title>{frame}', encoding="utf-8")
        command = [chromium, *options, *flags, "--dump-dom", page.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found: dict[str, Any] = json.loads(html.unescape(re.search("<title>(.*?)</title>", result.stdout)[1]))
    problems = found.pop("errors"), found.pop("requests")
    assert problems == ([], [])
    return found
