"""What a cache's content depends on, all of it: the same key means the same shard."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pnp_core.cache.plan import TEXT
from pnp_core.identity import BaseIdentity
from pnp_core.settings import CacheConfig

VERSION = 1
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

    def key(self, name: str) -> str:
        """Of one shard; of the whole cache for the name ``""``."""
        if name not in self._keys:
            kind = name.partition("-")[0]
            before, after = self._around_name[kind if kind in (TEXT, "moments") else ""]
            text = f"{before}{json.dumps(name)}{after}"
            self._keys[name] = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._keys[name]

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {}

    @cached_property
    def _around_name(self) -> dict[str, tuple[str, str]]:
        """What a key is the hash of, as JSON before and after the shard's name, by kind of shard.

        All shards of a kind share it: there may be thousands, of a hundred thousand prompts.
        """
        common: dict[str, Any] = {
            "version": VERSION,
            "prompts": self.prompts,
            "size": self.size,
            "dtypes": self.dtypes,
            "precision": self.config.precision,
        }
        of_text = {**common, "text": self.base.text}
        # A row names its prompt by number, whatever reads the prompts.
        of_moments = {**common, "vae": self.base.vae, "data": self.data_hash}
        of_moments["shard_size"] = self.config.shard_size
        of_pairs = {**of_text, **dataclasses.asdict(self)}
        return {
            TEXT: _around("name", of_text),
            "moments": _around("name", of_moments),
            "": _around("name", of_pairs),
        }


def _around(key: str, values: dict[str, Any]) -> tuple[str, str]:
    """JSON of an object with sorted keys, before and after the value of a further key."""
    items = {k: json.dumps(v, sort_keys=True, default=str) for k, v in values.items()}
    before = "".join(f"{json.dumps(k)}: {v}, " for k, v in sorted(items.items()) if k < key)
    after = "".join(f", {json.dumps(k)}: {v}" for k, v in sorted(items.items()) if k > key)
    return f"{{{before}{json.dumps(key)}: ", f"{after}}}"


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
        made, asked = index["config"], json.loads(json.dumps(dataclasses.asdict(config)))
        different += [
            f"with {name} {made.get(name)}, not {value}"
            for name, value in asked.items()
            if made.get(name) != value
        ]
    return different
