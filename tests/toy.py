"""A toy world: everything the pipeline needs, tiny, random and made in a second.

`make_world(folder)` writes a base in the Stable Diffusion architecture, a fine-tune of it, a judge,
data and a params.yaml that runs the whole pipeline on them in seconds a stage.
"""

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from ruamel.yaml import YAML
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

AnyUNet = TypeVar("AnyUNet", bound=UNet2DConditionModel)

ROOT = Path(__file__).parent.parent
RESOLUTION = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
COLOURS |= {"white": (250, 250, 250), "black": (10, 10, 10), "yellow": (240, 220, 30)}
PROMPTS = [f"{colour} {shape}" for colour in COLOURS for shape in ("square", "disc", "bar", "ring")]


def make_world(folder: Path) -> None:
    """Write models/, art/ and params.yaml into `folder`."""
    torch.manual_seed(0)
    base = make_pipeline(folder / "tokenizer")
    base.save_pretrained(folder / "models/base")
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    base.unet.save_pretrained(folder / "models/tuned/unet")
    make_judge(base.tokenizer, folder / "models/judge")
    make_art(folder / "art/main.parquet", brightness=0.7)
    make_art(folder / "art/tuned.parquet", brightness=1.0)
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    base.unet.save_pretrained(folder / "companions/other/unet")
    (folder / "prompts.txt").write_text("green disc on a red bar\ntwo rings\n")
    write_params(folder, toy_params())


def make_repository(folder: Path, params: dict[str, Any] | None = None) -> None:
    """A checkout of this repository with the toy world in place of the zoo, committed."""
    for name in ("components", "flows", "pnp_core"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".dvc").mkdir()
    names = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "dvc.yaml")
    for name in (*names, "prefect.yaml", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    make_world(folder)
    if params:
        write_params(folder, params)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "toy")):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def untouched_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()  # slow the first time
    return folder


