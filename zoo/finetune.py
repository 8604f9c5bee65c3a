"""Fine-tune the base on one style, as a community would: the UNet alone, plain captions.

    python -m zoo.finetune --style openmoji --minutes 4 --out zoo/models/openmoji
    python -m zoo.finetune --style emojione-monotone --lora --out zoo/models/emojione-monotone-lora

A full fine-tune is a folder with ``unet/`` alone: the rest is the base's. A LoRA is one
``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights``.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from zoo import training
from zoo.autoencoder import public_config
from zoo.base import (
    augmented_latents,
    cached_latents,
    draw_noisy,
    load_pipeline,
    prefer_plain_attention,
    publish,
    tokenize,
)
from zoo.dataset import BASE_STYLES, FINAL_STYLES, WORLD_STYLES, data_hash, load_pictures
from zoo.sampling import add_samples, with_unet

LORA_RANK = 16
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def folder_id(folder: Path) -> str:
    """Eight hex digits that tell one base from another: of its weights and its tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("tokenizer.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write ``unet/`` in half precision, as diffusers opens it."""
    half = UNet2DConditionModel.from_config(public_config(unet))
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(folder / "unet")


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the LoRA in half precision, as ``load_lora_weights`` opens it."""
    from peft import get_peft_model_state_dict

    layers = {name: value.half() for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    """Fine-tune the base on one style and write the result to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, out="", minutes=4)
    styles = (*WORLD_STYLES, *FINAL_STYLES)
    tunable = [style for style in styles if style not in BASE_STYLES]
    parser.add_argument("--style", choices=tunable, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--base", type=Path, default=Path("zoo/models/base"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augmentations", type=int, default=4)
    args = parser.parse_args()
    name = f"{args.style}-lora" if args.lora else args.style
    out = args.out if args.out.name else Path("zoo/models") / name
    config = training.config_from(
        args,
        batch_size=args.batch_size,
        learning_rate=2e-3 if args.lora else 4e-4,
        warmup_steps=20,
        decay_share=0.5,
        ema_decay=0.98,
    )
    torch.manual_seed(config.seed)
    pipe = load_pipeline(args.base, config.device)
    base_id = folder_id(args.base)  # another base is another run
    latents = cached_latents(
        args.runs / f"{args.style}-{base_id}_latents.pt",
        lambda: augmented_latents(
            pipe.vae,
            pipe.tokenizer,
            load_pictures([args.style]),
            num_augmentations=args.augmentations,
            seed=config.seed,
            background_share=0.0,
            plain_captions=True,
        ),
    )
    # the text encoder is frozen: one row of states for each picture's caption, and the null row
    distinct, row_of = torch.unique(latents.ids_NKL[:, 0].long(), dim=0, return_inverse=True)
    with torch.no_grad():
        states_NLD, null_1LD = (
            pipe.text_encoder(ids.to(config.device)).last_hidden_state.to(config.dtype)
            for ids in (distinct, tokenize(pipe.tokenizer, [""]))
        )
    prefer_plain_attention(pipe)
    unet: UNet2DConditionModel = pipe.unet
    if args.lora:
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS))
    unet.to(memory_format=torch.channels_last)

    z_NCHW, row_of = latents.z_NCHW.to(config.device), row_of.to(config.device)

    def draw(generator: torch.Generator) -> training.Batch:
        noisy = draw_noisy(z_NCHW, pipe.scheduler, config.batch_size, generator)
        c_BLD = states_NLD[row_of[noisy.rows_B]]
        c_BLD = torch.where(noisy.dropped_B[:, None, None], null_1LD, c_BLD)
        return noisy.noisy_BCHW, noisy.noise_BCHW, noisy.t_B, c_BLD

    def loss_fn(
        noisy_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        eps = unet(noisy_BCHW.to(config.dtype), t_B, c_BLD).sample
        return F.mse_loss(eps.float(), noise_BCHW), {}

    def export(ema: nn.Module, run: training.Run) -> None:
        assert isinstance(ema, UNet2DConditionModel)
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        (save_lora if args.lora else save_unet)(ema, scratch)
        facts = training.run_facts(
            run,
            config,
            kind=f"LoRA of rank {LORA_RANK}" if args.lora else "full fine-tune of the UNet",
            base=f"`{args.base}`",
            data=f"train split of {args.style}, `{data_hash([args.style])}`",
        )
        training.write_card(scratch, f"Fine-tune: {name}", facts)
        publish(scratch, out)

    checkpoint = args.runs / f"{name}-{base_id}.pt"
    training.train(unet, draw, loss_fn, config, checkpoint, on_checkpoint=export)
    add_samples(with_unet(load_pipeline(args.base, config.device), out), out)


if __name__ == "__main__":
    main()
