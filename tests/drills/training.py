"""The training that drills disturb."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from rlfseg.pipeline.checkpoints import damage
from rlfseg.pipeline.curve import read_curve

STEPS = 14  # into the second epoch


class Training:
    """`python -m jobs.train` into a folder, as often as it takes."""

    def __init__(self, root: Path, latents: Path, out: Path, *flags: str):
        self.root, self.out = root, out
        settings = ["--backbone.base=tiny", "--backbone.resolution=64", "--lora.rank=8", "--optimizer.lr=3e-3"]
        pace = [f"--max_steps={STEPS}", "--checkpoint_every=3", "--log_every=1", "--batch_size=4", "--workers=2"]
        where = [f"--latents={latents}", f"--out={out}", f"--tracking.uri=sqlite:///{out}.db"]
        self.line = [sys.executable, "-m", "jobs.train", *settings, *pace, *where, *flags]

    def start(self) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.line, cwd=self.root, text=True, start_new_session=True, **pipes)

    def finish(self, driver: subprocess.Popen[str] | None = None) -> None:
        driver = driver or self.start()
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors[-3000:]

    def wait_for(self, step: int, driver: subprocess.Popen[str]) -> None:
        """Until the curve shows that step; not a guess at how long that takes."""
        while self.step() < step:
            assert driver.poll() is None, driver.communicate()[1][-3000:]
            time.sleep(0.02)

    def step(self) -> int:
        curve = read_curve(self.out)
        return int(curve[-1]["step"]) if curve else 0

    def adapter(self) -> bytes:
        return (self.out / "adapter" / "adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.out.glob("checkpoints/*/step-*"), reverse=True)

    def whole(self) -> list[Path]:
        """The checkpoints whose seals hold."""
        return [c for c in self.checkpoints() if damage(c) is None]

    def saved(self) -> int:
        """Steps of the newest of them."""
        return max((json.loads((c / "progress.json").read_text())["step"] for c in self.whole()), default=0)

    def last_weights(self) -> bytes:
        """Of the newest checkpoint."""
        return (self.checkpoints()[0] / "adapter_model.safetensors").read_bytes()

    def check_like(self, undisturbed: Training) -> None:
        """Bit-equal in weights and losses, finished, and every step logged once."""
        assert self.adapter() == undisturbed.adapter()
        assert [r["loss"] for r in read_curve(self.out)] == [r["loss"] for r in read_curve(undisturbed.out)]
        steps, _, status = self.logged()
        assert (steps, status) == (list(range(1, STEPS + 1)), "FINISHED")

    def logged(self) -> tuple[list[int], dict[str, str], str]:
        """Steps of the loss in MLflow, tags and status of the only run."""
        note = json.loads((self.out / "mlflow.json").read_text())
        client = MlflowClient(note["uri"])
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert [r.info.run_id for r in runs] == [note["run_id"]]
        history = client.get_metric_history(note["run_id"], "train/loss")
        return [m.step for m in history], runs[0].data.tags, runs[0].info.status
