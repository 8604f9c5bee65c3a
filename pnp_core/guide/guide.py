"""A guide of any kind, for one UNet architecture: made, saved, opened, checked against a UNet."""

import hashlib
import math
import os
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict, register_to_config

from pnp_core.conditions import Conditions
from pnp_core.files import loading_from
from pnp_core.guide.encoder import EncoderGuide, differences
from pnp_core.guide.full import FullGuide
from pnp_core.guide.kind import Kind, Prepared
from pnp_core.guide.saved import FORMATS, check_config, check_types, check_weights
from pnp_core.guide.tiny import TinyGuide, TinyShape, tiny_shape
from pnp_core.guide.unet import EntranceChannels, decoder_entrances, describe, plain
from pnp_core.settings import GuideConfig, SettingError


class Guide(ModelMixin, ConfigMixin):
    """A guide for one UNet architecture; make one with :meth:`from_unet`.

    The config saved beside the weights says which architecture the guide fits and what it was
    trained for. Attributes of the config:

        base_hash: of the base it was trained on, see :func:`pnp_core.model_files.weights_hash`.
        prediction_type: what that base predicts.
        guidance_scale_range: the ``w`` it was trained for.
        num_steps: sampling steps it was halved to; None: any number (stage 1).
        timestep_spacing: of those steps.
        format_version: of what is on disk, see ``FORMATS``.
        modulated_dims: numbers of dimensions of what the modulated layers give; None: not known, as
            in guides that earlier versions saved.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(  # noqa: PLR0913, the entries of its config.json
        self,
        kind: str,
        in_channels: int,  # noqa: ARG002, register_to_config keeps it
        text_dim: int,
        channels: list[list[int]],
        attention_channels: list[int],
        modulated_channels: list[int],
        ranks: list[int] | None = None,
        text_rank: int = 0,
        embedding_dim: int = 0,
        modulated_dims: list[int] | None = None,
        unet_config: dict[str, Any] | None = None,
        base_hash: str | None = None,  # noqa: ARG002, register_to_config keeps it
        prediction_type: str = "epsilon",  # noqa: ARG002, register_to_config keeps it
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),  # noqa: ARG002, register_to_config keeps it
        num_steps: int | None = None,  # noqa: ARG002, register_to_config keeps it
        timestep_spacing: str | None = None,  # noqa: ARG002, register_to_config keeps it
        format_version: int = 1,  # noqa: ARG002, register_to_config keeps it
    ) -> None:
        super().__init__()
        entrances = [EntranceChannels(hidden, tuple(skips)) for hidden, *skips in channels]
        self.net: Kind
        if kind in ("tiny", "encoder"):
            assert ranks is not None
            shape = TinyShape(ranks, text_rank, embedding_dim)
            net = TinyGuide if kind == "tiny" else EncoderGuide
            self.net = net(
                entrances, shape, text_dim, attention_channels, modulated_channels, modulated_dims
            )
        else:
            assert unet_config is not None
            self.net = FullGuide(unet_config, [len(e.skips) for e in entrances])

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, config: GuideConfig | None = None, **trained_for: Any
    ) -> "Guide":
        """A fresh guide that fits ``unet`` and leaves it unchanged.

        Args:
            unet: the base; its device is the guide's.
            config: what kind of guide; default: a tiny one.
            trained_for: config entries such as ``base_hash`` and ``prediction_type``.

        Raises:
            ValueError: the UNet has parts a guide can't work with; as a SettingError, it is too
                small for a tiny guide within its share of parameters.
        """
        config = config or GuideConfig()
        architecture = describe(unet)
        made = {"kind": config.kind, "format_version": FORMATS[config.kind]}
        entries = {**made, **architecture, **trained_for}
        if config.kind == "full":
            if unet.class_embedding is not None:
                raise ValueError(
                    "A full guide does not know of class labels, which this UNet is told: make a "
                    "tiny one."
                )
            base = {k: v for k, v in unet.config.items() if not k.startswith("_")}
            guide = cls(unet_config={**base, "time_cond_proj_dim": None}, **entries)
            assert isinstance(guide.net, FullGuide)
            guide.net.load_encoder(unet)
            return hold_offsets(guide).to(unet.device)
        base_parameters = sum(p.numel() for p in unet.parameters())
        entrances = decoder_entrances(unet)
        embedding_dim = max(32, unet.time_embedding.linear_2.out_features // 16)
        max_parameters = int(config.max_parameters_ratio * base_parameters)
        if config.kind == "encoder":
            with torch.device("meta"):
                beside = differences(entrances, embedding_dim)
            max_parameters -= sum(p.numel() for p in beside.parameters())
        shape = tiny_shape(
            entrances,
            text_dim=architecture["text_dim"],
            attention_channels=architecture["attention_channels"],
            modulated_channels=architecture["modulated_channels"],
            embedding_dim=embedding_dim,
            max_parameters=max_parameters,
        )
        guide = cls(**shape._asdict(), **entries)
        check_share(guide, config, base_parameters)
        return hold_offsets(guide).to(unet.device)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> "Guide":
        """As of any diffusers model, from a folder or a hub id, but nothing is ever unpickled.

        Raises:
            ValueError: its config or its weights are not those of a guide, or weights are not
                finite; another version wrote them.
        """
        check_config(cls.load_config(path, **options), path)
        check_types(path)
        guide: Guide
        with loading_from(f"The guide in {path}"):
            guide, loading = super().from_pretrained(
                path, **{**options, "use_safetensors": True, "output_loading_info": True}
            )
        if wrong := [*loading["missing_keys"], *loading["unexpected_keys"]]:
            raise ValueError(
                f"The guide in {path} was saved by another version of pnp-guide: {len(wrong)} of "
                f"its parameters are missing or unknown, {wrong[0]} among them. Train it again, or "
                "load it with the version that saved it."
            )
        check_weights(guide, path)
        # Saved again, it has the newest format, and the same bytes from whichever folder it came.
        config = {key: value for key, value in guide.config.items() if key != "_name_or_path"}
        newest = FORMATS[guide.config.kind]
        guide._internal_dict = FrozenDict({**config, "format_version": newest})
        return guide

    def weights_digest(self) -> str:
        """Identity of this guide: SHA-256 over its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, unet: UNet2DConditionModel) -> None:
        """Raise ValueError, naming both sides, if this guide was made for another architecture."""
        for key, theirs in describe(unet).items():
            own = self.config[key]
            if key == "modulated_dims" and own is None:
                continue
            if plain(own) != plain(theirs):
                raise ValueError(
                    f"This guide was made for a UNet with {key} = {plain(own)}, "
                    f"but this UNet has {key} = {plain(theirs)}."
                )

    def prepare(self, conditions: Conditions, strength: float = 1.0) -> Prepared:
        """Read what a run does not change from step to step.

        Args:
            conditions: prompts, negative prompts and guidance scales of the batch.
            strength: multiplies all that the guide does.
        """
        return self.net.prepare(conditions, strength)


def check_share(guide: Guide, config: GuideConfig, base_parameters: int) -> None:
    """Raise SettingError if the smallest guide has more than its share of a base's parameters."""
    num_parameters = sum(p.numel() for p in guide.parameters())
    if num_parameters > config.max_parameters_ratio * base_parameters:
        least = math.ceil(num_parameters / base_parameters * 1e5) / 1e5
        raise SettingError(
            "max_parameters_ratio",
            f"is {config.max_parameters_ratio:g}, and the smallest {config.kind} guide for this "
            f"UNet has {num_parameters:,} of its {base_parameters:,} parameters: set it to "
            f"{least:g} or more.",
        )


def hold_offsets(guide: Guide) -> Guide:
    """Keep the offsets of the gains at zero: before halving, they have nothing to mend."""
    for name, parameter in guide.named_parameters():
        if name.endswith("offset"):
            parameter.requires_grad_(False)
    return guide
