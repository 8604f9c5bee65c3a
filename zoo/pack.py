"""Build the dataset pack: npm art packages -> ``zoo/data/<style>.parquet`` and ``ATTRIBUTION.md``.

    python -m zoo.pack --out zoo/data

Every package is fetched with ``npm pack`` at a pinned version and checked against a pinned
SHA-256; the rendering is deterministic, so a second run writes the same bytes. The files follow
the Hugging Face image convention and open with any parquet reader.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE_SIZE = 64
RENDER_SIZE = 256  # an exact multiple, so that downsampling is a box average
EMOJIBASE = ("emojibase-data", "17.0.0")


class PackError(RuntimeError):
    """The pack can't be built, and the message says what to do."""


@dataclass(frozen=True)
class Icons:
    """The drawings of one package, in Iconify's terms."""

    icon_set: dict[str, Any]  # {"icons": {name: {"body": SVG elements}}, "width": ..., ...}
    names: dict[str, str]  # code points -> name, where the package says so
    run_together: bool = False  # whether names are written as one word


def read_iconify(tarball: Path) -> Icons:
    """An Iconify package as it is."""
    icon_set = json.loads(read_member(tarball, "icons.json"))
    try:
        return Icons(icon_set, json.loads(read_member(tarball, "chars.json")))
    except KeyError:  # the older packages have no table of code points
        return Icons(icon_set, {})


def read_run_together(tarball: Path) -> Icons:
    """An Iconify package whose names are Unicode's own, each as one word."""
    return replace(read_iconify(tarball), run_together=True)


def read_first_variants(tarball: Path) -> Icons:
    """An Iconify package that numbers the drawings of one name: the first of each."""
    icons = read_iconify(tarball)
    drawn = {name.removesuffix("-1"): icon for name, icon in icons.icon_set["icons"].items()}
    return replace(icons, icon_set={**icons.icon_set, "icons": drawn})


def read_openmoji_outlines(tarball: Path) -> Icons:
    """OpenMoji's black set: its drawings without the coloured layers, as its own export does it."""
    coloured = {"grid", "color", "color-foreground", "skin", "skin-shadow", "hair"}
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    icons = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parts[1] != "src" or path.suffix != ".svg" or "extras" in path.parts[2]:
                continue
            file = archive.extractfile(member)
            assert file is not None
            layers = [
                ElementTree.tostring(layer, encoding="unicode")
                for layer in ElementTree.parse(file).getroot()
                if layer.get("id") not in coloured
            ]
            icons[plain_hexcode(path.stem)] = {"body": "".join(layers)}
    return Icons({"icons": icons, "width": 72, "height": 72}, {code: code for code in icons})


