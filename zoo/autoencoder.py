"""Train the autoencoder: 64x64 pictures of every style -> 8x8 latents.

python -m zoo.autoencoder --device cuda --minutes 2.5 --batch-size 128 --out zoo/runs/vae
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from zoo import training
from zoo.dataset import (
    BACKGROUNDS,
    WORLD_STYLES,
    data_hash,
    jitter,
    load_pictures,
    paint_background,
    to_float,
)

KL_WEIGHT = 1e-6
NOISE_THRESHOLD = 0.8  # of a posterior's standard deviation, over that of its means


def new_autoencoder(latent_channels: int) -> AutoencoderKL:
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


@torch.no_grad()
def pruned(vae: AutoencoderKL, kept_C: Tensor) -> AutoencoderKL:
    """The same autoencoder without some latent channels, whose mean (0) the decoder takes for them.

    Exact but at the border, and there nearly: the decoder's first layer pads with zeros, and what
    remains of its input's bias once the kept channels have explained their part ends before it.
    """
    channels, kept = len(kept_C), kept_C.nonzero()[:, 0]
    smaller = AutoencoderKL.from_config({**public_config(vae), "latent_channels": len(kept)})
    own, theirs = smaller.state_dict(), vae.state_dict()
    for name, value in theirs.items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
    rows = torch.cat([kept, kept + channels])  # means, then log variances
    mix = theirs["quant_conv.weight"][rows, :, 0, 0]
    conv, bias = theirs["encoder.conv_out.weight"], theirs["encoder.conv_out.bias"]
    own["encoder.conv_out.weight"].copy_(torch.einsum("rc,cihw->rihw", mix, conv))
    own["encoder.conv_out.bias"].copy_(mix @ bias + theirs["quant_conv.bias"][rows])
    own["quant_conv.weight"].copy_(torch.eye(len(rows))[..., None, None])
    own["quant_conv.bias"].zero_()
    mix, bias = theirs["post_quant_conv.weight"][:, kept, 0, 0], theirs["post_quant_conv.bias"]
    conv = theirs["decoder.conv_in.weight"]
    explained = torch.linalg.lstsq(mix, bias[:, None]).solution[:, 0]
    own["decoder.conv_in.weight"].copy_(torch.einsum("oihw,ic->ochw", conv, mix))
    own["decoder.conv_in.bias"].copy_(
        theirs["decoder.conv_in.bias"] + conv.sum((2, 3)) @ (bias - mix @ explained)
    )
    own["post_quant_conv.weight"].copy_(torch.eye(len(kept))[..., None, None])
    own["post_quant_conv.bias"].copy_(explained)
    smaller.load_state_dict(own)
    return smaller


@torch.no_grad()
def telling_channels(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Whether a channel of standardised latents varies more than its posterior's noise.

    Under the KL term an autoencoder leaves channels that it has no use for to the noise. A
    denoiser would have to learn them all the same.
    """
    noise = [
        vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.std.mean((0, 2, 3))
        for batch in images_BCHW.split(batch_size_on(vae.device))
    ]
    return (torch.stack(noise).mean(0) < NOISE_THRESHOLD).cpu()


def reconstruction_loss(decoded_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 and squared error on pixels, L1 on their differences: edges stay sharp."""
    error = decoded_BCHW.float() - target_BCHW
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return 0.5 * error.abs().mean() + 4 * error.square().mean() + 0.25 * edges


def psnr(decoded_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Per picture, in dB, for a range of [-1, 1]."""
    error_B = (decoded_BCHW.float().clamp(-1, 1) - target_BCHW).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error_B.clamp(min=1e-10))


def batch_size_on(device: torch.device) -> int:
    """Of a forward pass: what fits a CPU's caches, or fills a GPU."""
    return 64 if device.type == "cpu" else 512


@torch.no_grad()
def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Posterior means, unscaled, in fp32 on the CPU."""
    means = []
    for batch in images_BCHW.split(batch_size_on(vae.device)):
        batch = batch.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        means.append(vae.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(means)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Unscaled latents -> pictures, in fp32 on the CPU."""
    images = []
    for batch in latents_BCHW.split(batch_size_on(vae.device)):
        batch = batch.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        images.append(vae.decode(batch).sample.float().cpu())
    return torch.cat(images)


