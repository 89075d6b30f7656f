"""device.py: which device, also where GPUs were hidden after torch had seen them."""

from __future__ import annotations

import pytest
import torch

from rlfseg.device import choose_device
from rlfseg.errors import ConfigError


@pytest.mark.parametrize(("visible", "there"), [(None, True), ("0", True), ("2,3", True), ("", False)])
def test_a_gpu_that_was_hidden_after_torch_has_counted_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert choose_device("auto") == ("cuda" if there else "cpu")
    assert choose_device("cpu") == "cpu"
    if there:
        assert choose_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match="this process sees no GPU"):
            choose_device("cuda")


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device("auto") == "cpu"
