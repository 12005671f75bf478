"""A run's report in a headless Chromium: what is painted, what the slider does, whether it fits a narrow window."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from tiny_run import TINY, noise, trainer

import fastgan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

PROBE = """<pre id='probe'></pre><script>
const slider = document.querySelector(".way input"), shown = () =>
  [...document.querySelectorAll(".way figure")].map(f => getComputedStyle(f).display !== "none");
const before = shown();
slider.value = 1; slider.dispatchEvent(new Event("input"));
document.querySelector("#probe").textContent = JSON.stringify({
  before, after: shown(), wide: document.documentElement.scrollWidth, window: innerWidth,
  broken: [...document.images].filter(i => !i.naturalWidth).length, pictures: document.images.length });
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with fastgan.backend("reference"):
        trainer(noise(), folder / "run", TINY.replace(eval_every=2, sample_count=9, watch_every=2, augment="ada")).fit()
    return folder / "run/report.html"


def chromium(report, tmp_path, *options, width=1000, height=1400):
    """stdout of a Chromium that shows the page and ends. Skips where it cannot start, as in some containers."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    try:
        ended = subprocess.run(
            [*command, *options, report.as_uri()], capture_output=True, text=True, timeout=90, env=environment
        )
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium did not end within 90 s")
    if ended.returncode:
        pytest.skip(f"Chromium cannot run here: {ended.stderr.strip()[-200:]}")
    assert "CONSOLE" not in ended.stderr, ended.stderr  # a script's error is logged so
    return ended.stdout


def test_the_page_is_painted(report, tmp_path):
    chromium(report, tmp_path, f"--screenshot={tmp_path / 'shot.png'}", height=3000)
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1000, 3000)
        pixels = np.asarray(shot.convert("RGB")) @ np.array([1 << 16, 1 << 8, 1])
    assert {0x1C1E21, 0x1F6FEB, 0xD1571B} <= set(np.unique(pixels).tolist())  # text, and the lines of both networks
    assert (pixels[:, :16] == 0xFFFFFF).all()  # nothing sticks out of the page


@pytest.mark.parametrize("width", [1000, 500])
def test_the_slider_moves_and_nothing_is_wider_than_the_window(report, tmp_path, width):
    page = tmp_path / "probed.html"
    page.write_text(report.read_text().replace("</body>", PROBE))
    dom = chromium(page, tmp_path, "--dump-dom", width=width)
    found = json.loads(re.search(r"<pre id=.probe.>(.*?)</pre>", dom)[1])
    assert found["before"] == [False, False, False, True] and found["after"] == [False, True, False, False]
    assert found["broken"] == 0 and found["pictures"] == 7
    assert found["wide"] <= found["window"] == width
