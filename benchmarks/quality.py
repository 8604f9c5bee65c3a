r"""The guide against CFG and against the other ways to save a forward: on the base, on fine-tunes.

    python -m benchmarks.quality --run      # train the peers, sample everything: hours on a CPU
    python -m benchmarks.quality --json     # what the committed results say

`--run` needs what `dvc repro` leaves: data/cache and guides/bundle. The committed rows are of

    dvc exp run -S cache.num_trajectory=76000 -S distill.num_images=144000 \
        -S distill.batch_size=16 -S distill.warmup_images=2000 \
        -S distill.ema_halflife_images=5000 -S halve.start_steps=128 -S halve.end_steps=2 \
        -S halve.num_images=6000 -S halve.warmup_images=1000 -S halve.ema_halflife_images=1000 halve

as it was when zoo/guide was made; the card there says what differs. Every peer sees as many images
as `distill` did, by the same loss and optimizer, in batches of 32, at the best of three learning
rates, each tried for a tenth of them. Add-ons see what the guide sees, the base's pairs in every
other step and the companions' in turns; the whole UNet, which can't sit in a companion, the base's.
Results go to benchmarks/results/quality.json and quality.md; a row that is there, of as many images
as are wanted, is not made again: after a change of the guide, `--run --anew guided`. Rows of
another base, judge or setting are dropped, and all are made anew.

`guidance_fvu` is measured along CFG trajectories of held-out prompts, FID by the judge that the
results name. CFG at half the steps costs what a guide costs, and trains nothing.

The guide's FID is that of the guide halved to the nearest step count, with `halve.guidance_gain`,
its `guidance_fvu` that of the guide before halving, without; the peers have neither.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import command_parser, run_command
from benchmarks.peers import PEERS, Ours, Peer
from benchmarks.peers.training import Trainer
from benchmarks.quality_table import LABELS, PEER_STEPS, STEPS, as_markdown, summary
from benchmarks.record import digest, forget, note, precision_on, record
from components.dataset import reference_images
from components.device import device
from components.images import Task, batches
from components.judging import Judge
from components.params import Model, Params
from components.paths import BUNDLE, CACHE, RUNS
from components.progress import Progress
from components.rows import load_row
from components.sampling import Sampler, choose_tasks
from components.scores import fid, kid
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import Denoiser
from pnp_core.files import read_json, write_json, write_text
from pnp_core.identity import base_identity
from pnp_core.losses import DivergedError
from pnp_core.metrics import psnr
from pnp_core.model_files import weights_hash

RESULTS = Path("benchmarks/results/quality.json")
LEARNING_RATES = {"meng": (3e-5, 1e-4, 3e-4), "agd": (3e-3, 1e-2, 3e-2), "dice": (1e-3, 3e-3, 1e-2)}
TRIAL_SHARE = 0.1
PEER_BATCH_SIZE = 32
# Images of a row, over `evaluate.num_images`: of 192, the guide's FID over CFG's is another by 0.05
# with other seeds, which is more than it is from 1.
MORE_IMAGES = 3
ZOO = ("fluent-emoji-high-contrast", "noto-v1", "emojione-monotone-lora", "emojione-v1")


class Methods(Sampler):
    """The stage's sampler, with the peers as further methods."""

    in_threads = False  # a peer's hooks in the UNet act in every thread

    def __init__(self, *args: Any, peers: Mapping[str, Peer]) -> None:
        super().__init__(*args)
        self.students = {
            name: peer.denoiser(self.pipe.unet, self.schedule) for name, peer in peers.items()
        }

    def denoiser(self, method: str, num_steps: int) -> Denoiser:
        """Also a peer's, by its name; "cfg_half" is CFG, and its caller halves the steps."""
        if method in self.students:
            return self.students[method]
        return super().denoiser("cfg" if method == "cfg_half" else method, num_steps)


def models_of(params: Params) -> dict[str, Model]:
    """Those of params.yaml, and the zoo's further fine-tunes."""
    models = dict(params.models)
    for name in ZOO:
        reference = f"zoo/data/{name.removesuffix('-lora')}.parquet"
        if Path("zoo/models", name).exists() and name not in models:
            models[name] = Model(path=f"zoo/models/{name}", reference=reference)
    return models


