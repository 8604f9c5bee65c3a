"""What training costs: ours over the naive way, caching over bare forwards, S3 over disk.

    python -m benchmarks.train_cost --json

Everything on the embedded base, in one process, what is compared taken in turns; medians. Naive is
how a guide is trained without a cache: the teacher's two forwards in every step, and the student
with gradients through all of the frozen UNet; not through its weights, which would cost as much
again. With --json, the last line on stdout is one JSON object:

    train_flops_ratio      FLOPs of a training step, ours over naive (matrix products, convolutions)
    train_time_ratio       its wall time, reading the cache and the optimizer included
    cache_efficiency       teacher pairs a second over those of the bare UNet forwards they need
    cache_efficiency_all   the same, counting VAE and text encoder, in the mix of params.yaml
    s3_efficiency          samples a second of an epoch of training from a cache on a local S3
                           server, opening it included, over those from disk
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.command import command_parser, count, errors_in_one_line
from benchmarks.cost import unet_config
from benchmarks.record import UNTRAINED, as_line, precision_on, record
from components.dataset import read_records
from components.device import device, load_base
from components.environment import quiet
from components.params import Params, load_params
from components.storage import ShardStore
from pnp_core.cache import TEXT, CacheBuilder, CacheConfig, Example, Pairs, TeacherCache
from pnp_core.cores import num_cores, on_cores
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser
from pnp_core.distill import DistillConfig, distill, distillation_loss, draw_guidance_scale
from pnp_core.files import read_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.identity import BaseIdentity
from pnp_core.memory import pair_losses
from pnp_core.metrics import count_flops, synchronize
from pnp_core.models import is_xl, pooled_width
from pnp_core.precision import mixed_precision
from pnp_core.schedule import NoiseSchedule
from pnp_core.seeds import step_generator
from pnp_core.soap import REFRESH_EVERY
from pnp_core.train import Report, TrainConfig, train


def naive_losses(
    teacher: CFGDenoiser, student: GuidedDenoiser, pairs: Pairs, w_B: Tensor
) -> Tensor:
    """Losses ``(B,)`` without cached predictions and with gradients through the whole UNet."""
    with torch.no_grad():
        pair = teacher.pair(pairs.z_t, pairs.timestep, pairs.conditions(w_B))
        eps_c, eps_n = (eps.float() for eps in pair)
        target = torch.lerp(eps_n, eps_c, w_B.reshape(-1, 1, 1, 1))
    z_t = pairs.z_t.detach().requires_grad_(True)
    eps = student(z_t, pairs.timestep, pairs.conditions(w_B))
    return distillation_loss(eps, target, eps_c - eps_n, w_B, power=1.0)


def flops_ratio(
    unet: UNet2DConditionModel, schedule: NoiseSchedule, config: GuideConfig, *, length: int
) -> float:
    """FLOPs of a training step on texts of ``length`` tokens, ours over naive."""
    unet.requires_grad_(False)
    with torch.device(unet.device):
        guide = Guide.from_unet(unet, config)
        size = unet.config.sample_size
        latents = [torch.randn(1, unet.config.in_channels, size, size) for _ in range(3)]
        texts = [torch.randn(1, length, unet.config.cross_attention_dim) for _ in range(2)]
        timestep, w_B = torch.full((1,), 500), torch.full((1,), 4.0)
    z_t, eps_c, eps_n = latents
    pairs = Pairs(z_t, timestep, eps_c, eps_n, texts[0], texts[1], added=None)
    student, teacher = GuidedDenoiser(unet, guide, schedule), CFGDenoiser(unet, schedule)
    ours = count_flops(lambda: pair_losses(student, pairs, w_B).sum().backward())
    naive = count_flops(lambda: naive_losses(teacher, student, pairs, w_B).sum().backward())
    return ours / naive


def naive_distill(
    unet: UNet2DConditionModel, cache: TeacherCache, config: DistillConfig, report: Report
) -> None:
    """The same loop, batches and optimizer the naive way; latents and texts are the cache's."""
    torch.manual_seed(config.train.seed)
    guide = Guide.from_unet(unet, config.guide)
    student = GuidedDenoiser(unet, guide, cache.schedule)
    teacher = CFGDenoiser(unet, cache.schedule)
    batch_size, seed = config.train.batch_size, config.train.seed

    def loss_fn(step: int, part: slice) -> Tensor:
        indices = cache.pair_indices(batch_size=batch_size, seed=seed, step=step)
        w_B = draw_guidance_scale(config.guidance_scale, batch_size, step_generator(seed, step))
        pairs = cache.pairs(indices[part], unet.device)
        return naive_losses(teacher, student, pairs, w_B[part].to(unet.device))

    train(loss_fn, guide, config.train, run_hash="naive", report=report, in_threads=True)


def training_config(params: Params, *, num_images: int) -> DistillConfig:
    """The shipped settings of stage 1, for a run of ``num_images`` that reports every step."""
    section = params.distill
    train_config = TrainConfig(
        num_images=num_images,
        batch_size=section.batch_size,
        precision=section.precision,
        report_every_images=section.batch_size,
    )
    return DistillConfig(train=train_config, guide=GuideConfig(**section.guide.model_dump()))


