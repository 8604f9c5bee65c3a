"""params.yaml as frozen, typed values.

Parsed once, before anything heavy loads. An unknown or ill-typed key is refused by its dotted name.
One section for each stage, of the stage's name; `models`, `tracking` and `cluster` beside them.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components.paths import PREPARED
from components.places import Cluster, Tracking
from components.rules import Promote
from components.section import (
    Count,
    CountOrZero,
    Filled,
    Guided,
    ModelName,
    Positive,
    RegisteredName,
    Section,
    Share,
    not_json,
)
from pnp_core.model_files import PICKLES
from pnp_core.settings import (
    SEEDS,
    CacheConfig,
    CacheSettings,
    DistillSettings,
    GuideConfig,
    GuiderConfig,
    HalveSettings,
    Precision,
    SettingError,
    TrainConfig,
)

# FID of few images is mostly bias. On the embedded base that of 32 finds CFG surely worse than no
# guidance (by 6.0, interval 0.7 to 11.5), of 64 no longer, and of 192 surely better (4.7, 2.4 to
# 6.9). KID has no bias, but of 32 images an interval as wide as itself (0.09).
LEAST_IMAGES = {"FID": 64, "KID": 64}


class ParamsError(ValueError):
    """params.yaml says something that it can't mean. The message is one line and names the key."""


class Model(Section, frozen=True):
    """A row of the results: the base itself, or a fine-tune of it, with what it is used with."""

    path: str
    reference: str  # parquet file, or a folder of them: real images in this model's style
    # Of its own, in place of the data's: a list, or a text file in the model's folder.
    prompts: tuple[str, ...] | str | None = None
    trigger: str = ""  # words that come before every prompt
    negative_prompt: str = ""  # that every image is made with
    guidance_scale: Guided | None = None  # None: that of `evaluate`
    strength: Annotated[float, Field(ge=0, le=1000)] = 1.0  # of the guide
    clip_skip: CountOrZero = 0  # layers of the text encoder, from its end, as diffusers counts


class Teacher(Section, frozen=True):
    """Whose guidance is distilled: a guider of diffusers.guiders, by name."""

    guider: str
    arguments: dict[str, float]


class Prepare(Section, frozen=True):
    """Which images and prompts to learn from, and how many to hold out."""

    dataset: Filled  # parquet file, folder of them, or image folder with metadata.jsonl
    files: tuple[str, ...]  # which of the dataset's files; empty: all
    image_column: str
    caption_column: str
    prompts: Filled  # text file of further prompts
    resolution: Count  # pixels
    heldout_fraction: Share  # for data without a `split` column


class Cache(Section, CacheSettings, frozen=True):
    """The stage's settings; the guider is that of `teacher`. Scales are diffusers'."""


class Train(Section, TrainConfig, frozen=True):
    """How long and how fast to train; images are counted over all workers."""


class Guide(Section, GuideConfig, frozen=True):
    """What kind of guide to train."""


class Distill(Train, DistillSettings, frozen=True):
    """The guide to build, and how to train it on the cache."""

    guide: Guide


class Halve(Train, HalveSettings, frozen=True):
    """`num_images` is for each round; the guidance scales are those of `distill`."""


class Extent(Section, frozen=True):
    """How much is sampled of each model."""

    num_images: Count  # of each method and setting
    num_steps: Annotated[tuple[Count, ...], Field(min_length=1)]
    guidance_scales: tuple[Positive, ...]  # besides `guidance_scale`, at the first of num_steps


class Evaluate(Extent, frozen=True):
    """What is sampled and measured, and the networks that judge it."""

    # Folders; the first one is asked first.
    judges: Annotated[tuple[Filled, ...], Field(min_length=1)]
    review: Literal["quick", "full"]
    full: Extent  # what a full review takes in place of the same keys here
    guidance_scale: Guided
    negative_prompts: tuple[
        Annotated[str, Field(min_length=1)], ...
    ]  # in turns; empty: what they do is not measured
    precision: Precision
    batch_size: Count
    timed_batch_size: Count
    grid_prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=SEEDS)]

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        seen = Counter(Path(judge).as_posix() for judge in self.judges)
        for judge in (judge for judge, number in seen.items() if number > 1):
            raise ValueError(f"judges: {judge} is named twice")
        extents = {"num_images": self.num_images, "full.num_images": self.full.num_images}
        for name, num_images in extents.items():
            for metric, least in LEAST_IMAGES.items():
                if num_images < least:
                    raise ValueError(f"{name} is {num_images}, and {metric} needs {least} at least")
            if num_images < len(self.grid_prompts) + 2:
                raise ValueError(f"{name} {num_images} is too few for the grid_prompts")
        return self

    @property
    def extent(self) -> Extent:
        """What this run samples: the keys here, or those of `full`."""
        return self.full if self.review == "full" else self