def methods_on(row: Model, params: Params, peers: Mapping[str, Peer]) -> Methods:
    """A sampler of this model by the guides of guides/bundle and by these peers."""
    pipe = load_row(row, params.base)
    bundle = GuideBundle.load(BUNDLE).to(pipe.unet.device)
    return Methods(pipe, bundle, params, peers=peers)


def train_peer(
    name: str, params: Params, cache: TeacherCache, best: float | None = None
) -> tuple[Peer, float]:
    """A peer that has seen as many images as the guide, and its learning rate.

    Without ``best``, rates are tried. An interrupted training goes on from its checkpoint in
    runs/peers.
    """
    trainer = Trainer(params, cache, RUNS / "peers")
    full = params.distill.num_images

    def fit(learning_rate: float, num_images: int) -> Peer:
        return trainer.fit(
            name,
            PEERS[name],
            learning_rate=learning_rate,
            num_images=num_images,
            batch_size=PEER_BATCH_SIZE,
        )

    if best is not None:
        return fit(best, full), best
    row = models_of(params)["base"]
    tasks = [t for t in choose_tasks(params.evaluate) if t.is_heldout]
    trials = {}
    for rate in LEARNING_RATES[name]:
        try:
            trial = fit(rate, int(TRIAL_SHARE * full))
        except DivergedError as error:
            print(f"{name} at {rate:g}: {error}", file=sys.stderr)
            continue
        trials[rate] = methods_on(row, params, {name: trial}).guidance_fvu(tasks, name)
    best = min(trials, key=lambda rate: trials[rate])
    return fit(best, full), best


