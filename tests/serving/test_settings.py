"""Settings of the service: typos are refused, also those that Serve's own loader overlooks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rlfseg import cli
from rlfseg.config import ServeConfig
from rlfseg.errors import ConfigError, ResourceError
from serve.app import resolved, run, settings


def test_nested_and_dotted_arguments_are_the_same() -> None:
    nested = settings({"auth": "off", "limits": {"phrases": 3}, "models": {"a": "tiny"}, "gpus": 0.5})
    dotted = settings({"auth": "off", "limits.phrases": "3", "models": "{a: tiny}", "gpus": "0.5"})
    assert nested == dotted
    assert (nested.limits.phrases, nested.models, nested.gpus) == (3, {"a": "tiny"}, 0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"batchsize": 8}, "batchsize"),
        ({"limits": {"pixel": 8}}, "limits.pixel"),
        ({"limits.phrases": "none"}, "limits.phrases"),
        ({"auth": "open"}, "auth"),
        ({"models": {"../a": "tiny"}}, "models"),
        ({"port": 70000}, "port"),
    ],
)
def test_typos_are_refused_by_field(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(args)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "keys_file: null"),
        ({"auth": True, "keys_file": "/nowhere/keys"}, "keys_file: /nowhere/keys"),
        ({"auth": False, "models": {}}, "models"),
        ({"auth": False, "batches": {"out": "/nowhere"}}, "batches.roots"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(ServeConfig(gpus=0, device="cpu", **config))


def test_a_job_server_is_no_ray_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS: http://head:8265 is a job server"):
        run(ServeConfig())


def test_paths_hold_in_other_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("serve.app.gpus_per_worker", lambda run, device: 0.0)  # it asks Ray
    (tmp_path / "keys").write_text("a-key\n")
    batches = {"out": "batches", "roots": ["pictures", "/data"]}
    found = resolved(settings({"keys_file": "keys", "batches": batches}))
    assert found.keys_file == str(tmp_path / "keys")
    assert found.batches.out == str(tmp_path / "batches")
    assert found.batches.roots == (str(tmp_path / "pictures"), "/data")


def test_an_open_service_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"auth: off on 0\.0\.0\.0"):
        run(ServeConfig(auth=False, host="0.0.0.0"))


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n\n")
    with pytest.raises(ConfigError, match="holds no key"):
        resolved(ServeConfig(gpus=0, device="cpu", keys_file=str(tmp_path / "keys")))


def test_a_bare_off_of_yaml_is_off(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("auth: off\n")
    for flags in (["--auth=off"], [f"--config={tmp_path / 'a.yaml'}"]):
        assert cli.parse("serve", flags).auth is False


def test_flags_of_the_command() -> None:
    flags = ["--models", "{photos: runs/a, tiny: tiny}", "--limits.body_mb=5", "--batches.roots=[/data]", "--gpus=0.5"]
    config = cli.parse("serve", flags)
    assert list(config.models) == ["photos", "tiny"]
    assert (config.limits.body_mb, config.batches.roots, config.gpus) == (5, ("/data",), 0.5)
    asked = cli.parse("segment", ["a.jpg", "red ring", "dog", "--url=http://x", "--sampling.steps=2"])
    assert (asked.image, asked.phrases, asked.url, asked.sampling.steps) == (
        "a.jpg",
        ("red ring", "dog"),
        "http://x",
        2,
    )


# --- the shipped file for a cluster ----------------------------------------------------------------------------------


def unknown(tree: Any, model: type[pydantic.BaseModel], at: str = "") -> list[str]:
    """Keys of a tree that a pydantic model overlooks."""
    found = []
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            found.append(f"{at}{key}")
            continue
        inner = [a for a in _models(field.annotation) if isinstance(a, type) and issubclass(a, pydantic.BaseModel)]
        for part in value if isinstance(value, list) else [value]:
            if inner and isinstance(part, dict):
                found += unknown(part, inner[0], f"{at}{key}.")
    return found


def _models(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(m for a in inner for m in _models(a))]


def test_the_cluster_file_says_only_what_serve_and_we_understand(root: Path) -> None:
    tree = yaml.safe_load((root / "serve" / "config.yaml").read_text())
    assert unknown(tree, ServeDeploySchema) == []
    ServeDeploySchema.model_validate(tree)
    [application] = tree["applications"]
    config = settings(application["args"])
    assert config.auth is True
    assert config.limits.deadline_s < tree["http_options"]["request_timeout_s"] < config.limits.deadline_s + 10
    assert application["import_path"] == "serve.app:app"


@pytest.mark.parametrize(
    "typo",
    [
        {"http_option": {"port": 1}},
        {"http_options": {"prot": 1}},
        {"applications": [{"import_path": "a:b", "arg": {}}]},
        {"applications": [{"import_path": "a:b", "deployments": [{"name": "Model", "max_queued_request": 3}]}]},
    ],
)
def test_the_check_finds_typos_that_serve_overlooks(typo: dict[str, Any]) -> None:
    assert len(unknown(typo, ServeDeploySchema)) == 1


def test_starting_it_loads_no_networks() -> None:
    code = "import sys, serve.app; print([m for m in ('diffusers', 'transformers', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
