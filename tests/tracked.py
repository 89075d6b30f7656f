"""Runs of MLflow for tests, in a folder `home` with a database of their own, and a model that needs no weights."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run as Recorded

from rlfseg import tracking
from rlfseg.config import TrackingConfig
from rlfseg.tracking import Run

STAND_IN = """
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from pathlib import Path
import pandas as pd

EXAMPLE = {"phrase": ["ring"]}
SIGNATURE = ModelSignature(Schema([ColSpec(DataType.string, "phrase")]), Schema([ColSpec(DataType.string, "said")]))
PACKAGES = ("pandas", "torch")

class Echo(PythonModel):
    def load_context(self, context):
        self.word = (Path(context.artifacts["adapter"]) / "word.txt").read_text()
    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        return pd.DataFrame({"said": self.word + model_input["phrase"]})

set_model(Echo())
"""


def start(home: Path, **options: object) -> Run:
    settings: dict[str, object] = {"params": {"lr": 1e-4}, "system_metrics": False, "default_dir": home}
    return Run.start(TrackingConfig(), **settings | options)  # type: ignore[arg-type]


def client(run: Run) -> MlflowClient:
    return MlflowClient(run.uri)


def recorded(run: Run) -> Recorded:
    return client(run).get_run(str(run.id))


def steps(run: Run, key: str, uri: str | None = None) -> list[int]:
    return [m.step for m in MlflowClient(uri or run.uri).get_metric_history(str(run.id), key)]


def stand_in(home: Path) -> Path:
    code = home / "code.py"
    code.write_text(STAND_IN)
    return code


def log_stand_in(run: Run, home: Path) -> str | None:
    (home / "adapter").mkdir()
    (home / "adapter" / "word.txt").write_text("Hello, ")
    return tracking.log_model_folder(run, home / "adapter", stand_in(home), code_paths=())