def on_backgrounds(images_BCHW: Tensor, seed: int = 0) -> Tensor:
    """The same pictures (uint8), each on a plain background of some colour."""
    palette = torch.tensor(list(BACKGROUNDS.values()))
    generator = torch.Generator().manual_seed(seed)
    colours = palette[torch.randint(len(palette), (len(images_BCHW),), generator=generator)]
    colours = colours.to(images_BCHW.device)
    painted = [
        ((paint_background(to_float(images), colour) + 1) * 127.5).round().byte()
        for images, colour in zip(images_BCHW.split(256), colours.split(256), strict=True)
    ]
    return torch.cat(painted)


def psnr_by_style(vae: AutoencoderKL, split: str, styles: tuple[str, ...]) -> dict[str, float]:
    """PSNR of the mean error of a style's pictures (the mean of dB would flatter it)."""
    result = {}
    for style in styles:
        images = to_float(load_pictures([style], split).images_BCHW)
        error = (decode(vae, encode(vae, images)).clamp(-1, 1) - images).square().mean()
        result[style] = round(float(10 * torch.log10(4 / error)), 2)
    return result


def main() -> None:
    """Train the autoencoder and write it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, out="zoo/runs/vae", minutes=17)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--latent-channels", type=int, default=40, help="at first; unused ones are dropped"
    )
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
    images = load_pictures(WORLD_STYLES).images_BCHW.to(config.device)
    vae = new_autoencoder(args.latent_channels)
    vae = vae.to(config.device, memory_format=torch.channels_last)
    painted = on_backgrounds(images[::4])
    latent_shape = (config.batch_size, vae.config.latent_channels, 8, 8)

    def draw(generator: torch.Generator) -> training.Batch:
        def some(pictures: Tensor, count: int) -> Tensor:
            rows = torch.randint(len(pictures), (count,), generator=generator, device=config.device)
            return to_float(pictures[rows])

        half = config.batch_size // 2  # the other half stays as it is, pixel for pixel
        batch = torch.cat([some(painted, half // 4), some(images, config.batch_size - half // 4)])
        flip = torch.rand(half, generator=generator, device=config.device) < 0.5
        batch[:half] = jitter(batch[:half], flip, generator)
        noise = torch.randn(latent_shape, generator=generator, device=config.device)
        return batch.contiguous(memory_format=torch.channels_last), noise

    def loss_fn(batch_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = vae.encode(batch_BCHW.to(config.dtype)).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise_BCHW.to(config.dtype)).sample
        mse = F.mse_loss(decoded.detach().float(), batch_BCHW)
        loss = reconstruction_loss(decoded, batch_BCHW) + KL_WEIGHT * posterior.kl().mean()
        return loss, {"psnr": 10 * torch.log10(4 / mse)}

    name = f"autoencoder-{args.latent_channels}.pt"
    ema, run = training.train(vae, draw, loss_fn, config, args.runs / name)
    assert isinstance(ema, AutoencoderKL)
    kept = finished(ema, to_float(images[::11]))
    half = AutoencoderKL.from_config(public_config(kept))
    half.load_state_dict(kept.state_dict())
    half.half().save_pretrained(args.out)
    facts = training.run_facts(run, config, **{
        "parameters": f"{sum(p.numel() for p in kept.parameters()):,}",
        "data": f"train split of all styles, `{data_hash(WORLD_STYLES)}`",
        "PSNR on held-out concepts, dB": psnr_by_style(kept, "heldout", WORLD_STYLES),
        "latent channels": f"{kept.config.latent_channels} of the {args.latent_channels} it was "
        "trained with; the others said nothing (`pruned`)",
    })  # fmt: skip
    training.write_card(args.out, "Autoencoder", facts)
    training.log(f"{args.out}: {facts}")


def finished(vae: AutoencoderKL, images_BCHW: Tensor) -> AutoencoderKL:
    """Standardised over these pictures, and without the channels that say nothing of them."""
    vae.eval()
    standardise(vae, images_BCHW)
    vae.register_to_config(scaling_factor=1.0)
    kept = telling_channels(vae, images_BCHW)
    if kept.all() or not kept.any():  # none: it has hardly been trained
        return vae
    return pruned(vae.cpu(), kept)


def public_config(model: AutoencoderKL | UNet2DConditionModel) -> dict[str, Any]:
    """The config without the notes diffusers keeps on where a model was loaded from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


if __name__ == "__main__":
    main()
