"""What the table of quality says: its rows, and the numbers that the project answers for."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.record import header

STEPS = (50, 16, 8, 4)
PEER_STEPS = (16,)
LABELS = {
    "unguided": "no guidance",
    "cfg": "CFG",
    "cfg_half": "CFG, half the steps",
    "guided": "this guide",
    "meng": "whole UNet tuned (Meng et al., stage 1)",
    "agd": "attention adapters (AGD)",
    "dice": "text sharpening (DICE)",
}


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that the project answers for; None where rows of peers are not made yet."""
    models: Mapping[str, Any] = results["models"]
    tuned = [name for name in models if name != "base"]

    def fvu(method: str, names: Iterable[str]) -> float:
        return mean(models[name][method]["guidance_fvu"] for name in names)

    def distance(method: str, names: Iterable[str], num_steps: int) -> float:
        return mean(models[name][method][str(num_steps)]["fid"] for name in names)

    def worst_ratio(steps: Sequence[int]) -> float:
        return max(
            distance("guided", [m], n) / distance("cfg", [m], n) for m in models for n in steps
        )

    (at,) = PEER_STEPS
    ahead = behind = None
    if all(peer in rows for rows in models.values() for peer in PEERS):
        ahead = all(
            figure("guided", names) < figure(peer, names)
            for peer in (name for name, kind in PEERS.items() if kind.is_add_on)
            for names in (["base"], tuned)
            for figure in (fvu, lambda method, names: distance(method, names, at))
        )
        behind = distance("guided", ["base"], at) / distance("meng", ["base"], at) - 1
    return {
        "judge": results["setting"]["judge"],
        "fvu_base": fvu("guided", ["base"]),
        "fvu_finetune_worst": max(fvu("guided", [name]) for name in tuned),
        "fid_ratio_worst": worst_ratio([n for n in STEPS if n != 4]),
        "fid_ratio_4": worst_ratio([4]),
        "beats_all_peers": ahead,
        "fid_behind_whole_unet": behind,
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: tables of the methods by model and step count, and of costs."""
    setting, models, costs = results["setting"], results["models"], results["costs"]
    num_images = next(iter(models.values()))["cfg"][str(STEPS[0])]["num_images"]
    methods = [method for method in LABELS if any(method in rows for rows in models.values())]
    lines = [
        header(results, methods),
        "",
        f"Guidance scale {setting['guidance_scale']:g}; {setting['images_seen']:,} images seen in "
        f"training and {setting['images_seen_in_a_round']:,} more in a round of halving. Judge: "
        f"{setting['judge']}.",
        "",
        f"FID of {num_images:,} images each, which is biased upwards: compare within this table.",
        "",
        "Teacher pairs trained on: "
        + ", ".join(
            f"{LABELS[method]} {cost['pairs']:,} of the base"
            + (f" and {cost['companions']} companions" if cost["companions"] else "")
            for method, cost in costs.items()
        )
        + ".",
    ]
    for model, rows in sorted(models.items()):
        lines += [
            "",
            f"## {model}",
            "",
            "| method | parameters | FLOPs / CFG | training FLOPs / forward | guidance_fvu | "
            + " | ".join(f"FID, {n} steps" for n in STEPS)
            + " | PSNR to CFG, 16 steps |",
            "|---" * (6 + len(STEPS)) + "|",
        ]
        for method, label in LABELS.items():
            if method not in rows:
                continue
            row, cost = rows[method], costs.get(method, {})
            fids = [f"{row[str(n)]['fid']:.2f}" if str(n) in row else "" for n in STEPS]
            cells = [
                label,
                f"{cost['params_ratio']:.2%}" if cost else "",
                f"{cost['flops_ratio']:.3f}" if cost else "",
                f"{cost['train_flops_ratio']:.2f}" if cost else "",
                f"{row['guidance_fvu']:.3f}" if "guidance_fvu" in row else "",
                *fids,
                f"{row['16']['cfg_psnr']:.1f} dB" if "16" in row and method != "cfg" else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
