"""A bounded share of scripts/fuzz, and whether the fuzzer itself would see a crash, a hang or a foreign exception."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

SLOW_TO_LOAD = {"weights"}  # needs torch and peft: ten seconds for a few inputs


def fuzz(script: Path, out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, results and text of a run."""
    command = [sys.executable, str(script / "run.py"), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(out.read_text()) if out.exists() else {}, done.stdout + done.stderr


def kinds_of(script: Path) -> list[str]:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import worlds; print(*worlds.WORLDS)"
    return subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=True
    ).stdout.split()


def test_mutated_inputs_give_a_result_or_a_named_error(root: Path, tmp_path: Path) -> None:
    script = root / "scripts" / "fuzz"
    kinds = [kind for kind in kinds_of(script) if kind not in SLOW_TO_LOAD]
    assert len(kinds) > 20
    code, results, said = fuzz(
        script, tmp_path / "f.json", "--inputs", "3000", "--seed", "1", "--kinds", ",".join(kinds)
    )
    assert code == 0, said
    assert results["failures"] == 0
    assert results["inputs"] > 2900
    assert results["slowest_s"] < 10
    assert results["peak_mib"] < 3000
    for kind, result in results["kinds"].items():
        assert len(result["outcomes"]) > 1, f"{kind}: {result['outcomes']}"  # some are refused, some are not
        assert "result" in result["outcomes"], kind


WORLDS = """
import ctypes
from worlds_of_the_real import World
from rlfseg.errors import DataError
def read(folder):
    data = (folder / "x").read_bytes()
    number = int(data)
    if number == 3:
        ctypes.string_at(8)
    if number == 5:
        ctypes.CDLL(None).pause()
    if number == 7:
        {}["of Python's own"]
    if number == 9:
        bytearray(1 << 40)
    if number % 2:
        raise DataError("odd")
class Numbers(World):
    def mutated(self, number):
        return "x", str(number).encode()
def make():
    return Numbers(files={"x": b"0"}, mutations={}, read=read)
WORLDS, SHARES = {"numbers": make}, {}
"""


def test_the_fuzzer_sees_crashes_hangs_and_foreign_exceptions(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "fuzz"
    shutil.copytree(root / "scripts" / "fuzz", script)
    (script / "worlds.py").rename(script / "worlds_of_the_real.py")
    (script / "worlds.py").write_text(WORLDS)
    text = (script / "run.py").read_text()
    for old, new in (
        ("SECONDS, MEMORY = 20,", "SECONDS, MEMORY = 1,"),
        ('world.mutated(random.Random(f"{seed}/{kind}/{number}"))', "world.mutated(number)"),
    ):
        assert old in text
        text = text.replace(old, new)
    (script / "run.py").write_text(text)
    code, results, said = fuzz(script, tmp_path / "f.json", "--inputs", "12")
    assert code == 1, said
    numbers = results["kinds"]["numbers"]
    assert numbers["outcomes"] == {"result": 6, "DataError": 2, "crash": 1, "hang": 1, "foreign": 2}
    assert [f.split(":")[0] for f in numbers["failures"]] == ["numbers 3", "numbers 5", "numbers 7", "numbers 9"]
    assert "KeyError" in numbers["failures"][2]
    assert "MemoryError" in numbers["failures"][3]


def test_an_input_is_decided_by_its_seed_and_number(root: Path, tmp_path: Path) -> None:
    code = """
        import hashlib, os, sys
        sys.path.insert(0, sys.argv[1])
        os.chdir(sys.argv[2])
        import run, worlds
        for kind in ("png", "refer", "hdf5", "index"):
            world = worlds.WORLDS[kind]()
            for seed, number in [(seed, number) for seed in (0, 1) for number in range(8)]:
                name, data = run.mutated(world, kind, seed, number)
                print(kind, name, hashlib.sha256(data).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(root / "scripts" / "fuzz"), str(tmp_path)]
    one, other = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == other
    assert len(set(one.splitlines())) > 55  # of 64: two mutations may end alike
