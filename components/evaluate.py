"""Stage evaluate: one model sampled without guidance, with CFG and with the guide, side by side.

Reads guides/bundle, data/prepared and the model's reference images. First images are made, batch
by batch, into results/sampled/<model>, where those that are there are not made again; then they are
judged. Writes results/evaluate/<model>: evaluation.json, all that is known; metrics.json, the few
numbers and quality.csv, scales.csv and fvu.csv, the curves that DVC shows; grid.png; and
images.json, which tells where the pictures are.
"""

import argparse
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import main
from components.cluster import run_tasks
from components.curves import few, write_curves
from components.disk import check_room, mean_bytes
from components.evaluation import Evaluation
from components.images import Gallery, KeptImages, Recipe, Setting, Task, alone_with, batches
from components.inputs import places_of
from components.methods import label_of
from components.params import Params
from components.paths import BUNDLE, EVALUATED, PREPARED
from components.progress import Progress
from components.references import References, denoised_by, digest, files_hash, judge_hash
from components.shipping import pack
from pnp_core.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from components.judging import Judge
    from components.sampling import Sampler
    from components.scores import RealImages

# Raised when the same images get other numbers than before: evaluations are then not compared.
MEASURED_BY = 3
FORWARDS_OF_DECODING = 3


def run(params: Params, model: str, *, guide: Path = BUNDLE, into: Path = EVALUATED) -> None:
    """Write results/evaluate/<model>, or `into`/<model> for another `guide` than guides/bundle.

    With `into`, its images go there too: results/sampled, which DVC keeps, stays as it is.

    Raises ValueError if params.yaml has no such model, if guide and model don't fit, for a judge,
    references or places that can't be used; all before anything is sampled. And if another
    evaluation of the model here, which is waited for, goes on for `cluster.wait_minutes`.
    """
    if model not in params.models:
        raise ValueError(
            f"params.yaml has no model {model!r}; its models are {', '.join(params.models)}"
        )
    guide, into = places_of(model, guide, into)
    from components.device import left_to_workers

    with alone_with(model, params.cluster.wait_minutes):
        judges = open_judges(params, model)
        extent, reads_text = params.evaluate.extent, judges[0][0].reads_text
        for line in params.promote.lacking(
            extent.num_images, extent.num_steps, reads_text=reads_text
        ):
            print(
                f"evaluate {model}: no guide can be promoted on these results: {line}", flush=True
            )
        apart = None if into == EVALUATED else into / f"{model}.images"
        work = Work.of(params, model, guide, apart)
        on_gpu = [work.sampler.pipe, work.sampler.bundle, *(judge for judge, _ in judges)]
        with left_to_workers(*on_gpu if params.cluster.num_workers else ()):
            sample_missing(work, model)
        evaluation = measure(work, model, judges)
        with atomic_folder(into / model) as folder:
            evaluation.save(folder)
            write_json(folder / "metrics.json", few(evaluation))
            write_curves(evaluation, folder)
            write_grid(work, model, folder)
            Gallery(model, work.tasks, work.recipes).save(folder)
        if guide == BUNDLE:
            work.kept.forget_all_but([*work.recipes.values(), *work.measured])
    num_steps = evaluation.num_steps[0]
    fids = [
        f"{method} {cell.scores['fid'].value:.4g}"
        for method in ("unguided", "cfg", "guided")
        if (cell := evaluation.cell(method, num_steps))
    ]
    print(
        f"evaluate {model}: guidance_fvu {evaluation.guidance_fvu.value:.3f} "
        f"({evaluation.fvu_along}), FID at {num_steps} steps: {', '.join(fids)}"
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to sample of a model.

    Attributes:
        sampler: opens the model.
        kept: where images go.
        identity: of the whole model.
        tasks: one image of every setting.
        negative_tasks: the first of them with negative prompts.
        recipes: of the images of each setting.
        measured: recipes of what else takes forwards.
        folder: of the guides.
    """

    sampler: "Sampler"
    kept: KeptImages
    identity: str
    tasks: list[Task]
    negative_tasks: list[Task]
    recipes: dict[Setting, Recipe]
    measured: list[Recipe]
    folder: Path

    @classmethod
    def of(  # noqa: PLR0913, what a worker is told, by name
        cls,
        params: Params,
        model: str,
        folder: Path = BUNDLE,
        apart: Path | None = None,
        tasks: Sequence[Task] | None = None,
        settings: Sequence[Setting] | None = None,
    ) -> "Work":
        """Open the model. Raises ValueError if the guide doesn't fit it.

        `apart`: as of `KeptImages`. `tasks`, `settings`: where they are not chosen here, from the
        prepared data.
        """
        from components.device import device
        from components.rows import load_row
        from components.sampling import Sampler, choose_tasks, settings_of, with_negatives
        from pnp_core.bundle import GuideBundle
        from pnp_core.identity import model_identity

        row = params.models[model]
        tasks = choose_tasks(params.evaluate, row) if tasks is None else list(tasks)
        pipe = load_row(row, params.base)
        bundle = GuideBundle.load(folder).to(device())
        for guide in bundle.guides.values():
            guide.requires_grad_(False).check_fits(pipe.unet)
        sampler = Sampler(pipe, bundle, params, row)
        identity = model_identity(row.path, params.base)
        kept = KeptImages(model, apart)
        measured: list[Recipe] = []
        if settings is None:
            recipe = {"what": "forwards", "model": identity, "unhalved": sampler.unhalved()}
            recipe |= denoised_by()
            forwards = kept.measured(recipe, lambda: sampler.forwards_per_step(tasks))
            settings = settings_of(params.evaluate, sampler.guidance_scale, forwards["guided"])
            measured = [recipe]
        return cls(
            sampler=sampler,
            kept=kept,
            identity=identity,
            tasks=tasks,
            negative_tasks=with_negatives(tasks, params.evaluate.negative_prompts),
            recipes={setting: sampler.recipe(setting, identity) for setting in settings},
            measured=measured,
            folder=folder,
        )

    @property
    def cfg(self) -> Setting:
        """CFG at the first number of steps, which negative prompts are measured at."""
        return next(setting for setting in self.recipes if setting.method == "cfg")

    def missing(self) -> list[tuple[Setting, Sequence[Task]]]:
        """Batches that are to be made."""
        size = self.sampler.config.batch_size
        wanted = [(setting, self.tasks) for setting in self.recipes]
        wanted += [(self.cfg._replace(method=m), self.negative_tasks) for m in ("cfg", "guided")]
        return [
            (setting, batch)
            for setting, tasks in wanted
            for batch in batches(self.kept.missing(self.recipes[setting], tasks), size)
        ]

    def named(self, setting: Setting, tasks: Sequence[Task]) -> str:
        """A batch in words that any process understands that has opened the same work."""
        place = {task: number for number, task in enumerate([*self.tasks, *self.negative_tasks])}
        return json.dumps([setting, [place[task] for task in tasks]])

    def make_named(self, name: str) -> None:
        """`make` the batch of this name."""
        setting, places = json.loads(name)
        tasks = [*self.tasks, *self.negative_tasks]
        self.make(Setting(*setting), [tasks[place] for place in places])

    def make(self, setting: Setting, tasks: Sequence[Task]) -> None:
        """Sample a batch and keep it."""
        images = self.sampler.make(setting, tasks)
        self.kept.write(self.recipes[setting], setting, tasks, images)


def open_judges(params: Params, model: str) -> "list[tuple[Judge, RealImages]]":
    """The judges, each with what it sees in the model's references.

    Raises ValueError for a judge that is none, and for references that can't be read.
    """
    from components.device import device
    from components.judging import Judge

    judges = [Judge(folder, device()) for folder in params.evaluate.judges]
    references = References(params.models[model].reference, params)
    return [(judge, references.seen_by(judge)) for judge in judges]


def sample_missing(work: Work, model: str) -> None:
    """Make the images that are not there yet, on Ray workers if `cluster` has any."""
    from components.device import tell_where_measured

    todo = work.missing()
    total = len(work.tasks) * len(work.recipes) + 2 * len(work.negative_tasks)
    done = total - sum(len(tasks) for _, tasks in todo)
    print(f"evaluate {model}: {total:,} images, {done:,} are there", flush=True)
    work.kept.folder.mkdir(parents=True, exist_ok=True)
    needed = (total - done) * image_bytes(work) if todo else 0
    remedy = "make room, or ask for fewer images (evaluate.num_images, num_steps)"
    check_room(f"evaluate {model}", work.kept.folder, needed, remedy)
    progress = Progress(f"evaluate {model}", total, "images")
    sizes = {work.named(setting, tasks): (setting, len(tasks)) for setting, tasks in todo}
    to_do = sum(forwards(setting) * num_images for setting, num_images in sizes.values())
    made = 0
    progress(done, share=0.0 if todo else 1.0)

    def count(name: str) -> None:
        nonlocal done, made
        setting, num_images = sizes[name]
        done += num_images
        made += forwards(setting) * num_images
        label = label_of(setting.method, setting.num_steps, setting.solver)
        progress(done, label, share=made / to_do)

    params = work.sampler.params
    if params.cluster.num_workers:
        precision = work.sampler.precision
        of: dict[str, Any] = {"model": model, "folder": work.folder, "apart": work.kept.apart}
        of |= {"precision": precision, "tasks": work.tasks, "settings": list(work.recipes)}
        needs = [Path(params.base), Path(params.models[model].path), work.folder]
        shipment = pack(params, needs, stage=f"evaluate-{model}", made=work.kept.folder)
        name = f"evaluate {model}"
        on_gpus = run_tasks(
            partial(sampling, **of), params, [list(sizes)], count, name=name, shipment=shipment
        )
        tell_where_measured(name, on_gpus=on_gpus)
        work.kept.look_again()
    else:
        for setting, tasks in todo:
            work.make(setting, tasks)
            count(work.named(setting, tasks))


def image_bytes(work: Work) -> int:
    """About what an image of the model takes on disk: the more, the more pixels it has."""
    taken = mean_bytes(PREPARED / "train.parquet")
    pipe = work.sampler.pipe
    edge = pipe.unet.config.sample_size * pipe.vae_scale_factor
    ratio = edge / read_json(PREPARED / "manifest.json")["resolution"]
    return round(taken * ratio**2)


def forwards(setting: Setting) -> int:
    """About how long an image takes, in plain forwards, its decoding included."""
    return setting.num_steps * (2 if setting.method == "cfg" else 1) + FORWARDS_OF_DECODING


def sampling(  # noqa: PLR0913, what a worker is told, by name
    params: Params,
    model: str,
    folder: Path,
    apart: Path | None,
    precision: str,
    tasks: Sequence[Task],
    settings: Sequence[Setting],
) -> Callable[[str], None]:
    """The work of each Ray worker: it opens the model once, and then makes batches by name.

    Raises ValueError on a machine that computes in another precision than where this began: its
    images would be others, and not be found there.
    """
    work = Work.of(params, model, folder, apart, tasks, settings)
    if (own := work.sampler.precision) != precision:
        raise ValueError(
            f"evaluate.precision: {params.evaluate.precision} is {own} on {socket.gethostname()}, "
            f"and {precision} where this began: set evaluate.precision: fp32, or begin on a "
            "machine that is like the workers"
        )
    return work.make_named


def measure(work: Work, model: str, judges: "list[tuple[Judge, RealImages]]") -> Evaluation:
    """All that is known of the model."""
    from components.measuring import Sampled, measure_cells, measure_negatives, unexplained
    from components.sampling import count_prompts, fvu_tasks

    sampler, tasks = work.sampler, work.tasks
    sampled = Sampled(kept=work.kept, recipes=work.recipes, tasks=tasks)
    progress = Progress(f"evaluate {model}", len(work.recipes) + 2, "measurements")
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        progress(done, what)

    of_fvu = fvu_tasks(tasks)
    recipes = [work.recipes[work.cfg._replace(method=m)] for m in ("cfg", "guided")]
    of = {
        "recipes": recipes,
        "tasks": digest(of_fvu),
        "unhalved": sampler.unhalved(),
        **denoised_by(),
    }
    work.measured.append({"what": "guidance_fvu", **of})
    terms = work.kept.measured(work.measured[-1], lambda: sampler.fvu_terms(of_fvu))
    tell("guidance_fvu")
    machine, size = sampler.machine(), sampler.config.timed_batch_size
    work.measured.append({"what": "cost", **of, **machine, "batch_size": size})
    cost = work.kept.measured(work.measured[-1], lambda: sampler.cost(tasks))
    tell("cost")
    forwards = {m: cost[f"{m}_forwards_per_step"] for m in ("unguided", "cfg", "guided")}
    cells = measure_cells(sampled, judges, forwards, tell)
    fvu, by_timestep = unexplained(terms, tasks, of_fvu, sampled.counts)
    avoided = [
        sampler.config.negative_prompts[i % len(sampler.config.negative_prompts)]
        for i in range(len(work.negative_tasks))
    ]
    return Evaluation(
        model=model,
        identity=identity_of(work),
        num_images=len(tasks),
        guidance_scale=sampler.guidance_scale,
        cells=cells,
        guidance_fvu=fvu,
        fvu_by_timestep={t: estimate.value for t, estimate in by_timestep.items()},
        fvu_intervals={t: estimate.interval for t, estimate in by_timestep.items()},
        fvu_prompts=count_prompts(of_fvu),
        cost=cost,
        machine=machine,
        negative=measure_negatives(sampled, work.cfg, work.negative_tasks, avoided, judges[0][0]),
    )


def identity_of(work: Work) -> Mapping[str, str | int | float]:
    """What two evaluations must have in common to be compared."""
    from components.sampling import teacher_name
    from pnp_core.model_files import weights_hash

    sampler = work.sampler
    params = sampler.params
    return {
        "base_hash": weights_hash(params.base),
        "model_hash": work.identity,
        "reference_hash": files_hash(Path(sampler.row.reference)),
        "data_hash": str(read_json(PREPARED / "manifest.json")["hash"]),
        "tasks_hash": digest(work.tasks),
        "judges_hash": digest([judge_hash(folder) for folder in params.evaluate.judges]),
        "num_images": len(work.tasks),
        "guidance_scale": sampler.guidance_scale,
        "strength": sampler.row.strength,
        "trigger": sampler.row.trigger,
        "clip_skip": sampler.row.clip_skip,
        "fvu_steps": sampler.config.extent.num_steps[0],
        "timestep_spacing": sampler.spacing,
        "precision": sampler.precision,
        "teacher": teacher_name(params),
        "measured_by": MEASURED_BY,
    }


def write_grid(work: Work, model: str, folder: Path) -> None:
    """The first images of each setting at the model's own guidance scale."""
    from components.pictures import grid

    columns = work.tasks[: len(work.sampler.config.grid_prompts)]
    scale = work.sampler.guidance_scale
    rows = {
        label_of(setting.method, setting.num_steps, setting.solver): work.kept.read(recipe, columns)
        for setting, recipe in work.recipes.items()
        if setting.guidance_scale == scale
    }
    title = f"{model}, guidance scale {scale:g}"
    prompts = [task.prompt for task in columns]
    marked = [task.is_heldout for task in columns]
    grid(rows, prompts, title=title, marked=marked).save(folder / "grid.png")


if __name__ == "__main__":
    about = __doc__.partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m components.evaluate", description=about)
    parser.add_argument("--model", required=True, help="a name among `models` in params.yaml")
    parser.add_argument("--guide", type=Path, default=BUNDLE, help="default: %(default)s")
    said = "of another guide, the folder for its results; default: %(default)s"
    parser.add_argument("--into", type=Path, default=EVALUATED, help=said)
    main(partial(run, **vars(parser.parse_args())))