def caching_config(params: Params, num_pairs: int) -> CacheConfig:
    """The shipped settings of the cache, for one of four shards, two of them along trajectories."""
    section = params.cache
    return CacheConfig(
        num_forward=num_pairs // 2,
        num_trajectory=num_pairs // 2,
        trajectory_steps=num_pairs // 4 // section.batch_size,  # one full batch a shard
        batch_size=section.batch_size,
        shard_size=num_pairs // 4,
        precision=section.precision,
    )


class Enough(Exception):  # noqa: N818, no error
    """Ends a training whose time has been taken."""


def seconds_per_image(run: Callable[[Report], object], *, at_most: float = math.inf) -> float:
    """Wall time of training, once the optimizer no longer turns its bases in every step.

    Args:
        run: trains, and reports every step.
        at_most: seconds to take it over; the training is ended then.
    """
    seen: list[tuple[int, float]] = []

    def report(num_images: int, _: object) -> None:
        seen.append((num_images, time.perf_counter()))
        if len(seen) > REFRESH_EVERY and seen[-1][1] - seen[REFRESH_EVERY - 1][1] > at_most:
            raise Enough

    with suppress(Enough):
        run(report)
    (first, since), (last, until) = seen[REFRESH_EVERY - 1], seen[-1]
    return (until - since) / (last - first)


