"""Rivals that train, and this guide's form beside them: trained and halved alike, by one function.

What is trained lies in runs/frontier/trained, a folder a method. docs/frontier.md says what is the
same for all.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks.frontier.settings import CONSISTENT, climb
from benchmarks.peers import TRAINED, Ours, Peer
from benchmarks.peers.lora import LowRankPeer
from benchmarks.peers.training import Trainer
from components.params import Params
from components.paths import RUNS
from components.training import open_cache
from pnp_core.bundle import nearest
from pnp_core.files import read_json, sha256_file, write_json, write_tensors

FOLDER = RUNS / "frontier/trained"
INDEX = "trained.json"
METHODS: dict[str, Callable[[UNet2DConditionModel], Peer]] = {"ours": Ours, **TRAINED}
END_STEPS = 4
TRIAL_SHARE = 0.1  # of the images, for each learning rate that is tried
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Where trying begins; it goes on to the better neighbour.
FIRST_RATES = {
    "ours": 3e-3,
    "meng": 1e-4,
    "agd": 1e-2,
    "dice": 3e-3,
    "paper-full": 3e-4,
    "paper-tiny": 3e-3,
    "lora-1": 1e-3,
    "lora-8": 1e-3,
    "lcm-1": 1e-3,
    "lcm-8": 1e-3,
}


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


def trained(unet: UNet2DConditionModel) -> dict[str, Trained]:
    """The methods that have been trained, for this base, by name."""
    found = {}
    for name, make in METHODS.items():
        folder = FOLDER / name
        if not (folder / INDEX).exists():
            continue
        about = read_json(folder / INDEX)
        peers = {}
        for num_steps in about["num_steps"]:
            peer = make(unet).to(unet.device)
            peer.load_state_dict(load_file(folder / f"steps-{num_steps}.safetensors"))
            peers[num_steps] = peer.requires_grad_(False).eval()
        found[name] = Trained(peers=peers, about=about)
    return found


def train_method(name: str, params: Params) -> None:
    """Train a method at its best learning rate, and halve it, unless that has been done.

    Raises ValueError if there is no method of this name, or if `dvc repro cache` has left no cache.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name}; there are {', '.join(METHODS)}")
    trainer = Trainer(params, open_cache(params, None), FOLDER / "checkpoints")
    settings = {
        "cache": trainer.cache.content_hash,
        "num_images": params.distill.num_images,
        "batch_size": params.distill.batch_size,
        "num_images_in_a_round": params.halve.num_images,
        "start_steps": params.halve.start_steps,
        "guidance_gain": params.halve.guidance_gain,
    }
    folder = FOLDER / name
    if (folder / INDEX).exists() and settings.items() <= read_json(folder / INDEX).items():
        return
    tried: dict[str, float] = {}

    def fit(rate: float, share: float, losses: list[float]) -> Peer:
        num_images = int(share * params.distill.num_images)
        return trainer.fit(
            name,
            METHODS[name],
            learning_rate=rate,
            num_images=num_images,
            batch_size=params.distill.batch_size,
            losses=losses,
        )

    def loss_at(rate: float) -> float:
        losses: list[float] = []
        try:
            fit(rate, TRIAL_SHARE, losses)
        except ValueError as error:  # it diverged
            print(f"{name} at {rate:g}: {error}", flush=True)
            return math.inf
        tried[f"{rate:g}"] = losses[-1]
        return losses[-1]

    rate = climb(FIRST_RATES[name], loss_at, RATES)
    peer = fit(rate, 1.0, [])
    peers = {params.halve.start_steps: peer}
    if name not in CONSISTENT:
        # as much lower than its own rate in training as `halve` has it for the guide
        slower = rate * params.halve.learning_rate / params.distill.learning_rate
        peers = trainer.halve(name, peer, learning_rate=slower, end_steps=END_STEPS)
    own, base = (sum(p.numel() for p in part.parameters()) for part in (peer, trainer.unet))
    about = {"learning_rate": rate, "tried": tried, "params_ratio": own / base, **settings}
    save(folder, peers, about)


def save(folder: Path, peers: dict[int, Peer], about: dict[str, Any]) -> None:
    """Write the weights, and then what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    checksums = []
    for num_steps, peer in sorted(peers.items()):
        path = folder / f"steps-{num_steps}.safetensors"
        write_tensors(path, peer.state_dict(), {})
        checksums.append(f"{num_steps} {sha256_file(path)}")
    digest = hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:16]
    write_json(folder / INDEX, {"digest": digest, "num_steps": sorted(peers), **about})


def generators(seeds: list[int]) -> list[torch.Generator]:
    """Of the noise between the steps of consistency sampling, one an image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