class Register(Section, frozen=True):
    """Under which name the guide goes to the model registry."""

    name: RegisteredName


class Params(Section, frozen=True):
    """All of params.yaml, checked as it is read."""

    base: Filled
    models: Annotated[dict[ModelName, Model], Field(min_length=1)]
    companions: Filled  # folder of fine-tunes
    storage: Filled | None  # s3://bucket/prefix to keep teacher caches and checkpoints in
    teacher: Teacher
    prepare: Prepare
    cache: Cache
    distill: Distill
    halve: Halve
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]
    promote: Promote
    tracking: Tracking
    cluster: Cluster

    @model_validator(mode="after")
    def _files_travel(self) -> Self:
        if not (self.cluster.shared_folder or self.storage):
            raise ValueError(
                "cluster.shared_folder is false, and then `storage` must name the place by which "
                "data, models and checkpoints travel"
            )
        return self

    @model_validator(mode="after")
    def _batches_shared_out(self) -> Self:
        num_workers = self.cluster.num_workers
        for name, section in (("distill", self.distill), ("halve", self.halve)):
            if num_workers and section.batch_size % num_workers:
                raise ValueError(
                    f"{name}.batch_size: {section.batch_size} can't be shared out equally among "
                    f"the {num_workers} workers of cluster.num_workers"
                )
        return self

    @model_validator(mode="after")
    def _folders_apart(self) -> Self:
        known: dict[str, str] = {}
        for name, model in self.models.items():
            if not (model.path and model.reference):
                raise ValueError(f"models.{name}: path or reference is empty")
            other = known.setdefault(name.lower(), name)
            if other != name:
                raise ValueError(f"models: {other} and {name} are one folder on some disks")
        return self

    @model_validator(mode="after")
    def _rules_of_steps_that_are_sampled(self) -> Self:
        sampled = {*self.evaluate.num_steps, *self.evaluate.full.num_steps}
        for num_steps in self.promote.at_steps:
            if num_steps not in sampled:
                raise ValueError(
                    f"promote.at_steps: {num_steps} is neither in evaluate.num_steps nor in "
                    "evaluate.full.num_steps"
                )
        return self