def read_noto_font(tarball: Path) -> Icons:
    """Noto Emoji's outline font: the glyphs of single code points, centred in a square."""
    from fontTools.pens.boundsPen import BoundsPen  # only the builder needs it
    from fontTools.pens.svgPathPen import SVGPathPen
    from fontTools.pens.transformPen import TransformPen
    from fontTools.ttLib import TTFont

    icons = {}
    with tarfile.open(tarball) as archive:
        members = [m for m in archive if re.search(r"noto-emoji-\d+-700-normal\.woff$", m.name)]
        for member in sorted(members, key=lambda m: m.name):
            file = archive.extractfile(member)
            assert file is not None
            font = TTFont(io.BytesIO(file.read()))
            glyphs, square = font.getGlyphSet(), font["head"].unitsPerEm * 1.25
            for code, glyph in font.getBestCmap().items():
                bounds = BoundsPen(glyphs)
                glyphs[glyph].draw(bounds)
                if bounds.bounds is None:
                    continue
                left, bottom, right, top = bounds.bounds
                path = SVGPathPen(glyphs)
                to_centre = ((square - left - right) / 2, (square + bottom + top) / 2)
                glyphs[glyph].draw(TransformPen(path, (1, 0, 0, -1, *to_centre)))
                body = f'<path d="{path.getCommands()}"/>'
                icons[f"{code:04x}"] = {"body": body, "width": square, "height": square}
    return Icons({"icons": icons}, {code: code for code in icons})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One npm package of art, and what its licence asks to be said."""

    style: str
    version: str
    title: str
    author: str
    license: str
    url: str
    package: str = ""
    read: Callable[[Path], Icons] = read_iconify

    def __post_init__(self) -> None:
        if not self.package:
            object.__setattr__(self, "package", f"@iconify-json/{self.style}")


_FLUENT: dict[str, Any] = {
    "author": "Microsoft Corporation",
    "license": "MIT",
    "url": "https://github.com/microsoft/fluentui-emoji",
}
_NOTO: dict[str, Any] = {
    "author": "Google Inc.",
    "license": "Apache-2.0",
    "url": "https://github.com/googlefonts/noto-emoji",
}
SOURCES = (
    Source(style="noto", version="1.2.9", title="Noto Emoji", **_NOTO),
    Source(
        style="twemoji",
        version="1.2.5",
        title="Twemoji",
        author="Twitter, Inc. and other contributors",
        license="CC-BY-4.0",
        url="https://github.com/jdecked/twemoji",
    ),
    Source(style="fluent-emoji-flat", version="1.2.6", title="Fluent Emoji, flat", **_FLUENT),
    Source(
        style="emojione",
        version="1.2.3",
        title="EmojiOne 2 (EmojiTwo)",
        author="EmojiOne and the EmojiTwo contributors",
        license="CC-BY-4.0",
        url="https://github.com/EmojiTwo/emojitwo",
    ),
    Source(
        style="openmoji",
        version="1.2.29",
        title="OpenMoji",
        author="The OpenMoji project, HfG Schwäbisch Gmünd",
        license="CC-BY-SA-4.0",
        url="https://github.com/hfg-gmuend/openmoji",
    ),
    Source(style="fluent-emoji", version="1.2.7", title="Fluent Emoji, 3D gradient", **_FLUENT),
    Source(
        style="fluent-emoji-high-contrast",
        version="1.2.6",
        title="Fluent Emoji, high contrast",
        **_FLUENT,
    ),
    Source(style="noto-v1", version="1.2.5", title="Noto Emoji v1 (blobs)", **_NOTO),
    Source(
        style="emojione-v1",
        version="1.2.3",
        title="EmojiOne 1",
        author="EmojiOne",
        license="CC-BY-SA-4.0",
        url="https://github.com/joypixels/emojione-legacy",
    ),
    Source(
        style="emojione-monotone",
        version="1.2.1",
        title="EmojiOne, monotone",
        author="EmojiOne",
        license="CC-BY-4.0",
        url="https://github.com/EmojiTwo/emojitwo",
    ),
    Source(
        style="openmoji-black",
        version="17.0.0",
        title="OpenMoji, black outlines",
        author="The OpenMoji project, HfG Schwäbisch Gmünd",
        license="CC-BY-SA-4.0",
        url="https://github.com/hfg-gmuend/openmoji",
        package="openmoji",
        read=read_openmoji_outlines,
    ),
    Source(
        style="noto-monochrome",
        version="5.3.2",
        title="Noto Emoji, monochrome font, bold",
        author="Google LLC",
        license="OFL-1.1",
        url="https://github.com/googlefonts/noto-emoji",
        package="@fontsource/noto-emoji",
        read=read_noto_font,
    ),
    Source(
        style="fxemoji",
        version="1.2.2",
        title="Firefox OS Emoji",
        author="Mozilla",
        license="Apache-2.0",
        url="https://github.com/mozilla/fxemoji",
        read=read_run_together,
    ),
    Source(
        style="streamline-emojis",
        version="1.2.4",
        title="Streamline Emojis",
        author="Streamline",
        license="CC-BY-4.0",
        url="https://github.com/webalys-hq/streamline-vectors",
        read=read_first_variants,
    ),
)

HELDOUT_SHARE = 10  # one concept in ten
SKIPPED_GROUPS = ("component", "flags")
# Who is pictured varies, what is pictured does not: one of each is enough.
_PERSON_VARIANT = re.compile(
    r"^(man|woman|men|women|mr|mrs)-|^family|^couple-with-heart-|^kiss-|-(man|woman|men|women)(-|$)"
    r"|-facing-right$"
)


@dataclass(frozen=True)
class Concept:
    """What a picture shows, in every style."""

    name: str
    hexcode: str
    group: str
    keywords: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The name in words."""
        return self.name.replace("-", " ")

    @property
    def split(self) -> str:
        """A tenth of the concepts is held out; the choice depends on the name alone."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0 else "train"


def slug(label: str) -> str:
    """``"three o’clock"`` -> ``"three-oclock"``, as the icon packages name their icons."""
    spoken = label.lower().replace("#", "number-sign").replace("*", "asterisk")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’]", "", spoken)).strip("-")


def fetch(package: str, version: str, cache: Path) -> Path:
    """The package's tarball, from the cache or from the npm registry, checksum verified."""
    tarball = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise PackError(
                "npm is not on the PATH: the art comes from npm packages. Install Node.js, or "
                f"put {tarball.name} into {cache}."
            )
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(cache)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not tarball.exists():
            raise PackError(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")
    expected = json.loads(Path(__file__).with_name("pack.lock.json").read_text(encoding="utf-8"))
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != expected[tarball.name]:
        raise PackError(
            f"{tarball} has SHA-256 {found}, pack.lock.json says {expected[tarball.name]}: "
            "delete the file and run again."
        )
    return tarball


def read_member(tarball: Path, member: str) -> bytes:
    """Raises KeyError if the package has no such file."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return file.read()


def concepts_from_emojibase(tarball: Path) -> dict[str, Concept]:
    """Hexcode (without variation selectors) -> concept."""
    groups = json.loads(read_member(tarball, "meta/groups.json"))["groups"]
    found = {}
    for emoji in json.loads(read_member(tarball, "en/data.json")):
        name, group = slug(emoji["label"]), groups.get(str(emoji.get("group")))
        if group is None or group in SKIPPED_GROUPS or _PERSON_VARIANT.search(name):
            continue
        hexcode = plain_hexcode(emoji["hexcode"])
        found[hexcode] = Concept(name, hexcode, group, tuple(emoji.get("tags", ())))
    return found


def plain_hexcode(hexcode: str) -> str:
    """A code point sequence in lower case, without the variation selector."""
    return hexcode.lower().replace("-fe0f", "")


def match_icons(
    drawings: dict[str, Icons], concepts: dict[str, Concept]
) -> dict[str, dict[str, Concept]]:
    """For each style: icon name -> concept.

    A style's own table of code points decides where it has one. The older packages have none:
    there, names are looked up among the other packages' names, the Unicode labels, and the
    aliases by which the packages link old names to new. Names that are written as one word are
    looked up among all of these, and Unicode's character names, written so too.
    """
    hexcode_of = {concept.name: hexcode for hexcode, concept in concepts.items()}
    for icons in drawings.values():
        for hexcode, name in icons.names.items():
            hexcode_of.setdefault(name, plain_hexcode(hexcode))
    aliases: dict[str, set[str]] = defaultdict(set)
    for icons in drawings.values():
        for alias, entry in icons.icon_set.get("aliases", {}).items():
            if set(entry) == {"parent"}:  # a true alias, not a mirrored or rotated drawing
                aliases[alias].add(entry["parent"])
                aliases[entry["parent"]].add(alias)

    def resolve(name: str) -> str | None:
        seen, queue = {name}, [name]
        while queue:
            current = queue.pop(0)
            if current in hexcode_of:
                return hexcode_of[current]
            queue += sorted(aliases[current] - seen)
            seen |= aliases[current]
        return None

    one_word = {one_word_of(name): hexcode for name, hexcode in reversed(hexcode_of.items())}
    for hexcode in concepts:
        if "-" not in hexcode:
            character = unicodedata.name(chr(int(hexcode, 16)), "")
            one_word.setdefault(one_word_of(character), hexcode)

    matched: dict[str, dict[str, Concept]] = {}
    for style, icons in drawings.items():
        own = {name: plain_hexcode(hexcode) for hexcode, name in icons.names.items()}
        if icons.run_together:
            own = {name: one_word.get(name, "") for name in icons.icon_set["icons"]}
        taken: dict[str, str] = {}
        for name in sorted(icons.icon_set["icons"]):
            code = own.get(name) or resolve(name)
            # an exact name beats an alias
            if code in concepts and (code not in taken or name == concepts[code].name):
                taken[code] = name
        matched[style] = {name: concepts[hexcode] for hexcode, name in taken.items()}
    return matched


def one_word_of(name: str) -> str:
    """A name without all that is between its words."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def svg_text(icon_set: dict[str, Any], name: str) -> str:
    """An icon of a set as an SVG document of ``RENDER_SIZE`` pixels."""
    icon = icon_set["icons"][name]
    left, top = (icon.get(key, icon_set.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icon_set.get(key, 16)) for key in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )


def render(svg: str) -> bytes:
    """SVG -> lossless WebP, ``IMAGE_SIZE`` square, RGB on white."""
    import resvg_py  # only the builder needs it

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True
        )
    )
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE), "white")
    canvas.paste(drawn, ((RENDER_SIZE - drawn.width) // 2, (RENDER_SIZE - drawn.height) // 2))
    canvas = Image.alpha_composite(Image.new("RGBA", canvas.size, "white"), canvas)
    small = canvas.convert("RGB").reduce(RENDER_SIZE // IMAGE_SIZE)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


_FEATURES: dict[str, Any] = {
    "image": {"_type": "Image"},
    "keywords": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "Sequence"},
} | {
    key: {"dtype": "string", "_type": "Value"}
    for key in (
        "caption", "concept", "group", "style", "source", "version", "license", "split",
    )
}  # fmt: skip
SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("group", pa.string()),
        ("style", pa.string()),
        ("source", pa.string()),
        ("version", pa.string()),
        ("license", pa.string()),
        ("split", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def rows(
    source: Source, icons: dict[str, Concept], images: list[bytes]
) -> Iterator[dict[str, Any]]:
    """The rows of one style, an icon each, as ``SCHEMA`` has them."""
    for (name, concept), image in zip(icons.items(), images, strict=True):
        yield {
            "image": {"bytes": image, "path": f"{source.style}/{name}.webp"},
            "caption": concept.caption,
            "keywords": list(concept.keywords),
            "concept": concept.name,
            "group": concept.group,
            "style": source.style,
            "source": source.package,
            "version": source.version,
            "license": source.license,
            "split": concept.split,
        }


def write_parquet(table_rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows, sorted by concept, so that no half-written file is left."""
    table = pa.Table.from_pylist(sorted(table_rows, key=lambda row: row["concept"]), SCHEMA)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd", row_group_size=512)
    partial.replace(path)


def attribution(counts: dict[str, int]) -> str:
    """The text of ATTRIBUTION.md, given the number of pictures of each style."""
    lines = [
        "# Attribution",
        "",
        "The pictures in this folder were drawn by the projects below. Each was taken from the",
        f"npm package named, rendered to {IMAGE_SIZE}x{IMAGE_SIZE} pixels on white, and is",
        "otherwise unchanged. Every row of every file repeats its source, version and licence.",
        "The files of a CC-BY-SA style are distributed under that licence. The models in",
        "`zoo/models` were trained on these pictures.",
        "",
        "| style | work | author | licence | source | package | pictures |",
        "|---|---|---|---|---|---|---|",
    ]
    texts = {
        "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
        "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
        "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
        "MIT": "https://opensource.org/license/mit",
        "OFL-1.1": "https://openfontlicense.org/open-font-license-official-text/",
    }
    for source in SOURCES:
        lines.append(
            f"| {source.style} | {source.title} | {source.author} "
            f"| [{source.license}]({texts[source.license]}) | {source.url} "
            f"| `{source.package}` {source.version} | {counts[source.style]:,} |"
        )
    lines += [
        "",
        f"Names, groups and keywords come from `{EMOJIBASE[0]}` {EMOJIBASE[1]} "
        "(Miles Johnson, MIT, https://github.com/milesj/emojibase).",
        "",
        "Fluent Emoji: Copyright (c) Microsoft Corporation. Permission is hereby granted, free of",
        "charge, to any person obtaining a copy of this software and associated documentation",
        'files (the "Software"), to deal in the Software without restriction, including without',
        "limitation the rights to use, copy, modify, merge, publish, distribute, sublicense,",
        "and/or sell copies of the Software, and to permit persons to whom the Software is",
        "furnished to do so, subject to the following conditions: The above copyright notice and",
        "this permission notice shall be included in all copies or substantial portions of the",
        'Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR',
        "IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A",
        "PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT",
        "HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF",
        "CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR",
        "THE USE OR OTHER DEALINGS IN THE SOFTWARE.",
        "",
    ]
    return "\n".join(lines)


def build(out: Path, cache: Path, num_workers: int) -> dict[str, int]:
    """Write the whole pack; returns the number of pictures per style."""
    tarballs = {source.style: fetch(source.package, source.version, cache) for source in SOURCES}
    concepts = concepts_from_emojibase(fetch(*EMOJIBASE, cache))
    drawings = {source.style: source.read(tarballs[source.style]) for source in SOURCES}
    matched = match_icons(drawings, concepts)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    with ProcessPoolExecutor(num_workers) as pool:
        for source in SOURCES:
            icons = matched[source.style]
            svgs = [svg_text(drawings[source.style].icon_set, name) for name in icons]
            images = list(pool.map(render, svgs, chunksize=32))
            write_parquet(list(rows(source, icons, images)), out / f"{source.style}.parquet")
            counts[source.style] = len(icons)
            print(f"{source.style}: {len(icons)} pictures", file=sys.stderr, flush=True)
    (out / "ATTRIBUTION.md").write_text(attribution(counts), encoding="utf-8")
    return counts


def main() -> None:
    """Build the dataset pack: a parquet file for each style, and the attribution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zoo/data"))
    parser.add_argument("--cache", type=Path, help="folder of npm tarballs (default: temporary)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            counts = build(args.out, args.cache or Path(scratch), args.workers)
    except PackError as error:
        sys.exit(f"zoo.pack: {error}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
