"""Sample grids of the zoo's models, the plain way: the stock pipeline, a seed a picture."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor

from pnp_core.precision import mixed_precision
from zoo.autoencoder import batch_size_on
from zoo.dataset import load_pictures, to_pil

CARD_SCALES = (1.0, 2.0, 4.0)


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    guidance_scale: float,
    *,
    num_steps: int = 20,
    first_seed: int = 0,
) -> Tensor:
    """Pictures in [-1, 1]; picture i has the seed ``first_seed + i``, whatever the batch size."""
    found = []
    batch_size = batch_size_on(pipe.device)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [
            torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))
        ]
        with mixed_precision(pipe.device.type, "bf16"):
            images = pipe(
                batch,
                guidance_scale=guidance_scale,
                num_inference_steps=num_steps,
                generator=generators,
                output_type="pt",
            ).images
        found.append(images.float().cpu() * 2 - 1)
    return torch.cat(found)


def with_unet(pipe: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    """The base's pipeline with a fine-tune's UNet in it, or its LoRA on it."""
    if (folder / "pytorch_lora_weights.safetensors").exists():
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
        unet.load_state_dict(pipe.unet.state_dict())
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    tuned = StableDiffusionPipeline(
        **{**pipe.components, "unet": unet.to(pipe.device)}, requires_safety_checker=False
    )
    if (folder / "pytorch_lora_weights.safetensors").exists():
        tuned.load_lora_weights(folder)
    tuned.set_progress_bar_config(disable=True)
    return tuned


def grid(rows: Sequence[tuple[str, Tensor]], zoom: int = 1, margin: int = 76) -> Image.Image:
    """One labelled row of pictures after the other."""
    size = zoom * rows[0][1].shape[-1]
    width = margin + max(len(images) for _, images in rows) * size
    sheet = Image.new("RGB", (width, len(rows) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows):
        draw.text((2, y * size + size // 2 - 5), label, fill="black")
        for x, image in enumerate(images):
            sheet.paste(to_pil(image).resize((size, size)), (margin + x * size, y * size))
    return sheet


def prompts_of(split: str, style: str, num_prompts: int, seed: int = 0) -> list[str]:
    """Captions of a split, drawn without repetition; fewer where there are fewer."""
    captions = sorted(load_pictures([style], split).captions)
    return random.Random(seed).sample(captions, min(num_prompts, len(captions)))


def add_samples(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """``samples.png`` in a model's folder, and in its card."""
    shown = {split: prompts_of(split, "noto", 10, seed=1) for split in ("train", "heldout")}
    rows = [
        (f"{split} w={scale:g}", sample(pipe, prompts, scale))
        for split, prompts in shown.items()
        for scale in CARD_SCALES
    ]
    grid(rows, margin=90).save(folder / "samples.png")
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n![samples](samples.png)\n\n")
        for split, prompts in shown.items():
            card.write(f"Prompts ({split}): {', '.join(prompts)}.\n")
