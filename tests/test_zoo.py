"""The embedded world: the pack, the models as committed, and the training loop's promises."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from pnp_core import GuideBundle, plug
from zoo import pack, training, world
from zoo.autoencoder import (
    decode,
    encode,
    pruned,
    psnr_by_style,
    standardise,
    telling_channels,
)
from zoo.base import load_pipeline, run_tokenizer, save_pipeline
from zoo.dataset import (
    BASE_STYLES,
    COMPANION_STYLE,
    DATA,
    FINAL_STYLES,
    FINETUNE_STYLES,
    LORA_STYLE,
    WORLD_STYLES,
    background_mask,
    jitter,
    load_pictures,
    may_flip,
    to_float,
)
from zoo.judge import image_features, retrieval_top1, text_features
from zoo.prompts import made_up
from zoo.report import BOUNDS, frechet_distance, kernel_distance, weight_sizes
from zoo.sampling import prompts_of

MODELS = Path("zoo/models")
SPDX = {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT", "OFL-1.1"}


@pytest.fixture(scope="module")
def columns() -> dict[str, dict[str, list]]:
    wanted = [name for name in pack.SCHEMA.names if name != "image"]
    return {
        style: pq.read_table(DATA / f"{style}.parquet", columns=wanted).to_pydict()
        for style in (*WORLD_STYLES, *FINAL_STYLES)
    }


def test_pack_has_every_column_and_licence(columns: dict[str, dict[str, list]]) -> None:
    for style in columns:
        assert pq.read_schema(DATA / f"{style}.parquet").equals(pack.SCHEMA)
        table = columns[style]
        assert set(table["style"]) == {style}
        assert len(set(table["license"])) == 1 and set(table["license"]) <= SPDX
        least = 400 if style in FINAL_STYLES else 900
        assert len(set(table["concept"])) == len(table["concept"]) > least
        assert all(table["caption"])
    named = (DATA / "ATTRIBUTION.md").read_text()
    for source in pack.SOURCES:
        assert f"`{source.package}` {source.version}" in named and source.license in named


def test_a_tenth_of_the_concepts_is_held_out_in_every_style(columns: dict) -> None:
    splits = {
        style: dict(zip(table["concept"], table["split"], strict=True))
        for style, table in columns.items()
    }
    every = {concept: split for table in splits.values() for concept, split in table.items()}
    assert 0.07 < sum(split == "heldout" for split in every.values()) / len(every) < 0.13
    for table in splits.values():
        assert all(every[concept] == split for concept, split in table.items())


def test_further_prompts_are_those_of_the_command_and_hold_nothing_of_the_heldout() -> None:
    shipped = (DATA / "prompts.txt").read_text().splitlines()
    assert shipped == made_up(len(shipped))
    split: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for style in BASE_STYLES:
        rows = pq.read_table(DATA / f"{style}.parquet", columns=["caption", "split"]).to_pylist()
        for row in rows:
            split[row["split"]] |= set(row["caption"].split())
    words = {word for prompt in shipped for word in prompt.split()}
    assert words.isdisjoint(split["heldout"] - split["train"])


def test_pack_has_no_flags_and_no_skin_tones(columns: dict) -> None:
    for table in columns.values():
        assert not [c for c in table["caption"] if "skin tone" in c]
        assert not set(table["group"]) & set(pack.SKIPPED_GROUPS)


def test_pack_is_small_and_its_pictures_open() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 40e6
    row = pq.read_table(DATA / "noto.parquet").slice(0, 1).to_pylist()[0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)


def test_eight_styles_share_1200_concepts() -> None:
    concepts = [
        set(pq.read_table(DATA / f"{style}.parquet", columns=["concept"])["concept"].to_pylist())
        for style in WORLD_STYLES
    ]
    large = [found for found in concepts if len(found) >= 1200]
    assert len(large) >= 8
    assert len(set.intersection(*large)) >= 1200


def test_outlines_are_the_drawing_without_its_coloured_layers(tmp_path: Path) -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg"><g id="color"><path d="M0 0"/></g>'
        '<g id="line"><path d="M1 1"/></g></svg>'
    )
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for folder in ("animals-nature/animal-mammal", "extras-openmoji/brand"):
            member = tarfile.TarInfo(f"package/src/{folder}/1F43B-FE0F.svg")
            member.size = len(svg)
            archive.addfile(member, io.BytesIO(svg.encode()))
    icons = pack.read_openmoji_outlines(tmp_path / "a.tgz")
    assert icons.names == {"1f43b": "1f43b"}
    assert "M1 1" in icons.icon_set["icons"]["1f43b"]["body"]
    assert "M0 0" not in icons.icon_set["icons"]["1f43b"]["body"]


def test_a_run_keeps_the_tokenizer_it_began_with(tmp_path: Path) -> None:
    first = run_tokenizer(tmp_path / "tokenizer", ["red apple", "green apple"])
    again = run_tokenizer(tmp_path / "tokenizer", ["something else altogether"])
    assert again("red apple").input_ids == first("red apple").input_ids


def test_the_same_drawings_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    icons = {"sun": {"body": '<circle cx="8" cy="8" r="6" fill="#fc0"/>'}}
    svg = pack.svg_text({"icons": icons}, "sun")
    concept = pack.Concept("sun", "2600", "travel-places", ("bright",))
    for name in ("a", "b"):
        made = list(pack.rows(pack.SOURCES[0], {"sun": concept}, [pack.render(svg)]))
        pack.write_parquet(made, tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    picture = Image.open(io.BytesIO(made[0]["image"]["bytes"]))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((32, 32)) == (255, 204, 0)


def test_a_missing_npm_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack.shutil, "which", lambda _: None)
    with pytest.raises(pack.PackError, match=r"npm is not on the PATH.*Node\.js"):
        pack.fetch("@iconify-json/noto", "1.2.9", tmp_path)


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "iconify-json-noto-1.2.9.tgz").write_bytes(b"half")
    with pytest.raises(pack.PackError, match="SHA-256"):
        pack.fetch("@iconify-json/noto", "1.2.9", tmp_path)


def test_old_names_find_their_concept_through_aliases() -> None:
    bear = pack.Concept("bear", "1f43b", "animals-nature", ())
    old = {"icons": {"bear-face": {}}, "aliases": {"bear": {"parent": "bear-face"}}}
    drawings = {
        "new": pack.Icons({"icons": {"bear": {}}}, {"1f43b": "bear"}),
        "old": pack.Icons(old, {}),
    }
    matched = pack.match_icons(drawings, {"1f43b": bear})
    assert matched == {"new": {"bear": bear}, "old": {"bear-face": bear}}


def test_a_name_written_as_one_word_is_found_among_labels_and_unicodes_character_names() -> None:
    bear, back = (
        pack.Concept("bear-face", "1f43b", "animals-nature", ()),
        pack.Concept("back-arrow", "1f519", "symbols", ()),
    )
    names = ["bearface", "backwithleftwardsarrowabove", "fox"]
    icons = pack.Icons({"icons": dict.fromkeys(names, {})}, {}, run_together=True)
    matched = pack.match_icons({"one": icons}, {"1f43b": bear, "1f519": back})
    assert matched == {"one": {"bearface": bear, "backwithleftwardsarrowabove": back}}


def test_of_numbered_drawings_of_a_name_the_first_is_taken(tmp_path: Path) -> None:
    icons = {"bear-1": {"body": "a"}, "bear-2": {"body": "b"}, "fox": {"body": "c"}}
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        for member, content in {"icons.json": {"icons": icons}, "chars.json": {}}.items():
            (tmp_path / member).write_text(json.dumps(content))
            archive.add(tmp_path / member, f"package/{member}")
    drawn = pack.read_first_variants(tmp_path / "set.tgz").icon_set["icons"]
    assert drawn["bear"] == {"body": "a"} and drawn["fox"] == {"body": "c"}


def test_flips_keep_captions_true() -> None:
    assert may_flip("red apple", "food-drink")
    assert not may_flip("left arrow", "symbols")
    assert not may_flip("backhand index pointing left", "people-body")


def test_jitter_keeps_white_white_and_backgrounds_end_at_the_subject() -> None:
    images = torch.ones(2, 3, 16, 16)
    moved = jitter(images, torch.tensor([False, True]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, images)
    images[:, :, 4:12, 4:12] = -1
    images[:, :, 7:9, 7:9] = 1  # white inside the subject is no background
    outside = background_mask(images)
    assert outside[0, 0, 0, 0] == 1 and outside[0, 0, 8, 8] == 0
    assert outside[0].sum() == 16 * 16 - 8 * 8


@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_world_has_every_model_and_takes_the_minutes_it_was_given(side_by_side: bool) -> None:
    stages = world.stages(Path("models"), Path("runs"), side_by_side=side_by_side)
    made = {job.command[-1].removeprefix("models/") for jobs in stages for job in jobs}
    tuned = {*FINETUNE_STYLES, f"{LORA_STYLE}-lora"}
    tuned.add(f"companions/{COMPANION_STYLE}")  # of the new base too
    assert made == {"runs/vae", "judge", "base", *tuned}
    longest = max if side_by_side else sum
    assert sum(longest(job.share for job in jobs) for jobs in stages) == pytest.approx(1)


def test_a_model_that_fails_to_train_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.Job(1.0, 8, ("zoo.no_such_model", "--option"))
    monkeypatch.setattr(world, "stages", lambda *args, **options: [[job]])
    monkeypatch.setattr("sys.argv", ["zoo.world", "--minutes", "1"])
    with pytest.raises(SystemExit, match="zoo.no_such_model --option .* failed with 1"):
        world.main()


def test_the_world_is_as_good_as_its_report_promises() -> None:
    report = json.loads((MODELS / "report/report.json").read_text())
    assert report["num_images"] >= 1000
    assert set(FINETUNE_STYLES) < report["finetune_kid_ratio"].keys()
    for key, bound in BOUNDS.items():
        sign, number = bound.split()[:2]
        assert report[key] >= float(number) if sign == ">=" else report[key] <= float(number), key
    assert weight_sizes(MODELS) == (report["weights_mb"], report["largest_file_mb"])


def test_the_autoencoder_keeps_the_lines_of_the_style_it_does_worst() -> None:
    report = json.loads((MODELS / "report/report.json").read_text())
    worst = min(report["ae_psnr"], key=report["ae_psnr"].get)
    vae = load_pipeline(MODELS / "base").vae
    found = psnr_by_style(vae, "heldout", (worst,))[worst]
    assert found >= 26 and found == pytest.approx(report["ae_psnr_worst"], abs=0.1)


def test_the_judge_finds_the_caption_of_real_pictures() -> None:
    judge = CLIPModel.from_pretrained(MODELS / "judge", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "judge")
    real = load_pictures(("noto", "openmoji"))
    rows = list(range(0, len(real), 12))
    pool = sorted(set(real.captions))
    top1 = retrieval_top1(
        image_features(judge, to_float(real.images_BCHW[rows])),
        [real.captions[row] for row in rows],
        text_features(judge, tokenizer, pool),
        pool,
    )
    assert top1 >= 0.90


def test_base_opens_as_a_stock_pipeline_and_draws() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "base")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red apple", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert sum(p.numel() for p in pipe.unet.parameters()) <= 6_500_000
    assert sum(p.numel() for p in pipe.vae.parameters()) <= 3_500_000
    assert "_name_or_path" not in json.loads((MODELS / "base/vae/config.json").read_text())


def test_a_saved_pipeline_opens_again_in_one_dtype(tmp_path: Path) -> None:
    save_pipeline(load_pipeline(MODELS / "base"), tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}


def test_judge_opens_and_sees() -> None:
    judge = CLIPModel.from_pretrained(MODELS / "judge", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(MODELS / "judge")
    blank = Image.new("RGB", (64, 64), "white")
    inputs = processor(text=["red apple", "cat"], images=[blank], return_tensors="pt", padding=True)
    assert judge(**inputs).logits_per_image.shape == (1, 2)


def test_an_autoencoder_without_its_silent_channels_decodes_as_if_they_were_their_mean() -> None:
    vae = load_pipeline(MODELS / "base").vae
    images = 2 * torch.rand(4, 3, 64, 64, generator=torch.manual_seed(0)) - 1
    kept = torch.arange(vae.config.latent_channels) % 4 != 0
    smaller = pruned(vae, kept)
    latents = encode(vae, images)
    torch.testing.assert_close(encode(smaller, images), latents[:, kept], atol=1e-4, rtol=1e-4)
    assert smaller.config.latent_channels == int(kept.sum())
    # the decoder's first layer: the same but at the border
    latents[:, ~kept] = 0
    whole, part = (
        model.decoder.conv_in(model.post_quant_conv(z)).detach()[:, :, 1:-1, 1:-1]
        for model, z in ((vae, latents), (smaller, latents[:, kept]))
    )
    torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


def test_channels_that_are_all_noise_say_nothing() -> None:
    vae = load_pipeline(MODELS / "base").vae
    channels = vae.config.latent_channels
    images = 2 * torch.rand(8, 3, 64, 64, generator=torch.manual_seed(0)) - 1
    standardise(vae, images)
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0  # log variances
        vae.quant_conv.bias[channels:] = -2.0
        vae.quant_conv.bias[channels + 3] = 1.0
    assert (~telling_channels(vae, images)).nonzero().tolist() == [[3]]


def test_standardised_latents_have_unit_variance_and_decode_to_the_same() -> None:
    vae = load_pipeline(MODELS / "base").vae
    images = 2 * torch.rand(16, 3, 64, 64, generator=torch.manual_seed(0)) - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = decode(vae, before.mean)
        standardise(vae, images)
        after = vae.encode(images).latent_dist
    torch.testing.assert_close(decode(vae, after.mean), decoded, atol=1e-4, rtol=1e-4)
    channels = after.mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(len(channels)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        channels.mean(dim=1), torch.zeros(len(channels)), atol=1e-3, rtol=1e-3
    )
    spread = before.mean.transpose(0, 1).flatten(1).std(dim=1).reshape(1, -1, 1, 1)
    torch.testing.assert_close(after.std * spread, before.std)


def toy_run(num_steps: int, checkpoint: Path, stop_after: int | None = None) -> torch.Tensor:
    """Least squares; ``stop_after`` kills the run at that step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    config = training.TrainConfig(num_steps=num_steps, batch_size=8, checkpoint_every_s=0.0)

    steps = iter(range(num_steps))

    def draw(generator: torch.Generator) -> tuple[torch.Tensor]:
        if next(steps) == stop_after:
            raise KeyboardInterrupt
        return (torch.randn(8, 4, generator=generator),)

    def loss_fn(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = model(x.to(config.dtype)).float() - x.sum(1, keepdim=True)
        return error.square().mean(), {}

    ema, run = training.train(model, draw, loss_fn, config, checkpoint)
    assert run.num_steps == num_steps and run.num_images == 8 * num_steps
    return torch.cat([p.flatten() for p in ema.parameters()])


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = toy_run(12, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        toy_run(12, tmp_path / "killed.pt", stop_after=7)
    assert torch.equal(toy_run(12, tmp_path / "killed.pt"), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_gives_every_batch_the_gradients_of_the_two_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1)).cuda()

    def loss_fn(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return error, {"twice": 2 * error.detach()}

    def outcome(passes: training.EagerGradients, x: torch.Tensor) -> list[torch.Tensor]:
        metrics = passes((x,))
        found = [metrics["loss"], metrics["twice"], *(p.grad for p in model.parameters())]
        return [value.clone() for value in found]

    batches = torch.randn(3, 8, 4, generator=torch.manual_seed(0)).cuda()
    graphed = training.GraphedGradients(model, loss_fn)
    found = [outcome(graphed, x) for x in batches]
    model.zero_grad(set_to_none=True)
    eager = training.EagerGradients(model, loss_fn)
    torch.testing.assert_close(found, [outcome(eager, x) for x in batches])


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = training.TrainConfig(num_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.rate(step, config.progress(step, 0.0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1.0 and rates[100] == 0.0


def test_length_is_given_once() -> None:
    with pytest.raises(ValueError, match="--steps or --minutes"):
        training.TrainConfig(num_steps=1, num_minutes=1.0)


def test_distances_vanish_on_equal_sets_and_grow_with_a_shift() -> None:
    x = torch.nn.functional.normalize(torch.randn(400, 8, generator=torch.manual_seed(0)), dim=-1)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    shifted = x + torch.tensor([0.5] + [0.0] * 7)
    assert frechet_distance(x, shifted) == pytest.approx(0.25, abs=1e-5)
    apart = kernel_distance(x[:200], shifted[200:])
    assert kernel_distance(x[:200], x[200:]) < apart / 10


def test_retrieval_counts_own_captions() -> None:
    texts = torch.eye(5)
    pool = list("abcde")
    assert retrieval_top1(texts, pool, texts, pool) == 1.0
    assert retrieval_top1(texts.roll(1, 0), pool, texts, pool) == 0.0


def test_prompts_and_styles_agree() -> None:
    assert set(BASE_STYLES) < set(WORLD_STYLES)
    assert {source.style for source in pack.SOURCES} == {*WORLD_STYLES, *FINAL_STYLES}


@torch.no_grad()
def test_the_shipped_guide_comes_nearer_to_cfg_than_no_guidance_on_a_style_it_never_saw() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "base", dtype=torch.float32)
    pipe.unet = UNet2DConditionModel.from_pretrained(MODELS / "openmoji/unet", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    heldout = prompts_of("heldout", "noto", 12, seed=2)

    def latents(guidance_scale: float) -> torch.Tensor:
        return pipe(
            heldout,
            num_inference_steps=8,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(n) for n in range(len(heldout))],
            output_type="latent",
        ).images

    unguided, cfg = latents(1.0), latents(3.0)
    bundle = GuideBundle.load(MODELS.parent / "guide")
    plug(pipe, bundle)
    guided = latents(3.0)
    assert (guided - cfg).square().mean() < 0.6 * (unguided - cfg).square().mean()
    for guide in bundle.guides.values():
        own, base = (sum(p.numel() for p in m.parameters()) for m in (guide, pipe.unet))
        assert own <= 0.01 * base
