"""Fixtures that most tests share."""

import copy
import gc
import io
import os
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve a busy machine

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from sqlalchemy import Engine, event

from components import environment, sampling
from pnp_core.cache import CacheBuilder, CacheConfig, Example, TeacherCache, build_cache
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.identity import BaseIdentity
from tests.toy import make_pipeline, make_xl_pipeline

torch.set_num_threads(1)  # the tests' models are too small for more
os.fsync = lambda descriptor: None  # no test cuts the power, and a disk takes 16 ms for each
sampling.TIMING_REPEATS = 1  # no test goes by how long something took
gc.disable()  # until all is imported: it would look for cycles among modules again and again
environment.MALLOPT.clear()  # a stage that runs in this process would keep what it frees


def pytest_collection_finish() -> None:
    """What is imported by now stays, and is not looked through for cycles again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """What libraries look for at the end of a process, as nanobind does, is let go."""
    gc.unfreeze()
    gc.enable()


# Files whose tests are to be run by one worker, as they share what takes long to make: a Prefect
# server, a trained world.
WITH = {"tests/test_promote_flow.py": "tests/test_flows.py"}
WITH |= {"tests/test_pipeline.py": "tests/test_stages.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker for each file, or for the files that go together."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return WITH.get(file, file)

    return Together(config, log)


@pytest.fixture(autouse=True)
def no_handles_of_ray(request: pytest.FixtureRequest) -> None:
    """Each start of Ray numbers actors anew, and a handle of the last would end one of them."""
    if request.node.get_closest_marker("services"):  # only there is Ray started
        gc.collect()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of this process's own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60):
        yield


@event.listens_for(Engine, "connect")
def do_not_wait_for_the_disk(connection: object, _: object) -> None:
    """Of MLflow's databases, for the same reason."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base, saved."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    make_pipeline(folder / "tokenizer").save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="session")
def untouched_pipe(toy_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(untouched_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A random base of its own for each test."""
    return copy.deepcopy(untouched_pipe)  # in half the time that reading it takes


@pytest.fixture
def xl_pipe(pipe: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """A random base in the SDXL architecture."""
    torch.manual_seed(0)
    xl = make_xl_pipeline(pipe)
    xl.set_progress_bar_config(disable=True)
    return xl


def roused(guide: Guide, scale: float = 0.1) -> Guide:
    """The guide with random weights in place of its zeros, as if it had been trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if name.endswith("offset") and guide.config.num_steps is None:
                continue  # only halving moves these
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return guide.eval()


def changed(unet: UNet2DConditionModel, scale: float = 0.01) -> UNet2DConditionModel:
    """As if it had been fine-tuned."""
    other = UNet2DConditionModel.from_config(unet.config)
    torch.manual_seed(1)
    other.load_state_dict(
        {k: v + scale * torch.randn(v.shape) for k, v in unet.state_dict().items()}
    )
    return other


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def save_lora(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """Save a random LoRA for `unet`; a copy of the UNet that carries it."""
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(adapted)
    )
    return adapted


@pytest.fixture(params=KINDS)
def guide(request: pytest.FixtureRequest, pipe: StableDiffusionPipeline) -> Guide:
    """A fresh guide of each kind."""
    torch.manual_seed(1)
    return Guide.from_unet(pipe.unet, GuideConfig(kind=request.param, max_parameters_ratio=0.2))


@pytest.fixture
def tiny(pipe: StableDiffusionPipeline) -> Guide:
    """A tiny guide that does something."""
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(24):
        file = io.BytesIO()
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        made.append(Example(image=file.getvalue(), prompt=f"thing {'abcdef'[number % 6]}"))
    return made


BASE = BaseIdentity(base_hash="base", unet="unet", scheduler="ddim", text="text", vae="vae")
CACHE_CONFIG = CacheConfig(
    num_forward=40,
    num_trajectory=20,
    trajectory_steps=5,
    negative_fraction=0.3,
    batch_size=16,
    shard_size=16,
    precision="fp32",
)


@pytest.fixture(scope="session")
def cache_folder(
    toy_folder: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete cache of the toy base."""
    folder = tmp_path_factory.mktemp("cache")
    pipe = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    builder = CacheBuilder(pipe, examples, CACHE_CONFIG, folder, base=BASE, data_hash="data")
    build_cache(builder)
    return folder


@pytest.fixture
def cache(cache_folder: Path) -> TeacherCache:
    return TeacherCache.open(cache_folder)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server of this process's own."""
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    # A server forgets nothing: its state is this process's.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/prefix"
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