def train_time_ratio(
    unet: UNet2DConditionModel, cache: TeacherCache, config: DistillConfig, rounds: int
) -> float:
    """Wall time a sample, ours over naive; the median of the rounds' ratios."""
    ratios = []
    for number in range(rounds):
        ours = seconds_per_image(lambda report: distill(unet, cache, config, report=report))
        naive = seconds_per_image(lambda report: naive_distill(unet, cache, config, report))
        ratios.append(ours / naive)
        print(
            f"training, round {number + 1}: {1e3 * ours:.2f} ms a sample, naive "
            f"{1e3 * naive:.2f} ms, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return median(ratios)


class Caching:
    """Building a small cache, its shards in turns with the bare UNet forwards that they need."""

    def __init__(
        self, pipe: StableDiffusionPipeline, examples: Sequence[Example], config: CacheConfig
    ) -> None:
        self.pipe, self.examples, self.config = pipe, examples, config
        unet, batch = pipe.unet, 2 * config.batch_size
        size = unet.config.sample_size
        with torch.device(unet.device):
            self.inputs = (
                torch.randn(batch, unet.config.in_channels, size, size),
                torch.randint(1000, (batch,)),
                torch.randn(
                    batch, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim
                ),
            )
            self.added: dict[str, Tensor] | None = None
            if is_xl(pipe):
                pooled = torch.randn(batch, pooled_width(unet.config))
                self.added = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6)}
        self.bare: list[float] = []  # seconds a teacher pair
        self.built: dict[str, list[float]] = {"text": [], "moments": [], "pairs": []}  # a row

    def build(self, folder: Path) -> None:
        """Build it once more, in a new folder."""
        base = BaseIdentity(base_hash="base", unet="", scheduler="", text="", vae="")
        builder = CacheBuilder(
            self.pipe, self.examples, self.config, folder, base=base, data_hash="data"
        )
        for name, num_rows in builder.plan.num_rows.items():
            seconds = timed(lambda name=name: builder.build(name))  # type: ignore[misc]
            self.built[name.partition("-")[0]].append(seconds / num_rows)
            if name.startswith("pairs"):
                seconds = timed(lambda num_rows=num_rows: self.forwards(num_rows))  # type: ignore[misc]
                self.bare.append(seconds / num_rows)
        builder.finish()

    def forwards(self, num_pairs: int) -> None:
        """The UNet's bare forwards that as many pairs need at the least, without gradients.

        On a CPU they are shared out among its cores, as caching has it.
        """
        unet, added = self.pipe.unet, self.added
        cores = num_cores(self.config.batch_size, unet.device)

        def forward(rows: slice) -> None:
            own = None if added is None else {key: x[rows] for key, x in added.items()}
            unet(*(x[rows] for x in self.inputs), added_cond_kwargs=own)

        with (
            torch.inference_mode(),
            mixed_precision(self.pipe.unet.device.type, self.config.precision),
        ):
            for _ in range(num_pairs // self.config.batch_size):
                on_cores(forward, slice(0, len(self.inputs[0])), cores)

    def efficiency(self) -> float:
        """Time of bare forwards over that of building pairs, the median of the rounds."""
        return median(
            bare / built for bare, built in zip(self.bare, self.built["pairs"], strict=True)
        )

    def efficiency_all(self, *, num_pairs: int, num_images: int, num_prompts: int) -> float:
        """With the VAE's and the text encoder's work, for a cache of these sizes."""
        bare = median(self.bare) * num_pairs
        pairs = bare / self.efficiency()
        moments, text = (median(self.built[kind]) for kind in ("moments", TEXT))
        return bare / (pairs + moments * num_images + text * num_prompts)


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes, with what it leaves the GPU to do."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty bucket on a server in a process of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("benchmark")
        yield "s3://benchmark/cache"
    finally:
        server.terminate()
        server.wait()


def s3_efficiency(
    unet: UNet2DConditionModel, folder: Path, config: DistillConfig, rounds: int
) -> float:
    """Samples a second from S3 over those from disk, opening the cache included."""
    with s3_server() as url:
        store = ShardStore(url)
        for name, sha256 in read_json(folder / "index.json")["files"].items():
            store.mirror.send(folder / f"{name}.safetensors", store.file(name, sha256))

        def epoch(from_s3: bool) -> None:
            cache = TeacherCache.open(folder, source=ShardStore(url) if from_s3 else None)
            distill(unet, cache, config)

        ratios = []
        for number in range(rounds):
            disk, s3 = timed(lambda: epoch(False)), timed(lambda: epoch(True))
            ratios.append(disk / s3)
            print(
                f"reading, round {number + 1}: {config.train.num_images / disk:.1f} samples/s from "
                f"disk, {config.train.num_images / s3:.1f} from S3, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    return median(ratios)


def measure(  # noqa: PLR0913, a base and its data, then by name how much to measure
    pipe: StableDiffusionPipeline,
    examples: Sequence[Example],
    params: Params,
    *,
    num_pairs: int = 1280,
    num_images: int = 256,
    rounds: int,
) -> dict[str, float]:
    """All of the ratios on one base, see the module's docstring.

    Args:
        pipe: the base's.
        examples: training images; a part of them is cached.
        params: sizes and precision of training and the cache.
        num_pairs: of the cache that is built to measure; half of them along trajectories.
        num_images: of the examples, for that cache.
        rounds: how often each time is taken.
    """
    unet = pipe.unet
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    length = pipe.tokenizer.model_max_length
    guide = training_config(params, num_images=1).guide
    result = {"train_flops_ratio": flops_ratio(unet, schedule, guide, length=length)}
    print(f"training FLOPs, ours over naive: {result['train_flops_ratio']:.4f}", flush=True)
    section, config = params.cache, caching_config(params, num_pairs)
    some = examples[:: math.ceil(len(examples) / num_images)]
    caching = Caching(pipe, some, config)
    caching.forwards(section.batch_size)  # warms up
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(rounds):
            folder = Path(temporary, str(number))
            caching.build(folder)
        result["cache_efficiency"] = caching.efficiency()
        sizes = {
            "num_pairs": section.num_forward + section.num_trajectory,
            "num_images": len(examples),
            "num_prompts": len({example.prompt for example in examples}),
        }
        result["cache_efficiency_all"] = caching.efficiency_all(**sizes)
        print(
            f"caching: {1e3 * median(caching.built['pairs']):.2f} ms a pair, its bare forwards "
            f"{1e3 * median(caching.bare):.2f} ms; {1e3 * median(caching.built['moments']):.2f} ms "
            f"an image, {1e3 * median(caching.built[TEXT]):.2f} ms a prompt; efficiency "
            f"{result['cache_efficiency']:.3f}, with encoders "
            f"{result['cache_efficiency_all']:.3f} for {sizes}",
            flush=True,
        )
        epoch = training_config(params, num_images=num_pairs)
        steps = training_config(params, num_images=3 * REFRESH_EVERY * epoch.train.batch_size)
        cache = TeacherCache.open(folder)
        result["train_time_ratio"] = train_time_ratio(unet, cache, steps, 2 * rounds)
        result["s3_efficiency"] = s3_efficiency(unet, folder, epoch, rounds)
    return result


@errors_in_one_line()
def main() -> None:
    """Print the ratios on the base of params.yaml, as text or JSON."""
    parser = command_parser("train_cost", __doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--rounds", type=count, default=3, help="of each time")
    arguments = parser.parse_args()
    quiet()
    params = load_params(Path("params.yaml"))
    precision = precision_on(device().type, params.distill.precision)
    made_by = record(guide=UNTRAINED, precision=precision)
    print(as_line(made_by), flush=True)
    with torch.device("meta"):
        sd15 = UNet2DConditionModel.from_config(unet_config("sd15"))
    pipe = load_base(params.base)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    ratio = flops_ratio(sd15, schedule, GuideConfig(), length=77)
    print(f"training FLOPs, ours over naive, on Stable Diffusion 1.5: {ratio:.4f}", flush=True)
    examples = [
        Example(image=record.image, prompt=record.caption)
        for name in params.prepare.files
        for record in read_records(
            Path(params.prepare.dataset, name),
            image_column=params.prepare.image_column,
            caption_column=params.prepare.caption_column,
        )
        if record.split == "train"
    ]
    result = measure(pipe, examples, params, rounds=arguments.rounds)
    result["train_flops_ratio_sd15"] = ratio
    if arguments.json:
        print(json.dumps({**result, "record": made_by}))


if __name__ == "__main__":
    main()
