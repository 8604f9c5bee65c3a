"""Further prompts for the embedded world, `zoo/data/prompts.txt`: made of words known and new.

    python -m zoo.prompts

The pack has 1,200 captions, and a guide trained on few prompts learns them by heart. A prompt
needs no picture to have a trajectory, so these are made up from what training sees: as many words
as a caption has, half of them from captions and keywords, half new, put together from the tokens
of others. No word that only held-out captions have is among them.
"""

import argparse
import random
from pathlib import Path

import pyarrow.parquet as pq
from transformers import CLIPTokenizer

from zoo.dataset import BASE_STYLES, DATA

TOKENIZER = Path(__file__).parent / "models/base/tokenizer"
NUM_PROMPTS = 8_000
NUM_TOKENS = {2: 4, 3: 4, 4: 2, 5: 1}  # of a new word, with weights: as long as rare words are


def texts(split: str) -> list[tuple[str, list[str]]]:
    """Caption and keywords of each concept of the base's styles."""
    columns = ["caption", "keywords", "split"]
    rows = [
        row
        for style in BASE_STYLES
        for row in pq.read_table(DATA / f"{style}.parquet", columns=columns).to_pylist()
    ]
    found = {row["caption"]: row["keywords"] for row in rows if row["split"] == split}
    return sorted(found.items())


def made_up(num_prompts: int) -> list[str]:
    """Prompts in no order that says anything, the same every time."""
    rng = random.Random(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    captions = [caption for caption, _ in texts("train")]
    in_captions = {word for caption in captions for word in caption.split()}
    heldout = {word for caption, _ in texts("heldout") for word in caption.split()} - in_captions
    words = [
        word
        for caption, keywords in texts("train")
        for word in " ".join([caption, *keywords]).split()
        if word not in heldout and word.isascii() and word.isalpha()
    ]
    pieces = [tokenizer.tokenize(word) for word in words]
    first = [tokens[0] for tokens in pieces if len(tokens) > 1]
    inner = first + [token for tokens in pieces for token in tokens[1:-1]]
    last = [tokens[-1].removesuffix("</w>") for tokens in pieces]

    def new_word() -> str:
        (length,) = rng.choices(list(NUM_TOKENS), list(NUM_TOKENS.values()))
        return "".join([rng.choice(first), *rng.choices(inner, k=length - 2), rng.choice(last)])

    prompts: dict[str, None] = {}
    while len(prompts) < num_prompts:
        length = len(rng.choice(captions).split())
        chosen = [new_word() if rng.random() < 0.5 else rng.choice(words) for _ in range(length)]
        if heldout.isdisjoint(chosen) and " ".join(chosen) not in captions:
            prompts[" ".join(chosen)] = None
    return list(prompts)


def main() -> None:
    """Write further prompts, one a line, in place of those that are there."""
    argparse.ArgumentParser(
        prog="python -m zoo.prompts", description=f"Make {DATA / 'prompts.txt'} anew."
    ).parse_args()
    (DATA / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in made_up(NUM_PROMPTS)))


if __name__ == "__main__":
    main()
