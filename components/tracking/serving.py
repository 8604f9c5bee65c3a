"""A version as MLflow serves it: the bundle, and the code that makes images with it."""

import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import pnp_core
from components.mlflow_place import checkout

CODE = Path(__file__).with_name("served_guide.py")
REQUIRED = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
# An empty text and 0 steps, which mean nothing, stand for the default that the code says.
PARAMS = {
    "base": ("string", ""),
    "model": ("string", ""),
    "negative_prompt": ("string", ""),
    "guidance_scale": ("double", 3.0),  # a version has its own
    "num_steps": ("long", 0),
    "seed": ("long", 0),
    "strength": ("double", 1.0),
}


def make_servable(folder: Path, *, base: str, guidance_scale: float) -> None:
    """Add to a bundle's folder what `mlflow.pyfunc.load_model` and `mlflow models serve` need.

    Args:
        folder: of the bundle; gets MLmodel, the code and its requirements.
        base: where the base is, for callers that don't name one.
        guidance_scale: for callers that don't name one.
    """
    params = PARAMS | {"guidance_scale": ("double", guidance_scale)}
    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [ParamSpec(name, kind, value) for name, (kind, value) in params.items()]
        ),
    )
    # In the checkout, which stays when a workspace that runs with overrides goes.
    place = checkout() / base
    where = str(place.resolve()) if place.exists() else base
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        # It warns, whatever the filters, that there is no hint, which it would take for the schema
        # in place of the signature, and no example.
        with warnings.catch_warnings(record=True):
            mlflow.pyfunc.save_model(
                str(model),
                python_model=str(CODE),
                code_paths=[str(Path(pnp_core.__file__).parent)],
                model_config={"base": where, "guidance_scale": guidance_scale},
                signature=signature,
                pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIRED],
            )
        compiled = shutil.ignore_patterns("__pycache__")
        shutil.copytree(model, folder, dirs_exist_ok=True, ignore=compiled)
