"""What makes a job the same job: other weights under the same name are another one, and wrong settings are none."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from rlfseg import adapter, cli, hdf5
from rlfseg.config import (
    ASSETS,
    BackboneConfig,
    CalibrateConfig,
    EncodeConfig,
    EvaluateConfig,
    FastConfig,
    PredictConfig,
    RefineConfig,
    SamConfig,
    SamplingConfig,
    TrainConfig,
)
from rlfseg.device import choose_dtype
from rlfseg.errors import ConfigError, DataError, ModelError, ResourceError
from rlfseg.pipeline import calibrate, cluster, encode, evaluate, predict, refine, train
from rlfseg.pipeline.checkpoints import Store
from rlfseg.pipeline.folders import begin, finish, weights, write_json
from rlfseg.pipeline.loop import LEFT_OUT, Job
from rlfseg.pipeline.sources import open_source
from rlfseg.pipeline.stages import Stage

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
NOWHERE: dict[str, Any] = {"storage": "", "name": "", "total_steps": 1, "data": "", "uri": "", "run_id": None}
ADAPTER = "--adapter=tiny"
Run = Callable[[], object]


class Begun(Exception):
    """A stage has claimed its folder; what follows would need Ray."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(stage: Stage) -> None:
        begin(stage.out, stage.identity)
        raise Begun

    def never() -> None:
        raise Begun

    for module in (calibrate, encode, evaluate, predict, refine):
        monkeypatch.setattr(module, "connect", lambda: None)
        monkeypatch.setattr(module, "gpus_per_worker", lambda run, device: 0.0)
        monkeypatch.setattr(module, "run_stage", claim)
    monkeypatch.setattr(train, "connect", never)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    out = tmp_path / "samples"
    begin(out, {})
    phrase = hdf5.Labelled(caption="a", mask=np.ones((8, 8), np.uint8))
    hdf5.write_shard(out / "a.h5", [hdf5.Sample(id="0", image=np.zeros((8, 8, 3), np.uint8), phrases=(phrase,))])
    hdf5.build_index(out)
    finish(out, {}, {"rows_in": 1})
    return out


@pytest.fixture
def base(tmp_path: Path) -> BackboneConfig:
    return dataclasses.replace(TINY, base=str(shutil.copytree(ASSETS / "base", tmp_path / "base")))


def latents(folder: Path, base: BackboneConfig, refined: list[bytes | None]) -> Path:
    """As `encode` writes them: a phrase of one sample for each of `refined`."""
    identity = {"base": base.base, "resolution": 64, "weights": weights(Path(base.base) / "vae")}
    begin(folder, {"backbone": identity})
    zero = np.zeros(4, np.float16).tobytes()
    row = {"id": "0", "status": "ok", "captions": ["a"] * len(refined), "shape": [1, 2, 2], "z1": zero}
    rows = [row | {"z0": [zero] * len(refined), "z0_refined": refined}, {"id": "1", "status": "refused: damaged"}]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=encode.SCHEMA), folder / "data" / "0.parquet")
    finish(folder, {"backbone": identity}, {"rows_in": 2})
    return folder


