"""Train the autoencoder: 64x64 pictures of every style -> 8x8 latents of 8 channels.

python -m zoo.autoencoder --device cpu --minutes 17 --out zoo/runs/vae
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from zoo import training
from zoo.dataset import (
    ALL_STYLES,
    BACKGROUNDS,
    data_hash,
    jitter,
    load_pictures,
    paint_background,
    to_float,
)

KL_WEIGHT = 1e-6


def new_autoencoder() -> AutoencoderKL:
    """Downsamples by 8; 3.5 M parameters at most."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def reconstruction_loss(decoded_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 and squared error on pixels, L1 on their differences: edges stay sharp."""
    error = decoded_BCHW.float() - target_BCHW
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return 0.5 * error.abs().mean() + 4 * error.square().mean() + 0.25 * edges


def psnr(decoded_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Per picture, in dB, for a range of [-1, 1]."""
    error_B = (decoded_BCHW.float().clamp(-1, 1) - target_BCHW).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error_B.clamp(min=1e-10))


@torch.no_grad()
def encode(vae: AutoencoderKL, images_BCHW: Tensor, batch_size: int = 64) -> Tensor:
    """Posterior means, unscaled, in fp32 on the CPU."""
    means = []
    for batch in images_BCHW.split(batch_size):
        batch = batch.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        means.append(vae.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(means)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor, batch_size: int = 64) -> Tensor:
    """Unscaled latents -> pictures, in fp32 on the CPU."""
    images = []
    for batch in latents_BCHW.split(batch_size):
        batch = batch.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        images.append(vae.decode(batch).sample.float().cpu())
    return torch.cat(images)


def psnr_by_style(vae: AutoencoderKL, split: str, styles: tuple[str, ...]) -> dict[str, float]:
    """PSNR of the mean error of a style's pictures (the mean of dB would flatter it)."""
    result = {}
    for style in styles:
        images = to_float(load_pictures([style], split).images_BCHW)
        error = (decode(vae, encode(vae, images)).clamp(-1, 1) - images).square().mean()
        result[style] = round(float(10 * torch.log10(4 / error)), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, out="zoo/runs/vae", minutes=17)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--decoder-of", type=Path, help="train this autoencoder's decoder alone")
    args = parser.parse_args()
    config = training.config_from(
        args,
        batch_size=args.batch_size,
        learning_rate=1.2e-3,
        warmup_steps=100,
        ema_decay=0.998,
        weight_decay=1e-4,
    )
    torch.manual_seed(config.seed)
    images = load_pictures(ALL_STYLES).images_BCHW
    if args.decoder_of:
        vae = AutoencoderKL.from_pretrained(args.decoder_of, dtype=torch.float32)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = new_autoencoder()
    vae = vae.to(config.device, memory_format=torch.channels_last)
    palette = torch.tensor(list(BACKGROUNDS.values()))

    def loss_fn(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        batch = to_float(images[index])
        half = len(batch) // 2  # the other half stays as it is, pixel for pixel
        flip = torch.rand(half, generator=generator) < 0.5
        batch[:half] = jitter(batch[:half], flip, generator)
        colours = palette[torch.randint(len(palette), (half // 4,), generator=generator)]
        batch[: half // 4] = paint_background(batch[: half // 4], colours)
        batch = batch.to(config.device, memory_format=torch.channels_last)
        posterior = vae.encode(batch.to(config.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.std)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        mse = F.mse_loss(decoded.float(), batch)
        loss = reconstruction_loss(decoded, batch) + KL_WEIGHT * posterior.kl().mean()
        return loss, {"psnr": float(10 * torch.log10(4 / mse.detach()))}

    name = "decoder.pt" if args.decoder_of else "autoencoder.pt"
    ema, run = training.train(vae, loss_fn, config, args.runs / name)
    assert isinstance(ema, AutoencoderKL)
    save(ema, args.out, measure_scale=not args.decoder_of)
    facts = training.run_facts(run, config, **{
        "parameters": f"{sum(p.numel() for p in ema.parameters()):,}",
        "data": f"train split of all styles, `{data_hash(ALL_STYLES)}`",
        "PSNR on held-out concepts, dB": psnr_by_style(ema, "heldout", ALL_STYLES),
    })  # fmt: skip
    notes = ""
    if args.decoder_of:
        earlier = (args.decoder_of / "README.md").read_text(encoding="utf-8")
        notes = "The decoder was trained further, from:\n\n" + "\n".join(
            line for line in earlier.splitlines() if line.startswith("- ")
        )
    training.write_card(args.out, "Autoencoder", facts, notes)
    training.log(f"{args.out}: {facts}")


def save(vae: AutoencoderKL, folder: Path, *, measure_scale: bool) -> None:
    """fp16, with the scaling factor that gives latents unit variance."""
    vae.eval()
    if measure_scale:
        sample = to_float(load_pictures(ALL_STYLES).images_BCHW[::11])
        vae.register_to_config(scaling_factor=1.0 / float(encode(vae, sample).std()))
    half = AutoencoderKL.from_config(public_config(vae))
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(folder)


def public_config(model: AutoencoderKL | UNet2DConditionModel) -> dict[str, Any]:
    """The config without the notes diffusers keeps on where a model was loaded from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


if __name__ == "__main__":
    main()