def load_params(path: Path) -> Params:
    """Read `path`. Raises ParamsError, in one line that names the file and the key."""
    try:
        values = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise ParamsError(
            f"no {path} in {Path.cwd()}: run this from the repository's root"
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ParamsError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(values, Mapping):
        raise ParamsError(f"{path}: expected `key: value` lines at the top level")
    return checked(values, str(path))


def checked(values: Mapping[str, Any], source: str) -> Params:
    """`values` as parameters. Raises ParamsError, in one line that begins with `source`."""
    models = values.get("models")
    for name in models if isinstance(models, Mapping) else ():
        if not isinstance(name, str):  # DVC has no stage for it, and says nothing
            raise ParamsError(f"{source}: models: {name!r} is read as no text: put it in quotes")
    try:
        text = dumps(values)
    except ValueError:
        raise ParamsError(f"{source}: an alias stands within what it names") from None
    except TypeError:
        found = next(not_json(values), None)
        if found is None:
            raise ParamsError(f"{source}: a key is no text: put it in quotes") from None
        name, value = found
        raise ParamsError(
            f"{source}: {name}: {value} is of a kind not used here ({type(value).__name__}): "
            "put it in quotes if it is text"
        ) from None
    try:
        # By way of JSON, where strict means what a reader of YAML expects: a list is a tuple.
        return Params.model_validate_json(text)
    except ValidationError as error:
        # A key that is misspelt is also missing: the first of these says what was meant.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        messages = [_message(problem) for problem in problems]
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise ParamsError(f"{source}: {messages[0]}{more}") from None


def check_model_name(name: str) -> None:
    """Raises ParamsError if `models` can't have a row of this name."""
    try:
        TypeAdapter(ModelName).validate_python(name)
    except ValidationError as error:
        raise ParamsError(f"name: {error.errors()[0]['ctx']['error']}") from None


def check_files(params: Params) -> None:
    """Check what params.yaml points at, as far as that needs no heavy work. Raises ParamsError."""
    named = {"prepare.dataset": params.prepare.dataset}
    for i, name in enumerate(params.prepare.files):
        named[f"prepare.files[{i}]"] = str(Path(params.prepare.dataset, name))
    named["prepare.prompts"] = params.prepare.prompts
    named |= {f"evaluate.judges[{i}]": path for i, path in enumerate(params.evaluate.judges)}
    named |= {f"models.{name}.reference": model.reference for name, model in params.models.items()}
    for key, path in named.items():
        if not Path(path).exists() and Path(path) != PREPARED:
            raise ParamsError(f"params.yaml: {key}: there is no {path}")

    from components import inputs
    from components.dataset import check_reference, own_prompts
    from pnp_core.model_files import check_clip_skip

    with _named_in_errors("prepare.dataset"):
        inputs.check_dataset(params.prepare)

    with _named_in_errors("teacher"):
        teacher_guider(params)
    models = {"base": params.base}
    models |= {f"models.{name}.path": model.path for name, model in params.models.items()}
    for key, path in models.items():
        with _named_in_errors(key):
            inputs.check_model(path, params.base)
    for companion in companion_paths(params):
        with _named_in_errors(f"companions/{companion.name}"):
            inputs.check_model(str(companion), params.base, teaches=True)
        if not params.cache.num_trajectory:
            raise ParamsError(
                "params.yaml: cache.num_trajectory is 0, and companions teach along trajectories: "
                f"raise it, or empty {params.companions}"
            )
    for key, num_steps in inputs.counts_of_steps(params).items():
        with _named_in_errors(key):
            inputs.check_num_steps(num_steps, params.base)
    with _named_in_errors("prepare.resolution"):
        inputs.check_resolution(params.prepare.resolution, params.base)
    for i, judge in enumerate(params.evaluate.judges):
        with _named_in_errors(f"evaluate.judges[{i}]"):
            inputs.check_judge(judge)
    for name, model in params.models.items():
        with _named_in_errors(f"models.{name}.clip_skip"):
            check_clip_skip(model.path, params.base, model.clip_skip)
        with _named_in_errors(f"models.{name}.prompts"):
            own_prompts(model)
        if Path(model.reference) != PREPARED:  # which a stage makes, and checks
            with _named_in_errors(f"models.{name}.reference"):
                check_reference(model.reference, params)


@contextmanager
def _named_in_errors(key: str) -> Iterator[None]:
    """Have what is wrong with a value told with its key, as a ParamsError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ParamsError(f"params.yaml: {key}: {error}") from None


def companion_paths(params: Params) -> list[Path]:
    """The fine-tunes in the folder of companions, in the order of their names.

    Raises ParamsError if there is no such folder.
    """
    folder = Path(params.companions)
    if not folder.is_dir():
        raise ParamsError(
            f"params.yaml: companions: there is no folder {folder}: make it, and leave it empty to "
            "train the guide on the base alone"
        )
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in there if path.is_dir() or path.suffix in (".safetensors", *PICKLES)]


def teacher_guider(params: Params) -> GuiderConfig:
    """The teacher's rule, in the library's terms. Raises ValueError if it can't be distilled."""
    return GuiderConfig(name=params.teacher.guider, arguments=params.teacher.arguments)


def cache_config(params: Params) -> CacheConfig:
    """The teacher cache's settings, in the library's terms. Raises ValueError for its teacher."""
    return CacheConfig(**params.cache.model_dump(), guider=teacher_guider(params))


def _message(problem: Any) -> str:
    """One of pydantic's errors, in the words of someone who edits a YAML file."""
    location = [part for part in problem["loc"] if part != "[key]"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _keys(location[:-1]), n=1)
            return f"unknown key '{name}'" + (f", did you mean '{near[0]}'?" if near else "")
        case "missing":
            return f"key '{name}' is missing"
        case "value_error":
            error = problem["ctx"]["error"]
            if isinstance(error, SettingError):
                return f"{name}.{error.name} {error.problem}"
            return f"{name}: {error}" if name else str(error)
    text = problem["msg"].removeprefix("Input ")
    return f"{name}: {text}, but is {problem['input']!r} ({type(problem['input']).__name__})"


def _keys(location: list[str | int]) -> list[str]:
    """The valid keys of the section at `location`."""
    section: Any = Params
    for part in location:
        if isinstance(section, type) and issubclass(section, Section):
            fields = {f.alias or name: f.annotation for name, f in section.model_fields.items()}
            section = fields[str(part)]
        else:  # a dict or a tuple of sections, or of what may be null
            section = get_args(section)[-1]
            if NoneType in get_args(section):
                section = get_args(section)[0]
    return [field.alias or name for name, field in section.model_fields.items()]