def swap(path: Path) -> None:
    """Other weights of the same size, with the old file's times: none of these may decide."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def starts(run: Run) -> None:
    with pytest.raises(Begun):
        run()


def refuses(run: Run, field: str) -> None:
    with pytest.raises(DataError, match=f"was begun with other settings: {field}"):
        run()


# --- weights that were swapped ------------------------------------------------------------------------------------


def test_refine_knows_its_sam(samples: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "sam_vit_b_01ec64.pth"
    checkpoint.write_bytes(b"weights")
    config = RefineConfig(samples=str(samples), out=str(tmp_path / "out"), sam=SamConfig(checkpoint=str(checkpoint)))
    starts(lambda: refine.run(config))
    starts(lambda: refine.run(config))
    swap(checkpoint)
    refuses(lambda: refine.run(config), "sam_weights")


def test_encode_knows_its_autoencoder_and_its_arithmetic(samples: Path, base: BackboneConfig, tmp_path: Path) -> None:
    config = EncodeConfig(samples=str(samples), out=str(tmp_path / "out"), backbone=base)
    starts(lambda: encode.run(config))
    swap(next(Path(base.base, "unet").glob("*.safetensors")))  # no latent depends on it
    starts(lambda: encode.run(dataclasses.replace(config, backbone=dataclasses.replace(base, dtype="fp32"))))
    refuses(
        lambda: encode.run(dataclasses.replace(config, backbone=dataclasses.replace(base, dtype="bf16"))), "backbone"
    )
    swap(next(Path(base.base, "vae").glob("*.safetensors")))
    refuses(lambda: encode.run(config), "backbone")


def test_calibrate_knows_the_adapter_that_it_writes_into(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "adapter", tmp_path / "adapter")
    config = CalibrateConfig(adapter=str(folder), samples=str(samples), out=str(tmp_path / "out"))
    starts(lambda: calibrate.run(config))
    adapter.write_card(folder, dataclasses.replace(adapter.read_card(folder), threshold=0.123))
    starts(lambda: calibrate.run(config))
    swap(folder / "adapter_model.safetensors")
    refuses(lambda: calibrate.run(config), "weights")


def test_train_knows_its_base_and_the_autoencoder_of_its_latents(base: BackboneConfig, tmp_path: Path) -> None:
    folder = latents(tmp_path / "latents", base, [None])
    config = TrainConfig(latents=str(folder), out=str(tmp_path / "out"), backbone=base, batch_size=1)
    starts(lambda: train.run(config))
    own = next(Path(base.base, "unet").glob("*.safetensors"))
    shutil.copy(own, own.with_suffix(".fp16.safetensors"))
    starts(lambda: train.run(config))  # another tool's: nothing here loads it
    swap(own)
    refuses(lambda: train.run(config), "weights")
    swap(next(Path(base.base, "vae").glob("*.safetensors")))
    with pytest.raises(ConfigError, match=r"backbone\.base: the autoencoder of .* has other weights than when"):
        open_source(config)


def test_predict_and_evaluate_know_their_tiny_autoencoder(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "autoencoder_tiny", tmp_path / "autoencoder")
    fast = FastConfig(autoencoder=str(folder))
    masks = PredictConfig(images=str(samples), out=str(tmp_path / "masks"), fast=fast)
    figures = EvaluateConfig(samples=str(samples), adapter="tiny", out=str(tmp_path / "figures"), fast=fast)
    commands: tuple[Run, ...] = (lambda: predict.run(masks), lambda: evaluate.run(figures))
    for command in commands:
        starts(command)
        starts(command)
    swap(folder / "diffusion_pytorch_model.safetensors")
    for command in commands:
        refuses(command, "autoencoder")


def test_a_tiny_autoencoder_that_is_nowhere_is_missed_before_anything_starts(samples: Path, tmp_path: Path) -> None:
    fast = FastConfig(autoencoder=str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"fast\.autoencoder: .*none is no folder of an AutoencoderTiny"):
        predict.run(PredictConfig(images=str(samples), out=str(tmp_path / "out"), fast=fast))
    assert not (tmp_path / "out").exists()


# --- settings that can't work, and those without effect -----------------------------------------------------------


def test_wrong_settings_claim_no_folder(samples: Path, tmp_path: Path) -> None:
    out, missing = tmp_path / "out", SamConfig(checkpoint=str(tmp_path / "sam_vit_h.pth"))
    with pytest.raises(ModelError, match=r"sam\.checkpoint: no file"):
        refine.run(RefineConfig(samples=str(samples), out=str(out), sam=missing))
    (tmp_path / "sam.pth").touch()
    with pytest.raises(ConfigError, match=r"sam\.model: not told"):
        refine.run(
            RefineConfig(samples=str(samples), out=str(out), sam=SamConfig(checkpoint=str(tmp_path / "sam.pth")))
        )
    with pytest.raises(ModelError, match=r"backbone\.base"):
        encode.run(EncodeConfig(samples=str(samples), out=str(out), backbone=BackboneConfig(base=str(tmp_path))))
    assert not out.exists()


class NoLayer:
    """A trainer whose workers find that a setting is wrong."""

    def __init__(self, *args: object, **settings: object):
        pass

    def fit(self) -> None:
        raise WorkerGroupError("failed", {0: ConfigError("lora.targets: ['to_x'] matches no layer")})


def test_a_training_that_never_began_claims_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TorchTrainer", NoLayer)
    out = tmp_path / "out"
    job = Job(config=TrainConfig(out=str(out), backbone=TINY), out=out, **NOWHERE)
    store = Store(str(tmp_path / "checkpoints"), "a")
    for left in (False, True):  # what a checkpoint stands for is kept
        begin(out, {})
        if left:
            Path(store.folder, "step-00000001-a").mkdir(parents=True)
        with pytest.raises(ConfigError, match="matches no layer"):
            train._fit(job, store)
        assert out.exists() == left


CARRIED = RayTaskError("poll", "ray::poll()\n  File a\nRuntimeError: Connection closed by peer", RuntimeError())
DEAD = WorkerHealthCheckFailedError("A check failed. Worker info: long", RayActorError())
LORA_GONE = ModelError("checkpoint a can't be read")
OURS = WorkerHealthCheckFailedError("A check failed", RayTaskError("poll", "ray::poll()\n  File a", LORA_GONE))


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({1: CARRIED}, "RuntimeError: Connection closed by peer; the same"),
        ({0: CARRIED, 1: DEAD}, "The actor experienced an error before finishing this task.; the same"),
    ],
)
def test_what_ended_a_worker_is_told_in_a_line(failures: dict[int, Exception], told: str) -> None:
    job = Job(config=TrainConfig(out=""), out=Path(), **NOWHERE)
    cause = train._cause(WorkerGroupError("failed", failures), job)
    assert f"max_failures: {job.config.max_failures}: {told}" in str(cause)


def test_our_own_error_is_found_behind_a_check_that_failed() -> None:
    job = Job(config=TrainConfig(out=""), out=Path(), **NOWHERE)
    assert train._cause(WorkerGroupError("failed", {0: DEAD, 1: OURS}), job) is LORA_GONE


def test_what_failed_beside_the_workers_is_not_blamed_on_them() -> None:
    job = Job(config=TrainConfig(out=""), out=Path(), **NOWHERE)
    told = str(train._cause(ControllerError(RuntimeError("no such thing")), job))
    assert told.startswith("what starts the workers failed: no such thing; the same command")


@pytest.mark.parametrize("rescale", ["aos", "hss"])
@pytest.mark.parametrize(("command", "asks"), [("predict", ["--images={}"]), ("evaluate", ["--samples={}", ADAPTER])])
def test_rescaling_of_several_steps_is_refused_before_anything_starts(
    command: str, asks: list[str], rescale: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--out={tmp_path / 'out'}", f"--sampling.rescale={rescale}", "--sampling.steps=5"]
    assert cli.main(command, [ask.format(samples) for ask in asks] + flags) == 2
    assert f"steps=5 with rescale={rescale}: needs a single step" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predict_looks_at_its_input_before_it_starts_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "connect", lambda: pytest.fail("Ray was started for nothing"))
    with pytest.raises(ConfigError, match="names no picture"):
        predict.run(PredictConfig(images=str(tmp_path / "none.jpg"), phrases=("a",), out=str(tmp_path / "out")))


def test_refined_labels_that_are_not_there(tmp_path: Path) -> None:
    where: dict[str, Any] = {"out": str(tmp_path / "out"), "backbone": TINY, "batch_size": 1}
    base = dataclasses.replace(TINY, base=str(ASSETS / "base"))
    none = latents(tmp_path / "none", base, [None, None])
    some = latents(tmp_path / "some", base, [None, np.zeros(4, np.float16).tobytes()])
    where["backbone"] = base
    sources = [open_source(TrainConfig(latents=str(folder), **where)) for folder in (none, some)]
    assert [source.has_refined for source in sources] == [False, True]
    with pytest.raises(ConfigError, match=f"selection: refined, but {none} holds no refined labels"):
        train.run(TrainConfig(latents=str(none), selection="refined", **where))
    starts(lambda: train.run(TrainConfig(latents=str(some), selection="refined", **where)))


def test_training_tells_what_it_does_not_use(tmp_path: Path) -> None:
    base = dataclasses.replace(TINY, base=str(ASSETS / "base"))
    folder = latents(tmp_path / "latents", base, [None] * 5)
    config = TrainConfig(latents=str(folder), out=str(tmp_path), backbone=base, batch_size=2)
    source, left_out = open_source(config), "left out of validation: 1 empty phrases of x"
    write_json(tmp_path / LEFT_OUT, {"validation": [left_out]})
    whole = Job(config=config, out=tmp_path, **NOWHERE | {"total_steps": 4})  # two epochs
    tail = "1 phrases an epoch are left out, as a step takes 2; others in each epoch"
    idle = f"selection: dynamic has no effect: {folder} holds no refined labels"
    assert train._notes(whole, source, ASSETS / "base", 2) == [tail, idle, left_out]
    original = dataclasses.replace(config, selection="original")
    less_than_an_epoch = dataclasses.replace(whole, config=original, total_steps=1)
    assert train._notes(less_than_an_epoch, source, ASSETS / "base", 2) == [left_out]


def test_eps_without_rescaling_is_said_to_have_no_effect() -> None:
    assert SamplingConfig(eps=0.1).idle == ("sampling.eps: 0.1 has no effect with sampling.rescale: none",)
    with pytest.raises(ValidationError, match="at least 1 item"):
        CalibrateConfig(adapter="a", samples="b", out="c", eps=())
    assert SamplingConfig().idle == SamplingConfig(eps=0.1, rescale="aos").idle == ()


# --- where a job ran, and in which Ray ----------------------------------------------------------------------------


def test_where_tells_workers_device_and_arithmetic() -> None:
    assert cluster.where(1, 0, "fp32") == "1 worker, CPU, fp32"
    assert cluster.where(2, 1, "bf16") == "2 workers, 1 GPU, bf16"
    assert cluster.where(8, 8) == "8 workers, 8 GPUs"
    for wanted in ("auto", "fp32", "bf16"):
        for gpus, device in ((0, "cpu"), (1, "cuda")):
            long = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[cluster.arithmetic(wanted, gpus)]
            assert str(choose_dtype(wanted, device)) == long


@pytest.mark.parametrize(("address", "remote"), [("192.0.2.1:6379", True), (None, False), ("local", False)])
def test_a_ray_of_our_own_gets_a_token_of_its_own(
    address: str | None, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **settings: given.update(settings))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    cluster.connect()
    assert ("num_cpus" in given, "RAY_AUTH_TOKEN" in os.environ) == (not remote, not remote)
    assert remote or len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_what_ray_start_has_left_is_told_not_joined_in_passing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", "from rlfseg.pipeline.cluster import connect; connect()"],
        **{"cwd": root, "env": environment | {"RAY_TMPDIR": str(tmp_path)}, "check": False},
        **{"capture_output": True, "text": True, "timeout": 120},
    )
    told = done.stderr.splitlines()[-1]
    assert told.startswith("rlfseg.errors.ResourceError: RAY_ADDRESS: not set, and `ray start` has started a Ray")


def test_a_job_server_is_no_ray_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS: http://head:8265 is a job server, for `rlfseg submit`"):
        cluster.connect()


@pytest.mark.parametrize("error", [ConnectionError("nobody\nthere"), RuntimeError("Version mismatch: Ray: 2.50.0")])
def test_a_ray_that_cannot_be_joined_is_told_in_a_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", fails)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    told = " ".join(str(error).split())
    with pytest.raises(ResourceError, match=rf"^RAY_ADDRESS: the Ray at 192\.0\.2\.1:6379 can't be joined: {told}$"):
        cluster.connect()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    with pytest.raises(type(error)):
        cluster.connect()
