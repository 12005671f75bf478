"""What a long run's log says of its memory: benchmarks/soak.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the source tree")


@pytest.mark.parametrize("growth", [0.0, 0.9, 1.1, 40.0])
def test_growth_after_warm_up_is_told(tmp_path, capsys, growth):
    """MB an hour; the first quarter of the run, which grows by 100 MB, does not count."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "samples").mkdir()
    rows = []
    for step in range(50, 20_001, 50):
        seconds = 0.36 * step  # two hours
        warming = 100 * min(1.0, seconds / 1800)
        wobble = 0.1 * (step // 50 % 2)
        rows.append({"step": step, "seconds": seconds, "memory_mb": 300 + warming + growth * seconds / 3600 + wobble})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runpy.run_path(str(SCRIPT))["report"](tmp_path) == (growth >= 1)
    assert f"{growth:+.2f} +- 0.01 MB an hour" in capsys.readouterr().out
