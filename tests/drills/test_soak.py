"""Memory stays flat over 10,000 images; the script says of what, and draws it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.timeout(4 * 3600)
def test_memory_stays_flat(tmp_path: Path, root: Path) -> None:
    line = [sys.executable, str(root / "scripts" / "soak.py"), "--images=10000", f"--out={tmp_path}"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "memory.png").stat().st_size > 10_000
