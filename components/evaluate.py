"""Stage evaluate: one model sampled without guidance, with CFG and with the guide, side by side.

Reads guides/bundle, data/prepared and the model's reference images. Writes
results/evaluate/<model>: metrics.json, grid.png and images.parquet, which keeps every image so that
a new metric needs no new sampling.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import main
from components.dataset import encode, reference_images
from components.methods import METHODS
from components.params import Params
from components.paths import BUNDLE, EVALUATED
from components.progress import Progress
from pnp_core.files import atomic_folder, write_json

if TYPE_CHECKING:
    import numpy as np

    from components.judging import Judge
    from components.sampling import Sampler, Task

Images = dict[tuple[str, int], "np.ndarray"]
"""By method and number of steps: uint8, (N, height, width, 3)."""


def run(params: Params, model: str) -> None:
    """Write results/evaluate/<model>.

    Raises ValueError if params.yaml has no such model, or if guide and model don't fit.
    """
    if model not in params.models:
        raise ValueError(
            f"params.yaml has no model {model!r}; its models are {', '.join(params.models)}"
        )
    from components.device import device, frozen, load_base
    from components.judging import Judge
    from components.pictures import grid
    from components.sampling import Sampler, choose_tasks
    from pnp_core.bundle import GuideBundle
    from pnp_core.models import load_unet

    config, row = params.evaluate, params.models[model]
    pipe = load_base(params.base)
    if row.path != params.base:
        pipe.unet = load_unet(row.path, base=pipe)
        frozen(pipe)
    bundle = GuideBundle.load(BUNDLE).to(device())
    judge = Judge(config.judge, device())
    tasks = choose_tasks(config)
    sampler = Sampler(pipe, bundle, params)
    images = make_images(sampler, tasks, model)
    metrics = {"model": model, **measure(model, sampler, judge, images, tasks)}

    columns = len(config.grid_prompts)
    rows = {f"{METHODS[m]}, {n} steps": made[:columns] for (m, n), made in images.items()}
    with atomic_folder(EVALUATED / model) as folder:
        title = f"{model}, guidance scale {config.guidance_scale:g}"
        grid(rows, config.grid_prompts, title=title).save(folder / "grid.png")
        write_images(folder / "images.parquet", images, tasks)
        write_json(folder / "metrics.json", metrics)
    steps = metrics["steps"][str(config.num_steps[0])]
    fids = ", ".join(f"{m} {steps[m]['fid']:.4g}" for m in METHODS)
    print(
        f"evaluate {model}: guidance_fvu {metrics['guidance_fvu']:.3f}, "
        f"FID at {config.num_steps[0]} steps: {fids}"
    )


def make_images(sampler: "Sampler", tasks: "Sequence[Task]", model: str) -> Images:
    """Every task by every method at every number of steps."""
    import numpy as np

    from components.sampling import batches

    config = sampler.config
    images: Images = {}
    total = len(tasks) * len(METHODS) * len(config.num_steps)
    progress = Progress(f"evaluate {model}", total, "images")
    for num_steps in config.num_steps:
        for method in METHODS:
            finished = []
            for batch in batches(tasks, config.batch_size):
                finished.append(sampler.images(method, batch, num_steps))
                progress(
                    len(images) * len(tasks) + sum(map(len, finished)),
                    f"{method}, {num_steps} steps",
                )
            images[method, num_steps] = np.concatenate(finished)
    return images


def measure(
    model: str, sampler: "Sampler", judge: "Judge", images: Images, tasks: "Sequence[Task]"
) -> dict[str, Any]:
    """All that metrics.json says of a model's images and of what they cost."""
    from components.judging import fid, kid
    from pnp_core.metrics import psnr

    config, reference = sampler.config, sampler.params.models[model].reference
    scoring = Progress(f"evaluate {model}", len(images) + 3, "measurements")
    scoring(0)
    references = judge.features(reference_images(reference, sampler.params))
    scoring(1, "features of the reference")
    prompts = [task.prompt for task in tasks]
    steps: dict[str, Any] = {}
    for number, ((method, num_steps), made) in enumerate(images.items(), 2):
        features = judge.features(made)
        scores = {
            "fid": fid(features, references),
            "kid": kid(features, references),
            "clip_score": judge.clip_score(made, prompts),
            "cfg_psnr": float(psnr(made, images["cfg", num_steps]).mean()),
        }
        if method == "cfg":
            del scores["cfg_psnr"]
        steps.setdefault(str(num_steps), {})[method] = scores
        scoring(number, f"{method}, {num_steps} steps")
    for scores in steps.values():
        scores["fid_ratio"] = scores["guided"]["fid"] / scores["cfg"]["fid"]
    unexplained = sampler.guidance_fvu([task for task in tasks if task.is_heldout])
    scoring(len(images) + 2, "guidance_fvu")
    cost = sampler.cost(tasks[: config.batch_size])
    scoring(len(images) + 3, "cost")
    return {
        "judge": judge.name,
        "num_images": len(tasks),
        "num_reference_images": len(references),
        "guidance_scale": config.guidance_scale,
        "guidance_fvu": unexplained,
        "cost": cost,
        "steps": steps,
    }


def write_images(path: Path, images: Images, tasks: "Sequence[Task]") -> None:
    """Every image, with what it takes to make it again."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = [
        {
            "image": {"bytes": encode(Image.fromarray(image)), "path": None},
            "method": method,
            "num_steps": num_steps,
            **task._asdict(),
        }
        for (method, num_steps), made in images.items()
        for task, image in zip(tasks, made, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.evaluate")
    parser.add_argument("--model", required=True, help="a name among `models` in params.yaml")
    arguments = parser.parse_args()
    main(partial(run, model=arguments.model))
