"""A random base, a guide for it, and a pipeline of its own for each test."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from pnp_core.guide import Guide
from tests.pipeline_zoo import Parts
from tests.reference import guide_for, random_parts, with_unet


@pytest.fixture(scope="package")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return random_parts(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="package")
def guide(parts: Parts) -> Guide:
    """For the base."""
    return guide_for(parts.base.unet)


@pytest.fixture
def pipe(parts: Parts) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return with_unet(parts, copy.deepcopy(parts.base.unet))
