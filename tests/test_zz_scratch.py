import os, importlib, pkgutil
import pytest

def test_task(ray):
    @ray.remote
    def f():
        import os, rlfseg
        return rlfseg.__version__, os.environ["HOME"], os.environ.get("RAY_AUTH_MODE"), os.environ.get("OMP_NUM_THREADS")
    print(ray.get(f.remote()), os.environ.get("RAY_AUTH_MODE"))
    assert ray.get(f.remote())[0] == "0.1.0"
    assert ray.cluster_resources()["CPU"] == 8

def test_data(ray):
    import ray.data
    ds = ray.data.range(10).map_batches(lambda b: {"id": b["id"] * 2}, batch_size=2)
    assert sorted(r["id"] for r in ds.take_all())[-1] == 18

@pytest.mark.parametrize("m", ["mlflow", "ray.serve", "ray.train.torch", "matplotlib.pyplot", "diffusers", "transformers", "peft", "segment_anything", "torchmetrics", "jsonargparse", "fastapi.testclient", "sklearn.cluster", "imagehash", "stamina", "httpx", "pycocotools.mask", "moto"])
def test_lib(m):
    pytest.importorskip(m, exc_type=ModuleNotFoundError)

import rlfseg
@pytest.mark.parametrize("m", [x.name for x in pkgutil.walk_packages(rlfseg.__path__, "rlfseg.")])
def test_mod(m):
    importlib.import_module(m)

def test_tiny_mlflow(tmp_path):
    import mlflow
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    mlflow.set_experiment("x")
    with mlflow.start_run():
        mlflow.log_metric("a", 1.0)

def test_clip(shared_data):
    from transformers import CLIPTextModel, CLIPTextConfig
    from diffusers import UNet2DConditionModel, AutoencoderKL
    from peft import LoraConfig, get_peft_model
    import torch
    u = UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D","DownBlock2D"), up_block_types=("UpBlock2D","CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8)
    p = get_peft_model(u, LoraConfig(r=4, target_modules=["to_q"]))
    p.save_pretrained("/tmp/zz_lora")
    t = CLIPTextModel(CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
    t(torch.zeros(1, 77, dtype=torch.long))
    AutoencoderKL()
@pytest.mark.gpu
@pytest.mark.fault("ckpt-01")
def test_gpu(): ...
