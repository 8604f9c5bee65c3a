"""What a cache's content depends on, all of it: the same key means the same shard."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pnp_core.cache.plan import FORWARD, TEXT
from pnp_core.identity import BaseIdentity
from pnp_core.settings import CacheConfig

# Settings that shards of pairs depend on, besides how many rows they have.
OF_PAIRS = ("seed", "negative_fraction", "shard_size")
OF_TRAJECTORIES = ("trajectory_steps", "guidance_scale", "guider")
VERSION = 2
"""Of the code that fills shards. Raise it with each change after which the same base, data and
settings give another shard: other draws, another order of rows, other columns, other rounding.
Shards that an earlier version filled are then built again, and its caches are refused."""


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What is known of a cache before it is built.

    Attributes:
        data_hash: of the examples and the further prompts.
        companions: identities of the further teachers, in order.
        prompts: rows of the text shard, in order.
        size: of the images, in pixels.
        dtypes: in which UNet, text encoder and VAE compute.
    """

    base: BaseIdentity
    data_hash: str
    companions: tuple[str, ...]
    prompts: tuple[str, ...]
    size: int
    dtypes: tuple[str, ...]
    config: CacheConfig

    def key(self, name: str, *, num_rows: int = 0, teacher: int = 0) -> str:
        """Of one shard; of the whole cache for the name ``""``.

        Args:
            name: the shard's.
            num_rows: of a shard of pairs, whose random numbers are drawn at once.
            teacher: of a shard of pairs: 0 is the base, 1 its first companion.
        """
        config = of_content(self.config)
        depends: dict[str, Any] = {
            "version": VERSION,
            "name": name,
            "prompts": self._prompts,
            "size": self.size,
            "dtypes": self.dtypes,
            "precision": self.config.precision,
        }
        if name == TEXT:
            depends["text"] = self.base.text
        elif name.startswith("moments"):
            # A row names its prompt by number, whatever reads the prompts.
            depends |= {"vae": self.base.vae, "data": self.data_hash}
            depends["shard_size"] = self.config.shard_size
        else:
            depends |= {"base": dataclasses.asdict(self.base), "data": self.data_hash}
            if name == "":
                depends |= {"companions": self.companions, "config": config}
            else:
                depends["num_rows"] = num_rows
                read = OF_PAIRS if name.startswith(FORWARD) else OF_PAIRS + OF_TRAJECTORIES
                depends |= {setting: config[setting] for setting in read}
                depends["teacher"] = ("base", *self.companions)[teacher]
        text = json.dumps(depends, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def _prompts(self) -> str:
        """Their hash, taken once: there may be a hundred thousand, and thousands of shards."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def of_content(config: CacheConfig) -> dict[str, Any]:
    """The settings that change what is in a cache; ``batch_size`` changes roundings alone."""
    settings = dataclasses.asdict(config)
    del settings["batch_size"]
    return settings


def differences(
    index: dict[str, Any],
    *,
    base: BaseIdentity | None = None,
    data_hash: str | None = None,
    config: CacheConfig | None = None,
) -> list[str]:
    """In what the cache of ``index`` is not the one asked for, in words."""
    different = []
    if index["version"] != VERSION:
        different.append(f"by version {index['version']} of the code that fills it, not {VERSION}")
    if base is not None:
        made = BaseIdentity(**index["base"])
        different += [f"with another {part} than the base's" for part in base.differs(made)]
    if data_hash is not None and index["data_hash"] != data_hash:
        there, given = index["data_hash"][:12], data_hash[:12]
        different.append(f"with data {there}, but the data given is {given}")
    if config is not None:
        made, asked = index["config"], json.loads(json.dumps(of_content(config)))
        different += [
            f"with {name} {made.get(name)}, not {value}"
            for name, value in asked.items()
            if made.get(name) != value
        ]
    return different
