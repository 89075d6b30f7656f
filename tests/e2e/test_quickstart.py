"""The quickstart as a script: its order, its table, and that its Ray is stopped whatever happens.

`rlfseg` and `ray` are played: what the commands do themselves is tested elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlfseg import cli

KEYS = (
    *("seconds", "miou_base", "miou_one_step", "miou_five_steps", "miou_aos", "miou_hss", "miou_shipped"),
    *("iou_coarse_labels", "iou_refined_labels", "n_test"),
)
# The figure that each evaluation comes to, by the name of its folder.
FOUND = {
    **{"test-base": 0.1, "test-one-step": 0.2, "test-five-steps": 0.3, "test-aos": 0.4, "test-hss": 0.5},
    **{"test-shipped": 0.6, "labels-coarse": 0.7, "labels-refined": 0.8},
}
RAY = """#!/bin/sh
for a in "$@"; do case $a in --temp-dir=*) house=${a#*=};; esac; done
echo "$$ $house" > "$PLAYED/ray"
echo 127.0.0.1:6379 > "$house/ray_current_cluster"
exec sleep 600
"""
RLFSEG = f"""#!{sys.executable}
import json, os, pathlib, sys
with open(os.environ["PLAYED"] + "/asked", "a") as asked:
    asked.write(json.dumps([os.environ["RAY_ADDRESS"], *sys.argv[1:]]) + chr(10))
if sys.argv[1] == os.environ["FAILS"]:
    sys.exit(5)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
figures = dict.fromkeys(["oiou", "p@0.9", "ap_pooled", "boundary_iou"], 0.5)
figures |= {{"miou": {FOUND}.get(out.name), "n_samples": 290}}
(out / "results.json").write_text(json.dumps(figures))
"""


def quickstart(root: Path, played: Path, fails: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it into `played`/out with commands that are played."""
    for name, text in {"ray": RAY, "rlfseg": RLFSEG}.items():
        (played / "bin").mkdir(exist_ok=True)
        (played / "bin" / name).write_text(text)
        (played / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(played / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PLAYED": str(played), "FAILS": fails}
    script = [str(root / "scripts" / "quickstart.sh"), str(played / "out")]
    return subprocess.run(["bash", *script], env=env, capture_output=True, text=True, check=False, timeout=120)


def asked(played: Path) -> list[list[str]]:
    return [json.loads(line) for line in (played / "asked").read_text().splitlines()]


def assert_ray_is_gone(played: Path) -> None:
    pid, house = (played / "ray").read_text().split()
    assert not psutil.pid_exists(int(pid))
    assert not Path(house).exists()


def test_it_ends_with_a_table_and_ten_figures(root: Path, tmp_path: Path) -> None:
    done = quickstart(root, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tuple(results) == KEYS
    assert tuple(results[k] for k in KEYS[1:-1]) == tuple(FOUND.values())
    assert results["n_test"] == 290
    assert 0 <= results["seconds"] < 120
    for said in ("source .venv/bin/activate", "mlflow ui", "best.png", "0.600"):
        assert said in done.stdout
    assert_ray_is_gone(tmp_path)


def test_every_command_of_it_is_one_and_joins_its_ray(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quickstart(root, tmp_path).returncode == 0
    monkeypatch.chdir(root)  # its settings lie there
    commands = asked(tmp_path)
    assert {address for address, *_ in commands} == {"127.0.0.1:6379"}
    for _, name, *flags in commands:
        cli.parse(name, flags)
    order = list(dict.fromkeys(name for _, name, *_ in commands))
    assert order == ["prepare", "refine", "encode", "train", "calibrate", "evaluate", "predict"]


@pytest.mark.parametrize("step", ["prepare", "train", "predict"])
def test_ray_is_stopped_after_a_step_that_fails(root: Path, tmp_path: Path, step: str) -> None:
    done = quickstart(root, tmp_path, fails=step)
    assert done.returncode == 5
    assert asked(tmp_path)[-1][1] == step
    assert not (tmp_path / "out" / "results.json").exists()
    assert_ray_is_gone(tmp_path)
