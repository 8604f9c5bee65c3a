"""Train the autoencoder: 64x64 pictures of every style -> 8x8 latents.

    python -m zoo.autoencoder --device cpu --minutes 17 --out zoo/runs/vae
    python -m zoo.autoencoder --grow zoo/models/base/vae --latent-channels 32 --out zoo/runs/vae-32

`--grow` takes up a trained autoencoder with more latent channels: it keeps what it has learnt.
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


def new_autoencoder(latent_channels: int = 8) -> AutoencoderKL:
    """Downsamples by 8; 3.5 M parameters at most."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def grown(vae: AutoencoderKL, latent_channels: int) -> AutoencoderKL:
    """The same autoencoder with more latent channels, which its decoder does not read yet.

    Raises:
        ValueError: it has as many already.
    """
    before = vae.config.latent_channels
    if latent_channels <= before:
        raise ValueError(f"the autoencoder has {before} latent channels already")
    config = {**public_config(vae), "latent_channels": latent_channels}
    larger = AutoencoderKL.from_config(config)
    own, theirs = larger.state_dict(), vae.state_dict()
    for name, value in theirs.items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
    # Rows of the encoder's last layers: means, then log variances.
    old = torch.cat([torch.arange(before), torch.arange(before) + latent_channels])
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        own[name][old] = theirs[name]
    identity = torch.eye(2 * latent_channels)
    identity[old[:, None], old] = theirs["quant_conv.weight"][:, :, 0, 0]
    own["quant_conv.weight"][:, :, 0, 0] = identity
    own["quant_conv.bias"].zero_()[old] = theirs["quant_conv.bias"]
    identity = torch.eye(latent_channels)
    identity[:before, :before] = theirs["post_quant_conv.weight"][:, :, 0, 0]
    own["post_quant_conv.weight"][:, :, 0, 0] = identity
    own["post_quant_conv.bias"].zero_()[:before] = theirs["post_quant_conv.bias"]
    own["decoder.conv_in.weight"].zero_()[:, :before] = theirs["decoder.conv_in.weight"]
    larger.load_state_dict(own)
    return larger


@torch.no_grad()
def standardise(vae: AutoencoderKL, images_BCHW: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 over these pictures.

    The scales go into the 1x1 convolutions on either side of the latent: what is decoded from what
    is encoded stays the same, and diffusion finds no channel louder than another.
    """
    latents = encode(vae, images_BCHW)
    mean_C, std_C = latents.mean((0, 2, 3)).to(vae.device), latents.std((0, 2, 3)).to(vae.device)
    channels = len(mean_C)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias.add_(post.weight[:, :, 0, 0] @ mean_C)
    post.weight.mul_(std_C[None, :, None, None])
    quant.weight[:channels].div_(std_C[:, None, None, None])
    quant.bias[:channels].sub_(mean_C).div_(std_C)
    quant.bias[channels:].sub_(2 * std_C.log())  # of the log variances


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
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--decoder-of", type=Path, help="train this autoencoder's decoder alone")
    start.add_argument("--grow", type=Path, help="start from this one, with more latent channels")
    parser.add_argument("--latent-channels", type=int, default=8)
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
    elif args.grow:
        smaller = AutoencoderKL.from_pretrained(args.grow, dtype=torch.float32)
        vae = grown(smaller, args.latent_channels)
    else:
        vae = new_autoencoder(args.latent_channels)
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

    name = "decoder.pt" if args.decoder_of else f"autoencoder-{args.latent_channels}.pt"
    ema, run = training.train(vae, loss_fn, config, args.runs / name)
    assert isinstance(ema, AutoencoderKL)
    save(ema, args.out, measure_scale=not args.decoder_of)
    facts = training.run_facts(run, config, **{
        "parameters": f"{sum(p.numel() for p in ema.parameters()):,}",
        "data": f"train split of all styles, `{data_hash(ALL_STYLES)}`",
        "PSNR on held-out concepts, dB": psnr_by_style(ema, "heldout", ALL_STYLES),
    })  # fmt: skip
    notes = ""
    if began := args.decoder_of or args.grow:
        earlier = (began / "README.md").read_text(encoding="utf-8")
        what = "The decoder was trained further" if args.decoder_of else "It was grown"
        notes = f"{what}, from:\n\n" + "\n".join(
            line for line in earlier.splitlines() if line.startswith("- ")
        )
    training.write_card(args.out, "Autoencoder", facts, notes)
    training.log(f"{args.out}: {facts}")


def save(vae: AutoencoderKL, folder: Path, *, measure_scale: bool) -> None:
    """fp16, with latents of mean 0 and variance 1 in every channel."""
    vae.eval()
    if measure_scale:
        standardise(vae, to_float(load_pictures(ALL_STYLES).images_BCHW[::11]))
        vae.register_to_config(scaling_factor=1.0)
    half = AutoencoderKL.from_config(public_config(vae))
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(folder)


def public_config(model: AutoencoderKL | UNet2DConditionModel) -> dict[str, Any]:
    """The config without the notes diffusers keeps on where a model was loaded from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


if __name__ == "__main__":
    main()
