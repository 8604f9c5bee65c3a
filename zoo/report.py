"""One page on the world's models: sample grids, and the numbers that they must reach.

    python -m zoo.report --json

Writes ``zoo/models/report/`` (one grid a model and ``report.md``); the last line on stdout is one
JSON object. Every distance is measured in the features of the judge that the object names.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from zoo import training
from zoo.autoencoder import psnr_by_style
from zoo.base import load_pipeline
from zoo.dataset import (
    BASE_STYLES,
    FINETUNE_STYLES,
    LORA_STYLE,
    WORLD_STYLES,
    load_pictures,
    to_float,
)
from zoo.judge import NAME, image_features, retrieval_top1, text_features
from zoo.sampling import grid, prompts_of, sample, with_unet

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.0, 7.0)
KID_NOISE = 1.6e-3  # standard deviation of 1,000 pictures' KID: nothing is measurably nearer
BOUNDS = {
    "ae_psnr_worst": ">= 26 dB",
    "judge_top1": ">= 0.90",
    "base_cfg_top1": ">= 0.70",
    "fid_unguided_over_cfg": ">= 1.5",
    "finetune_kid_ratio_worst": ">= 3.0",
    "weights_mb": "<= 100",
    "largest_file_mb": "<= 30",
}


def frechet_distance(x_ND: Tensor, y_ND: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (Heusel et al., 2017)."""
    x_ND, y_ND = x_ND.double(), y_ND.double()
    mean = (x_ND.mean(0) - y_ND.mean(0)).square().sum()
    cov_x, cov_y = x_ND.T.cov(), y_ND.T.cov()
    # tr (Cx Cy)^(1/2) is the sum of the roots of the product's eigenvalues, all >= 0
    roots = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return float(mean + cov_x.trace() + cov_y.trace() - 2 * roots)


