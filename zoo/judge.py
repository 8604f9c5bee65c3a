"""Train the judge: a small CLIP on all styles, independent of the base and its text encoder.

python -m zoo.judge --device cpu --minutes 5 --out zoo/models/judge
"""

import argparse
import random
import tempfile
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from zoo import training
from zoo.base import MAX_TOKENS, publish, run_tokenizer, tokenize, training_texts
from zoo.dataset import WORLD_STYLES, Pictures, data_hash, jitter, load_pictures, may_flip, to_float

IMAGE_MEAN, IMAGE_STD = (0.7, 0.65, 0.6), (0.35, 0.35, 0.4)
NAME = "zoo-clip"  # a number always names the judge it came from


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP model of random weights for pictures of 64 x 64 pixels."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def new_image_processor() -> CLIPImageProcessor:
    """The processor that goes with it: pictures keep their 64 x 64 pixels."""
    return CLIPImageProcessor(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


def normalise(images_BCHW: Tensor) -> Tensor:
    """Float in [-1, 1] -> what the image processor would make of the same pictures."""
    mean, std = (
        torch.tensor(v, device=images_BCHW.device).reshape(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD)
    )
    return ((images_BCHW + 1) / 2 - mean) / std


@torch.no_grad()
def image_features(judge: CLIPModel, images_BCHW: Tensor, batch_size: int = 128) -> Tensor:
    """Unit-length embeddings of pictures in [-1, 1]."""
    found = []
    for batch in images_BCHW.split(batch_size):
        pooled = judge.vision_model(normalise(batch).to(judge.device, judge.dtype)).pooler_output
        found.append(F.normalize(judge.visual_projection(pooled).float(), dim=-1).cpu())
    return torch.cat(found)


@torch.no_grad()
def text_features(judge: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions in the judge's space, of length 1: (N, D), on the CPU."""
    pooled = judge.text_model(tokenize(tokenizer, captions).to(judge.device)).pooler_output
    return F.normalize(judge.text_projection(pooled).float(), dim=-1).cpu()


def retrieval_top1(
    images_BD: Tensor, captions: list[str], texts_ND: Tensor, pool: list[str], seed: int = 0
) -> float:
    """How often a picture finds its own caption among 100 of the pool."""
    rng = random.Random(seed)
    row_of = {caption: row for row, caption in enumerate(pool)}
    hits = 0
    for image, caption in zip(images_BD, captions, strict=True):
        others = [c for c in rng.sample(pool, min(100, len(pool))) if c != caption][:99]
        rows = [row_of[c] for c in (caption, *others)]
        hits += int((texts_ND[rows] @ image).argmax() == 0)
    return hits / len(captions)


class ConceptBatches:
    """Batches of distinct concepts, each in a random style: no false negatives."""

    def __init__(self, pictures: Pictures, device: str) -> None:
        rows: dict[str, list[int]] = defaultdict(list)
        for row, caption in enumerate(pictures.captions):
            rows[caption].append(row)
        padded = zip_longest(*rows.values(), fillvalue=0)
        self.rows_CS = torch.tensor(list(padded), device=device).T.contiguous()
        self.num_styles_C = torch.tensor([len(r) for r in rows.values()], device=device)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Rows of as many pictures: (B,), fewer where there are fewer concepts."""
        device = self.rows_CS.device
        concepts = torch.randperm(len(self.rows_CS), generator=generator, device=device)
        concepts = concepts[:batch_size]
        pick = torch.rand(len(concepts), generator=generator, device=device)
        return self.rows_CS[concepts, (pick * self.num_styles_C[concepts]).long()]


def save(judge: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> Path:
    """Into a scratch folder beside the target; returns it, ready to be published."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    half = CLIPModel(judge.config)
    half.load_state_dict(judge.state_dict())
    half.half().save_pretrained(scratch)
    CLIPProcessor(new_image_processor(), tokenizer).save_pretrained(scratch)
    return scratch


def main() -> None:
    """Train the judge and write it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    training.add_arguments(parser, out="zoo/models/judge", minutes=5)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    config = training.config_from(
        args, batch_size=args.batch_size, learning_rate=1e-3, ema_decay=0.995, weight_decay=0.05
    )
    torch.manual_seed(config.seed + 1)
    pictures = load_pictures(WORLD_STYLES)
    tokenizer = run_tokenizer(args.runs / "judge_tokenizer", training_texts(pictures))
    judge = new_judge(tokenizer).to(config.device)
    if config.device == "cpu":  # the fused kernel is slow there
        judge.set_attn_implementation("eager")
    batches = ConceptBatches(pictures, config.device)
    flippable = torch.tensor(
        [may_flip(c, g) for c, g in zip(pictures.captions, pictures.groups, strict=True)]
    ).to(config.device)
    ids_NL = tokenize(tokenizer, pictures.captions).to(config.device)
    images_NCHW = pictures.images_BCHW.to(config.device)

    def draw(generator: torch.Generator) -> training.Batch:
        rows = batches.draw(config.batch_size, generator)
        flip = torch.rand(len(rows), generator=generator, device=config.device) < 0.5
        images = jitter(to_float(images_NCHW[rows]), flip & flippable[rows], generator)
        return ids_NL[rows], normalise(images)

    def loss_fn(ids_BL: Tensor, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = judge(input_ids=ids_BL, pixel_values=pixels_BCHW.to(config.dtype))
        logits = output.logits_per_image.float()
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"top1": (logits.argmax(1) == target).float().mean()}

    def export(ema: nn.Module, run: training.Run) -> None:
        assert isinstance(ema, CLIPModel)
        ema.eval()
        pool = sorted(set(pictures.captions))
        sample = list(range(0, len(pictures), 29))
        top1 = retrieval_top1(
            image_features(ema, to_float(pictures.images_BCHW[sample])),
            [pictures.captions[row] for row in sample],
            text_features(ema, tokenizer, pool),
            pool,
        )
        scratch = save(ema, tokenizer, args.out)
        facts = training.run_facts(run, config, **{
            "name": NAME,
            "parameters": f"{sum(p.numel() for p in ema.parameters()):,}",
            "data": f"train split of all styles, `{data_hash(WORLD_STYLES)}`",
            "retrieval top-1 among 100, trained concepts": f"{top1:.3f}",
        })  # fmt: skip
        training.write_card(scratch, "Judge", facts)
        publish(scratch, args.out)

    training.train(judge, draw, loss_fn, config, args.runs / "judge.pt", on_checkpoint=export)


if __name__ == "__main__":
    main()