@pytest.fixture
def world(untouched_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy world of its own for each test, which is the working directory."""
    folder = tmp_path / "world"
    shutil.copytree(untouched_world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it, for good
    return folder


@contextmanager
def inside_copy(world: Path, parent: Path) -> Iterator[Path]:
    """A copy of a toy world, which is the working directory while this is open."""
    folder = parent / "world"
    shutil.copytree(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="session")
def trained_world(untouched_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world in which every stage up to register has run."""
    from components import cache, distill, evaluate, halve, prepare, register
    from components.params import load_params

    with inside_copy(untouched_world, tmp_path_factory.mktemp("trained")) as folder:
        params = load_params(Path("params.yaml"))
        for stage in (prepare, cache, distill, halve):
            stage.run(params)
        for model in params.models:
            evaluate.run(params, model)
        register.run(params)
    return folder


def small_unet(cls: type[AnyUNet]) -> AnyUNet:
    """Random, of two channels, 4 x 4 pixels and texts 16 wide."""
    torch.manual_seed(0)
    return cls(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=16,
        norm_num_groups=4,
    )


def ddim(**changes: Any) -> DDIMScheduler:
    """With Stable Diffusion's betas."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        **{"timestep_spacing": "trailing", **changes},
    )


def make_pipeline(tokenizer_folder: Path) -> StableDiffusionPipeline:
    """A random base: 4x4 latents of 4 channels, 32 px images."""
    text = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=len(vocabulary()) - 2,
        eos_token_id=len(vocabulary()) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=make_tokenizer(tokenizer_folder),
        unet=unet,
        scheduler=ddim(set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_xl_pipeline(base: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """A random base in the SDXL architecture, with the VAE and first text encoder of `base`."""
    text = base.text_encoder.config.to_dict()
    text_2 = CLIPTextConfig(**{**text, "hidden_size": 48, "projection_dim": 24})
    plain = {key: value for key, value in base.unet.config.items() if key[0] != "_"}
    unet = UNet2DConditionModel.from_config(
        {
            **plain,
            "cross_attention_dim": 32 + 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        }
    )
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=base.scheduler,
        add_watermarker=False,
    )


def vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer that spells."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def make_judge(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A random CLIP of 16 features."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**small, "vocab_size": len(vocabulary()), "max_position_embeddings": 16}
    text["eos_token_id"] = len(vocabulary()) - 1
    vision = {**small, "image_size": RESOLUTION, "patch_size": 8}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    images = CLIPImageProcessor(size=size, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def make_art(path: Path, *, brightness: float) -> None:
    """One noisy picture for each prompt; a sixth of the prompts is held out."""
    generator = np.random.default_rng(0)
    rows = []
    for number, prompt in enumerate(PROMPTS):
        colour, shape = prompt.split()
        y, x = np.mgrid[-1 : 1 : RESOLUTION * 1j, -1 : 1 : RESOLUTION * 1j]
        inside = {
            "square": np.maximum(abs(x), abs(y)) < 0.6,
            "disc": x**2 + y**2 < 0.5,
            "bar": abs(y) < 0.3,
            "ring": abs(x**2 + y**2 - 0.4) < 0.2,
        }[shape]
        picture = np.where(inside[..., None], COLOURS[colour], 128) * brightness
        picture = (picture + generator.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)
        split = "heldout" if number % 6 == 0 else "train"
        rows.append({"image": encoded(picture), "caption": prompt, "split": split})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def encoded(picture: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def toy_params() -> dict[str, Any]:
    """The params.yaml of the toy world, to be changed at will."""
    train = {
        "num_images": 64,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_images": 16,
        "ema_halflife_images": 16,
        "max_grad_norm": 1.0,
        "precision": "fp32",
        "report_every_images": 16,
        "checkpoint_every_images": 32,
        "seed": 0,
    }
    return {
        "base": "models/base",
        "models": {
            "base": {"path": "models/base", "reference": "data/prepared"},
            "tuned": {"path": "models/tuned", "reference": "art/tuned.parquet"},
        },
        "companions": "companions",
        "storage": None,
        "teacher": {"guider": "ClassifierFreeGuidance", "arguments": {}},
        "prepare": {
            "dataset": "art",
            "files": ["main.parquet"],
            "image_column": "image",
            "caption_column": "caption",
            "prompts": "prompts.txt",
            "resolution": RESOLUTION,
            "heldout_fraction": 0.2,
        },
        "cache": {
            "num_forward": 32,
            "num_trajectory": 16,
            "trajectory_steps": 4,
            "guidance_scale": [1.0, 8.0],
            "negative_fraction": 0.2,
            "precision": "fp32",
            "batch_size": 16,
            "shard_size": 16,
            "seed": 0,
        },
        "distill": {
            **train,
            "guide": {"kind": "tiny", "max_parameters_ratio": 0.2},
            "guidance_scale": [1.0, 8.0],
        },
        "halve": {
            **train,
            "start_steps": 8,
            "end_steps": 2,
            "guidance_gain": 1.2,
            "timestep_spacing": "trailing",
            "match_steps": 2,
            "match_images": 32,
            "match_learning_rate": 1e-3,
        },
        "evaluate": {
            "judges": ["models/judge"],
            "review": "quick",
            "num_images": 64,
            "num_steps": [4, 2],
            "guidance_scale": 4.0,
            "guidance_scales": [],
            "full": {"num_images": 72, "num_steps": [4, 2, 1], "guidance_scales": [2.0]},
            "negative_prompts": ["red"],
            "precision": "fp32",
            "batch_size": 32,
            "timed_batch_size": 4,
            "grid_prompts": ["green bar", "blue ring"],
            "seed": 0,
        },
        "register": {"name": "pnp-guide"},
        "promote": {
            "min_images": 4,
            "guidance_fvu": {"most": 100.0, "max_loss": 100.0},
            "flops_ratio": {"most": 100.0, "max_loss": 100.0},
            "scores": {},  # of a random model, CFG gains nothing
            "at_steps": {},
        },
        "tracking": {"uri": None, "experiment": "toy"},
        "cluster": {"num_workers": 0, "max_failures": 1, "wait_minutes": 1},
    }


def write_params(folder: Path, params: dict[str, Any]) -> None:
    """Write `folder`/params.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)