def kernel_distance(x_ND: Tensor, y_ND: Tensor) -> float:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al., 2018).

    Features have unit length here; they are scaled to norm sqrt(D) for the kernel to have range.
    """
    width = x_ND.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ b.T) + 1) ** 3  # (sqrt(D) a . sqrt(D) b) / D

    assert width > 0
    x_ND, y_ND = x_ND.double(), y_ND.double()
    num_x, num_y = len(x_ND), len(y_ND)
    within_x = (kernel(x_ND, x_ND).sum() - kernel(x_ND, x_ND).diagonal().sum()) / (
        num_x * (num_x - 1)
    )
    within_y = (kernel(y_ND, y_ND).sum() - kernel(y_ND, y_ND).diagonal().sum()) / (
        num_y * (num_y - 1)
    )
    return float(within_x + within_y - 2 * kernel(x_ND, y_ND).mean())


def weight_sizes(models: Path) -> tuple[float, float]:
    """All weights together and the largest file, in MB."""
    sizes = [path.stat().st_size / 1e6 for path in models.rglob("*.safetensors")]
    return round(sum(sizes), 1), round(max(sizes), 1)


def main() -> None:
    """Measure the models and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("zoo/models"))
    parser.add_argument("--out", type=Path, default=Path("zoo/models/report"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="numbers only, no grids")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folders = {style: args.models / style for style in FINETUNE_STYLES}
    folders[f"{LORA_STYLE}-lora"] = args.models / f"{LORA_STYLE}-lora"
    folders = {name: folder for name, folder in folders.items() if folder.exists()}
    pipe = load_pipeline(args.models / "base", args.device)
    result = measure(args, pipe, folders)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    if not args.json:
        shown = {split: prompts_of(split, "noto", 16, seed=1) for split in ("train", "heldout")}
        draw_grids(pipe, folders, shown, args.out)
        result |= {"prompts": shown, "grids": ["base", *folders]}
        (args.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "report.md").write_text(page(result))
    print(json.dumps(result))


def draw_grids(
    pipe: StableDiffusionPipeline, folders: dict[str, Path], shown: dict[str, list[str]], out: Path
) -> None:
    """One picture a model: a row for each split and guidance scale, the same seeds in all."""
    prompts = [prompt for split in shown.values() for prompt in split]
    for name, folder in {"base": None, **folders}.items():
        model = pipe if folder is None else with_unet(pipe, folder)
        rows: dict[str, list[tuple[str, Tensor]]] = {split: [] for split in shown}
        for scale in GUIDANCE_SCALES:
            images = sample(model, prompts, scale).split([len(split) for split in shown.values()])
            for split, drawn in zip(shown, images, strict=True):
                rows[split].append((f"{split} w={scale:g}", drawn))
        labelled = [row for split in rows.values() for row in split]
        grid(labelled).quantize(256).save(out / f"{name}.png", optimize=True)
        training.log(f"grid: {name}")


def measure(
    args: argparse.Namespace, pipe: StableDiffusionPipeline, folders: dict[str, Path]
) -> dict[str, Any]:
    """Every number of the report, by its key."""
    judge = CLIPModel.from_pretrained(args.models / "judge", dtype=torch.float32).to(args.device)
    tokenizer = CLIPTokenizer.from_pretrained(args.models / "judge")
    vae: AutoencoderKL = pipe.vae
    result: dict[str, Any] = {"judge": NAME, "num_images": args.num_images}

    by_style = psnr_by_style(vae, "heldout", WORLD_STYLES)
    result["ae_psnr"] = by_style
    result["ae_psnr_worst"] = min(by_style.values())
    training.log(f"autoencoder: {by_style}")

    pool = sorted(set(load_pictures(WORLD_STYLES).captions))
    texts = text_features(judge, tokenizer, pool)
    real = load_pictures(WORLD_STYLES)
    rows = list(range(0, len(real), 9))
    real_features = image_features(judge, to_float(real.images_BCHW[rows]))
    result["judge_top1"] = retrieval_top1(
        real_features, [real.captions[row] for row in rows], texts, pool
    )
    training.log(f"judge: {result['judge_top1']:.3f}")

    prompts = prompts_of("train", "noto", args.num_images)
    reference = image_features(judge, to_float(load_pictures(BASE_STYLES).images_BCHW))
    base_features, top1, fid = {}, {}, {}
    for scale in GUIDANCE_SCALES:
        images = sample(pipe, prompts, scale)
        base_features[scale] = image_features(judge, images)
        top1[scale] = retrieval_top1(base_features[scale], prompts, texts, pool)
        fid[scale] = frechet_distance(base_features[scale], reference)
        training.log(f"base w={scale:g}: top-1 {top1[scale]:.3f}, FID {fid[scale]:.4f}")
    best = min(GUIDANCE_SCALES[1:], key=lambda scale: fid[scale])
    result["base_top1_by_w"], result["base_fid_by_w"] = top1, fid
    result["base_best_w"] = best
    result["base_cfg_top1"] = max(top1[scale] for scale in GUIDANCE_SCALES[1:])
    result["fid_unguided_over_cfg"] = round(fid[1.0] / fid[best], 3)

    distances, ratios = {}, {}
    for name, folder in folders.items():
        style = name.removesuffix("-lora")
        own = image_features(judge, to_float(load_pictures([style]).images_BCHW))
        tuned_images = sample(with_unet(pipe, folder), prompts, best)
        of_base = kernel_distance(base_features[best], own)
        of_tuned = kernel_distance(image_features(judge, tuned_images), own)
        distances[name] = {"finetune": round(of_tuned, 5), "base": round(of_base, 5)}
        ratios[name] = round(of_base / max(of_tuned, KID_NOISE), 2)
        training.log(f"{name}: KID {of_tuned:.5f}, the base's {of_base:.5f}")
    result["finetune_kid"], result["finetune_kid_ratio"] = distances, ratios
    full = [ratio for name, ratio in ratios.items() if not name.endswith("-lora")]
    result["finetune_kid_ratio_worst"] = min(full, default=None)
    result["weights_mb"], result["largest_file_mb"] = weight_sizes(args.models)
    return result


def page(result: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "# The embedded world",
        "",
        f"Judge: {result['judge']}. {result['num_images']} pictures a measurement.",
    ]
    lines += ["", "| | bound | reached |", "|---|---|---|"]
    lines += [f"| `{key}` | {bound} | {result[key]} |" for key, bound in BOUNDS.items()]
    for split, prompts in result.get("prompts", {}).items():
        lines += ["", f"Columns of the grids, {split}: {', '.join(prompts)}."]
    for name in result.get("grids", []):
        lines += ["", f"## {name}", "", f"![{name}]({name}.png)"]
    lines += ["", "```json", json.dumps(result, indent=2), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
