"""Every setting of every command: frozen dataclasses, one a command, with the paper's values where it gives them.

Each field says what it means, its unit, and where its default comes from; "ours" marks what the paper leaves open.
Imports neither torch nor ray, so that `--help` is quick.
"""

from rlfseg.config.bench import (
    BenchConfig,
)
from rlfseg.config.cluster import (
    SubmitConfig,
)
from rlfseg.config.data import (
    AuditConfig,
    InspectConfig,
    PrepareConfig,
    ShapesConfig,
    VerifyConfig,
)
from rlfseg.config.labels import (
    EncodeConfig,
    GuardConfig,
    RefineConfig,
    SamConfig,
)
from rlfseg.config.masks import (
    CalibrateConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
)
from rlfseg.config.parts import (
    ASSETS,
    ATTENTION,
    EVERY_LAYER,
    SD_V15,
    STRICT,
    BackboneConfig,
    FastConfig,
    Fraction,
    LoraConfig,
    Natural,
    Positive,
    PositiveInt,
    Ratio,
    SamplingConfig,
    TrackingConfig,
    WorkersConfig,
    as_dict,
    digest,
    flatten,
    without_passwords,
)
from rlfseg.config.serving import (
    LOOPBACK,
    BatchesConfig,
    LimitsConfig,
    SegmentConfig,
    ServeConfig,
)
from rlfseg.config.training import (
    OptimizerConfig,
    SpeedConfig,
    TrainConfig,
)

__all__ = [
    "ASSETS",
    "ATTENTION",
    "EVERY_LAYER",
    "LOOPBACK",
    "SD_V15",
    "STRICT",
    "AuditConfig",
    "BackboneConfig",
    "BatchesConfig",
    "BenchConfig",
    "CalibrateConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FastConfig",
    "Fraction",
    "GuardConfig",
    "InspectConfig",
    "LimitsConfig",
    "LoraConfig",
    "Natural",
    "OptimizerConfig",
    "Positive",
    "PositiveInt",
    "PredictConfig",
    "PrepareConfig",
    "Ratio",
    "RefineConfig",
    "SamConfig",
    "SamplingConfig",
    "SegmentConfig",
    "ServeConfig",
    "ShapesConfig",
    "SpeedConfig",
    "SubmitConfig",
    "TrackingConfig",
    "TrainConfig",
    "VerifyConfig",
    "WorkersConfig",
    "as_dict",
    "digest",
    "flatten",
    "without_passwords",
]
