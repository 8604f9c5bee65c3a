"""Train the base: text encoder and UNet together, on latents of the base's families.

python -m zoo.base --device cuda --minutes 4 --batch-size 1024 --vae zoo/runs/vae
"""

import argparse
import copy
import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pnp_core.precision import has_bf16
from zoo import training
from zoo.autoencoder import encode, psnr_by_style, public_config
from zoo.dataset import (
    BACKGROUNDS,
    BASE_STYLES,
    STYLE_WORDS,
    Pictures,
    data_hash,
    jitter,
    load_pictures,
    may_flip,
    paint_background,
    to_float,
    vary_caption,
)
from zoo.sampling import add_samples

TEXT_WIDTH = 192
MAX_TOKENS = 24
VOCABULARY = 2560
CAPTION_DROPOUT = 0.12
CAPTIONS_PER_LATENT = 3


def new_tokenizer(texts: list[str], vocab_size: int = VOCABULARY) -> CLIPTokenizer:
    """A byte-pair encoding in CLIP's form, learnt from the captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    alphabet = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet + [letter + "</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        special_tokens=[start, end],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocabulary, merges = learnt["vocab"], [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=MAX_TOKENS,
    )


def run_tokenizer(folder: Path, texts: list[str]) -> CLIPTokenizer:
    """The tokenizer of a run: learnt from ``texts`` at its start, and the same ever after."""
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    tokenizer = new_tokenizer(texts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    tokenizer.save_pretrained(scratch)
    publish(scratch, folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of random weights: 3 layers of ``TEXT_WIDTH``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    """Stable Diffusion's blocks, small: 6.5 M parameters at most."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(128, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),  # the lowest plain, as in SD
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, as in SD1.5's config
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def new_pipeline(tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """An untrained base around a given autoencoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=new_unet(vae.config.latent_channels),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def training_texts(pictures: Pictures) -> list[str]:
    """What the tokenizer learns from: every word a prompt may use."""
    texts = list(pictures.captions)
    texts += [" ".join(words) for words in pictures.keywords]
    texts += [STYLE_WORDS[style] for style in STYLE_WORDS]
    texts += [f"on a {name} background" for name in BACKGROUNDS] * 4
    return texts


@dataclass(frozen=True)
class Latents:
    """Augmented latents, scaled to unit variance, with several tokenized captions each."""

    z_NCHW: Tensor  # fp16
    ids_NKL: Tensor  # int16, K captions


def augmented_latents(  # noqa: PLR0913 - four of the seven are switches by name
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    pictures: Pictures,
    *,
    num_augmentations: int,
    seed: int,
    background_share: float = 0.15,
    plain_captions: bool = False,
) -> Latents:
    """Everything the loop needs, computed once: the first copy is the picture as drawn."""
    device = vae.device
    generator = torch.Generator(device).manual_seed(seed)
    rng = random.Random(seed)
    flippable = torch.tensor(
        [may_flip(c, g) for c, g in zip(pictures.captions, pictures.groups, strict=True)]
    ).to(device)
    names = list(BACKGROUNDS)
    images = to_float(pictures.images_BCHW.to(device))
    encoder = vae
    if has_bf16(vae.device.type):
        encoder = copy.deepcopy(vae).to(torch.bfloat16)
    latents, texts = [], []
    for copy_index in range(num_augmentations):
        batch = images.clone()
        if copy_index > 0:
            flip = torch.rand(len(images), generator=generator, device=device) < 0.5
            batch = jitter(batch, flip & flippable, generator)
        backgrounds: list[str | None] = [None] * len(images)
        if copy_index > 1:
            painted = torch.rand(len(images), generator=generator, device=device)
            painted = painted < background_share
            for row in painted.nonzero().flatten().tolist():
                backgrounds[row] = rng.choice(names)
            colours = torch.tensor([BACKGROUNDS[b] for b in backgrounds if b], device=device)
            batch[painted] = paint_background(batch[painted], colours)
        latents.append((encode(encoder, batch) * vae.config.scaling_factor).half())
        for row, caption in enumerate(pictures.captions):
            for _ in range(CAPTIONS_PER_LATENT):
                texts.append(
                    caption if plain_captions else vary_caption(
                        caption, pictures.keywords[row], pictures.styles[row], backgrounds[row], rng
                    )
                )  # fmt: skip
        training.log(f"latents: copy {copy_index + 1} of {num_augmentations}")
    ids = tokenize(tokenizer, texts).reshape(-1, CAPTIONS_PER_LATENT, MAX_TOKENS)
    return Latents(torch.cat(latents), ids.short())


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, padded and cut to ``MAX_TOKENS``: (B, L)."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


class TextToNoise(nn.Module):
    """The two networks that train together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, z_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        """Predicted noise, (B, C, H, W)."""
        c_BLD = self.text_encoder(ids_BL).last_hidden_state
        return self.unet(z_BCHW, t_B, c_BLD).sample


@dataclass(frozen=True)
class Noisy:
    """A batch drawn for a denoiser: noisy latents, the noise in them, timesteps, rows drawn."""

    noisy_BCHW: Tensor
    noise_BCHW: Tensor
    t_B: Tensor
    rows_B: Tensor
    dropped_B: Tensor  # whose caption is to be dropped, for CFG


def draw_noisy(
    z_NCHW: Tensor, scheduler: DDIMScheduler, batch_size: int, generator: torch.Generator
) -> Noisy:
    """Everything on the device of the latents and the generator."""
    draw: dict[str, Any] = {"generator": generator, "device": z_NCHW.device}
    rows_B = torch.randint(len(z_NCHW), (batch_size,), **draw)
    z_BCHW = z_NCHW[rows_B].float()
    noise = torch.randn(z_BCHW.shape, **draw)
    t_B = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), **draw)
    noisy = scheduler.add_noise(z_BCHW, noise, t_B).contiguous(memory_format=torch.channels_last)
    return Noisy(noisy, noise, t_B, rows_B, torch.rand(batch_size, **draw) < CAPTION_DROPOUT)


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """fp16 safetensors, written beside the target and moved in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fp16: dict[str, nn.Module] = {
        "vae": AutoencoderKL.from_config(public_config(pipe.vae)),
        "unet": UNet2DConditionModel.from_config(public_config(pipe.unet)),
        "text_encoder": CLIPTextModel(pipe.text_encoder.config),
    }
    for name, module in fp16.items():
        module.load_state_dict(getattr(pipe, name).state_dict())
        module.to(torch.float16)
    StableDiffusionPipeline(
        **{**pipe.components, **fp16}, requires_safety_checker=False
    ).save_pretrained(scratch)
    # A stock pipeline opens UNet and VAE in fp32, but a text encoder as its config says.
    config = scratch / "text_encoder/config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"}, indent=2)
    )
    publish(scratch, folder)


def publish(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place of the old one."""
    scratch.chmod(0o755)
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old)
    else:
        scratch.rename(folder)


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """The pipeline in a folder, in fp32, without progress bars."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def prefer_plain_attention(pipe: StableDiffusionPipeline) -> None:
    """Matrix products and a softmax: 1.4 to 1.7 times as fast as the fused kernel on a CPU."""
    if pipe.unet.device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.text_encoder.set_attn_implementation("eager")


def cached_latents(path: Path, make: Any) -> Latents:
    """Latents of an earlier, interrupted run where there are any."""
    if path.exists():
        return Latents(**torch.load(path, weights_only=True))
    latents = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vars(latents), path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return latents


def main() -> None:
    """Train the base and write it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, out="zoo/models/base", minutes=65)
    parser.add_argument("--vae", type=Path, default=Path("zoo/runs/vae"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--augmentations", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    args = parser.parse_args()
    config = training.config_from(
        args, batch_size=args.batch_size, learning_rate=args.learning_rate, ema_decay=0.998
    )
    torch.manual_seed(config.seed)
    pictures = load_pictures(BASE_STYLES)
    vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32).to(config.device)
    run_name = f"base-{encoder_id(vae)}"  # other latents are another run
    tokenizer = run_tokenizer(args.runs / f"{run_name}_tokenizer", training_texts(pictures))
    pipe = new_pipeline(tokenizer, vae)
    latents = cached_latents(
        args.runs / f"{run_name}_latents.pt",
        lambda: augmented_latents(
            vae, tokenizer, pictures, num_augmentations=args.augmentations, seed=config.seed
        ),
    )
    null_ids_L = tokenize(tokenizer, [""])[0].to(config.device)
    z_NCHW, ids_NKL = (part.to(config.device) for part in (latents.z_NCHW, latents.ids_NKL))
    model = TextToNoise(pipe.text_encoder, pipe.unet)
    model.to(config.device).to(memory_format=torch.channels_last)
    prefer_plain_attention(pipe)

    def draw(generator: torch.Generator) -> training.Batch:
        noisy = draw_noisy(z_NCHW, pipe.scheduler, config.batch_size, generator)
        which = torch.randint(
            CAPTIONS_PER_LATENT, noisy.t_B.shape, generator=generator, device=config.device
        )
        ids_BL = ids_NKL[noisy.rows_B, which].long()
        ids_BL = torch.where(noisy.dropped_B[:, None], null_ids_L, ids_BL)
        return noisy.noisy_BCHW, noisy.noise_BCHW, noisy.t_B, ids_BL

    def loss_fn(
        noisy_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        eps = model(noisy_BCHW.to(config.dtype), t_B, ids_BL)
        return F.mse_loss(eps.float(), noise_BCHW), {}

    def export(ema: nn.Module, run: training.Run) -> None:
        assert isinstance(ema, TextToNoise)
        save_pipeline(
            StableDiffusionPipeline(
                **{**pipe.components, "text_encoder": ema.text_encoder, "unet": ema.unet},
                requires_safety_checker=False,
            ),
            args.out,
        )
        facts = training.run_facts(
            run,
            config,
            parameters=f"UNet {count(ema.unet):,}, text encoder {count(ema.text_encoder):,}, "
            f"autoencoder {count(vae):,}",
            data=f"train split of {', '.join(BASE_STYLES)}, `{data_hash(BASE_STYLES)}`",
        )
        training.write_card(args.out, "Base", facts)
        shutil.copy(args.vae / "README.md", args.out / "vae" / "README.md")

    ema, run = training.train(
        model, draw, loss_fn, config, args.runs / f"{run_name}.pt", on_checkpoint=export
    )
    add_samples(load_pipeline(args.out, config.device), args.out)
    training.log(f"{args.out}: {run}, {psnr_by_style(vae, 'heldout', BASE_STYLES)}")


def encoder_id(vae: AutoencoderKL) -> str:
    """Eight hex digits that tell one latent space from another."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for value in part.state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def count(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    main()
