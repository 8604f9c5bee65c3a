"""Rivals that train, and this guide's form beside them, after their training.

They lie in runs/frontier/trained, a folder a method; benchmarks/frontier/training.py trains them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_model, save_model

from benchmarks.peers import TRAINED, Ours, Peer
from benchmarks.peers.lora import LowRankPeer
from components.params import Params
from components.paths import RUNS
from pnp_core.bundle import nearest
from pnp_core.files import atomic_file, read_json, sha256_file, write_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.model_files import weights_hash

FOLDER = RUNS / "frontier/trained"
INDEX = "trained.json"
Make = Callable[[UNet2DConditionModel], Peer]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A method after its training.

    Attributes:
        peers: by number of steps; that of the most is as it was before halving.
        about: what the results say of it.
    """

    peers: dict[int, Peer]
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identity of its weights."""
        return str(self.about["digest"])

    @property
    def merges(self) -> bool:
        """Whether it is merged into the weights before a run, so that a step costs nothing more."""
        return isinstance(next(iter(self.peers.values())), LowRankPeer)

    def peer(self, num_steps: int, solver: str) -> Peer:
        """That of the nearest number of steps under DDIM; under others, as before halving."""
        at = nearest(self.peers, num_steps) if solver == "ddim" else max(self.peers)
        return self.peers[at]


def methods(params: Params) -> Mapping[str, Make]:
    """What makes a fresh one of each method; ours is of the form that params.yaml says."""
    form = GuideConfig(**params.distill.guide.model_dump())
    return {"ours": partial(ours, form), **TRAINED}


def ours(form: GuideConfig, unet: UNet2DConditionModel) -> Peer:
    """This project's guide."""
    return Ours(unet, Guide.from_unet(unet, form))


def trained(unet: UNet2DConditionModel, params: Params) -> dict[str, Trained]:
    """The methods that have been trained for this base, by name."""
    found, base = {}, weights_hash(params.base)[:16]
    for name, make in methods(params).items():
        folder = FOLDER / name
        about = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
        if about.get("base_hash") != base:
            continue
        peers = {}
        for num_steps in about["num_steps"]:
            peer = make(unet).to(unet.device)
            load_model(peer, folder / f"steps-{num_steps}.safetensors")
            peers[num_steps] = peer.requires_grad_(False).eval()
        found[name] = Trained(peers=peers, about=about)
    return found


def save(folder: Path, peers: dict[int, Peer], about: dict[str, Any]) -> None:
    """Write the weights, and then what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    checksums = []
    for num_steps, peer in sorted(peers.items()):
        path = folder / f"steps-{num_steps}.safetensors"
        with atomic_file(path) as new:
            save_model(peer, str(new))  # a layer of diffusers may have two names
        checksums.append(f"{num_steps} {sha256_file(path)}")
    digest = hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:16]
    write_json(folder / INDEX, {"digest": digest, "num_steps": sorted(peers), **about})


def generators(seeds: list[int]) -> list[torch.Generator]:
    """Of the noise between the steps of consistency sampling, one an image.

    None gives what :func:`pnp_core.sample.initial_noise` draws from the same seed.
    """
    return [torch.Generator().manual_seed(NOISE_SEEDS + seed) for seed in seeds]


NOISE_SEEDS = 3_000_000
