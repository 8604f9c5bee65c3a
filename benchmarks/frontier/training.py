"""Trains the rivals that train, and this guide's form: all by one function.

docs/frontier.md says what is the same for all.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from benchmarks.frontier.run import BUNDLES, RUN, Maker, Table, held
from benchmarks.frontier.settings import CONSISTENT, LCM, Setting, climb
from benchmarks.frontier.trained import FOLDER, INDEX, Trained, methods, save
from benchmarks.frontier.workbench import Workbench
from benchmarks.peers import Peer
from benchmarks.peers.training import Trainer, fingerprint
from benchmarks.quality import models_of
from components.device import device
from components.judging import Judge
from components.params import Params
from components.training import open_cache, train_config
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.files import read_json, write_json
from pnp_core.losses import DivergedError
from pnp_core.model_files import weights_hash
from pnp_core.settings import UNSEEN
from pnp_core.train import RECIPE, config_hash

END_STEPS = 4
NOT_THEIRS = {"end_steps", "match_steps", "match_images", "match_learning_rate"}  # of `halve`
TRIAL_SHARE = 0.1  # of the images, for each learning rate that is tried
DIVERGED = 1e9  # in place of a loss
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Where trying begins, for six the best of E164; it goes on to the better neighbour.
FIRST_RATES = {
    "ours": 1e-2,
    "meng": 1e-4,
    "agd": 3e-3,
    "dice": 1e-2,
    "paper-full": 3e-4,
    "paper-tiny": 1e-2,
    "lora-1": 3e-3,
    "lora-8": 1e-3,
    "lcm-1": 1e-3,
    "lcm-8": 1e-3,
}


def train_all(names: Sequence[str], params: Params) -> None:
    """Train these methods, or all, unless that has been done; what another process does is its own.

    Raises ValueError for a name that is none, before anything is trained, and without a cache.
    """
    there = methods(params)
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"no method {', '.join(unknown)}; there are {', '.join(there)}")
    for name in names or there:
        with held(RUN / "jobs" / f"train-{name}", wait=False) as mine:
            if mine:
                train_method(name, params)


def train_method(name: str, params: Params) -> None:
    """Train a method at its best learning rate, and halve it, unless that has been done."""
    trainer = Trainer(params, open_cache(params, None), FOLDER / "checkpoints")
    settings = settings_of(params, trainer.cache)
    folder = FOLDER / name
    if (folder / INDEX).exists() and settings.items() <= read_json(folder / INDEX).items():
        return
    rate, tried = best_rate(name, trainer, settings)
    peer = fit(name, trainer, rate)
    peers = {params.halve.start_steps: peer}
    if name not in CONSISTENT:
        # as much lower than its own rate in training as `halve` has it for the guide
        slower = rate * params.halve.learning_rate / params.distill.learning_rate
        peers = trainer.halve(name, peer, learning_rate=slower, end_steps=END_STEPS)
    own, base = (sum(p.numel() for p in part.parameters()) for part in (peer, trainer.unet))
    about = {"learning_rate": rate, "tried": tried, "params_ratio": own / base, **settings}
    save(folder, peers, about)


def settings_of(params: Params, cache: TeacherCache) -> dict[str, Any]:
    """What rivals must have in common to be compared: settings, base, companions and prompts.

    Not the cache's bytes: made anew, by the same settings, they differ in rounding.
    """
    sections = (params.prepare, params.cache, params.teacher, params.distill, params.halve)
    as_text = (section.model_dump_json(exclude=UNSEEN | NOT_THEIRS) for section in sections)
    identity = (*as_text, *cache.companions, *cache.prompts, RECIPE)
    settings = config_hash(train_config(params.distill), *identity)
    return {
        "base_hash": weights_hash(params.base)[:16],
        "settings": settings,
        "num_images": params.distill.num_images,
        "num_images_in_a_round": params.halve.num_images,
    }


def fit(name: str, trainer: Trainer, rate: float, *, losses: list[float] | None = None) -> Peer:
    """The method after its training; with ``losses``, which it fills, after a share of it."""
    section, is_trial = trainer.params.distill, losses is not None
    return trainer.fit(
        name,
        methods(trainer.params)[name],
        learning_rate=rate,
        num_images=int((TRIAL_SHARE if is_trial else 1) * section.num_images),
        batch_size=section.batch_size,
        losses=losses,
        is_trial=is_trial,
    )


def best_rate(
    name: str, trainer: Trainer, settings: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """The learning rate that a short training does best with, and what each one tried gave.

    By the training loss at its end. A consistency LoRA's is a distance from itself, so it goes by
    FID in few steps of the images that settings are chosen by.
    """
    path = FOLDER / "checkpoints" / f"{name}-rates.json"
    kept = read_json(path) if path.exists() else {}
    tried: dict[str, float] = kept["tried"] if kept.get("settings") == settings else {}

    def cost(rate: float) -> float:
        key = f"{rate:g}"
        if key not in tried:
            losses: list[float] = []
            try:
                peer = fit(name, trainer, rate, losses=losses)
            except DivergedError as error:
                print(f"{name} at {key}: {error}", flush=True)
                tried[key] = DIVERGED
            else:
                is_blind = name in CONSISTENT
                tried[key] = fid_in_few_steps(name, peer, trainer) if is_blind else losses[-1]
            write_json(path, {"settings": settings, "tried": tried})
        return tried[key]

    return climb(FIRST_RATES[name], cost, RATES), tried


def fid_in_few_steps(name: str, peer: Peer, trainer: Trainer) -> float:
    """Of a consistency LoRA on the base."""
    params = trainer.params
    about = {"digest": hashlib.sha256(fingerprint(peer).encode()).hexdigest()[:16]}
    rival = Trained(peers={params.halve.start_steps: peer}, about=about)
    bundles = {"guided": GuideBundle.load(BUNDLES["guided"])}
    bench = Workbench("base", models_of(params)["base"], params, bundles, {name: rival})
    judge = Judge(params.evaluate.judges[0], device())
    maker = Maker(bench, Table(FOLDER / "no-rows.json", {}), judge, None)
    return maker.fid_of_few(Setting(method=name, solver=LCM, num_steps=END_STEPS, scale=4.0))
