"""The whole fuzz; `tests/test_fuzz.py` has a bounded share of it, and says what it would see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.drill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 8, 21])  # 8 once found what 0 had not
def test_a_hundred_thousand_inputs(root: Path, tmp_path: Path, seed: int) -> None:
    line = [
        sys.executable,
        str(root / "scripts" / "fuzz" / "run.py"),
        "--inputs=100000",
        f"--seed={seed}",
        f"--out={tmp_path / 'f.json'}",
    ]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "f.json").read_text())
    assert results["failures"] == 0
    assert results["inputs"] > 90_000