def results_so_far(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What a file of results holds, or nothing if it was made in another setting."""
    if path.exists():
        results: dict[str, Any] = read_json(path)
        if results["setting"] == setting:
            return results
        print(f"{path} is of another base or setting: all is made anew", file=sys.stderr)
    return {"setting": setting}


def run(params: Params, anew: str | None = None) -> None:
    """Fill in what the results lack, or make the rows of one method ``anew``.

    Raises ValueError if there is no cache or no bundle.
    """
    judge = Judge(params.evaluate.judges[0], device())
    setting = {
        "judge": judge.name,
        "guidance_scale": params.evaluate.guidance_scale,
        "images_seen": params.distill.num_images,
        "images_seen_in_a_round": params.halve.num_images,
        "base_hash": weights_hash(params.base)[:16],
    }
    results = results_so_far(RESULTS, setting)
    rows: dict[str, Any] = results.setdefault("models", {})
    if anew:
        forget(results, anew)
        for made in rows.values():
            made.pop(anew, None)
    cache = TeacherCache.open(CACHE, base=base_identity(params.base))
    tasks = tasks_of(params)
    todo = missing(rows, params, [anew] if anew else list(LABELS), len(tasks))
    wanted = {method for pairs in todo.values() for method, _ in pairs}
    peers = train_peers([name for name in PEERS if name in wanted], params, cache, results)
    costs = results["costs"]
    costs["guided"] = cost_of("guided", params, None) | pairs_seen(cache, is_add_on=True)
    made_by = record(guide=digest(GuideBundle.load(BUNDLE)), precision=precision_of(params))
    for model, row in models_of(params).items():
        if not todo[model]:
            continue
        methods = methods_on(row, params, peers)
        references = judge.features(reference_images(row.reference, params))
        progress = Progress(f"quality of {model}", len(todo[model]), "rows")
        cfg: dict[int, np.ndarray] = {}
        for number, (method, num_steps) in enumerate(todo[model], 1):
            done = rows[model].setdefault(method, {})
            done |= row_of(methods, method, num_steps, tasks, judge, references, cfg)
            note(results, method, made_by)
            progress(number, f"{LABELS[method]}, {num_steps} steps")
            write_json(RESULTS, results)
    write_json(RESULTS, results)
    write_text(RESULTS.with_suffix(".md"), as_markdown(results))


def precision_of(params: Params) -> str:
    """What training and sampling are computed in; ``guidance_fvu`` always is in fp32."""
    trained, sampled = (
        precision_on(device().type, each.precision) for each in (params.distill, params.evaluate)
    )
    return f"{trained} in training, {sampled} in sampling"


def missing(
    rows: dict[str, Any], params: Params, wanted: Sequence[str], num_images: int
) -> dict[str, list[tuple[str, int]]]:
    """By model, the methods and step counts that have no row of so many images yet."""
    return {
        model: [
            (method, n)
            for method in wanted
            for n in (PEER_STEPS if method in PEERS or method == "cfg_half" else STEPS)
            if rows.setdefault(model, {}).get(method, {}).get(str(n), {}).get("num_images")
            != num_images
        ]
        for model in models_of(params)
    }


def train_peers(
    names: Sequence[str], params: Params, cache: TeacherCache, results: dict[str, Any]
) -> dict[str, Peer]:
    """The peers of these names; what each costs goes into the results."""
    costs = results.setdefault("costs", {})
    peers = {}
    for name in names:
        known = costs.get(name, {}).get("learning_rate")
        peers[name], rate = train_peer(name, params, cache, known)
        costs[name] = cost_of(name, params, peers[name])
        costs[name] |= {"learning_rate": rate, **pairs_seen(cache, PEERS[name].is_add_on)}
        write_json(RESULTS, results)
    return peers


def pairs_seen(cache: TeacherCache, is_add_on: bool) -> dict[str, int]:
    """How many teacher pairs a method is trained on, and of how many companions besides."""
    return {
        "pairs": int(cache.starts[-1 if is_add_on else 1]),
        "companions": len(cache.companions) if is_add_on else 0,
    }


def row_of(  # noqa: PLR0913, a cell of the table, and what all cells share
    methods: Methods,
    method: str,
    num_steps: int,
    tasks: Sequence[Task],
    judge: Judge,
    references: np.ndarray,
    cfg: dict[int, np.ndarray],
) -> dict[str, Any]:
    """Sample and judge a method at a step count.

    Args:
        methods: samples the model.
        method: a name that `methods` knows.
        num_steps: of the table; CFG at half the steps takes half of them.
        tasks: one image each.
        judge: gives features, and the CLIP score.
        references: features of real images, for FID and KID.
        cfg: CFG's images by step count; those that are missing are made.
    """
    made = images(methods, method, num_steps // 2 if method == "cfg_half" else num_steps, tasks)
    features = judge.features(made)
    scores: dict[str, float] = {
        "num_images": len(tasks),
        "fid": fid(features, references),
        "kid": kid(features, references),
        "clip_score": float(judge.clip_scores(made, [task.prompt for task in tasks]).mean()),
    }
    if num_steps in PEER_STEPS and method != "cfg":
        if num_steps not in cfg:
            cfg[num_steps] = images(methods, "cfg", num_steps, tasks)
        scores["cfg_psnr"] = float(psnr(made, cfg[num_steps]).mean())
    row: dict[str, Any] = {str(num_steps): scores}
    if method in (*PEERS, "guided") and num_steps == PEER_STEPS[0]:
        heldout = [task for task in tasks if task.is_heldout]
        row["guidance_fvu"] = methods.guidance_fvu(heldout, method)
    return row


def tasks_of(params: Params) -> list[Task]:
    """What is sampled for the table: MORE_IMAGES times what `evaluate` samples."""
    config = params.evaluate
    return choose_tasks(config.model_copy(update={"num_images": MORE_IMAGES * config.num_images}))


def images(methods: Methods, method: str, num_steps: int, tasks: Sequence[Task]) -> np.ndarray:
    """Sampled uint8 images (N, height, width, 3), one for each task."""
    parts = batches(tasks, methods.config.batch_size)
    return np.concatenate([methods.images(method, part, num_steps) for part in parts])


def cost_of(method: str, params: Params, peer: Peer | None) -> dict[str, float]:
    """See :meth:`benchmarks.peers.Peer.cost`; by default of the guide before halving."""
    methods = methods_on(models_of(params)["base"], params, {} if peer is None else {method: peer})
    bundle, unet = methods.bundle, methods.pipe.unet
    peer = peer or Ours(unet, bundle.guides[bundle.num_steps[-1]])
    one = methods.inputs(choose_tasks(params.evaluate)[:1])
    z, t_B = one["z_T"], torch.tensor([500], device=methods.device)
    return peer.cost(unet, methods.schedule, z_BCHW=z, t_B=t_B, conditions=one["conditions"])


def main() -> None:
    """The command."""
    parser = command_parser("quality", __doc__)
    parser.add_argument("--anew", choices=LABELS, help="with --run: this method's rows alone, anew")
    run_command(
        parser,
        RESULTS,
        lambda params, arguments: run(params, arguments.anew),
        table=as_markdown,
        figures=summary,
    )


if __name__ == "__main__":
    main()
