"""Writes smaller copies of a folder's images, once, so that training reads them faster.

The shorter side gets --side pixels; images that are no larger are copied as they are.
Folders and names stay. Originals are left alone, and existing copies are kept: to
resume, run the same command again. Pixels differ from the originals'.
"""

import collections
import io
import math
import os
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from harness.command_line import Parser  # first: it says which package is missing

# isort: split
from PIL import Image
from rich.console import Console
from rich.progress import track

from harness.crops import SUFFIXES, UNREADABLE
from harness.files import replacing
from harness.measuring import add_counts, check_positive


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if an image could not be read."""
    parser = Parser(__doc__, "example:\n  shrink.py imagenet imagenet-256")
    parser.add_argument("source", type=Path, metavar="FROM", help="folder of images")
    parser.add_argument("target", type=Path, metavar="TO", help="folder of the copies")
    add_counts(
        parser,
        side=(256, "pixels of the shorter side"),
        quality=(90, "quality of JPEG and WebP, up to 100"),
        threads=(os.cpu_count() or 1, "threads that read, shrink and write"),
    )
    args = parser.parse_args(argv)
    check_positive(parser, args, "side", "quality", "threads")
    if not args.source.is_dir():
        parser.error(f"Expected FROM to be a folder, got {args.source}.")
    if args.target.resolve().is_relative_to(args.source.resolve()):
        parser.error(f"Expected TO to be outside of FROM, got {args.target}.")
    files = [file for file in args.source.rglob("*") if file.suffix.lower() in SUFFIXES]
    if not files:
        parser.error(f"Expected images in {args.source}, found none.")

    def work(file: Path) -> str:
        copy = args.target / file.relative_to(args.source)
        if copy.exists():
            return "there already"
        try:
            image = shrink(file.read_bytes(), args.side, args.quality)
        except UNREADABLE as error:
            console.print(f"Expected an image in {file}: {error}.", soft_wrap=True)
            return "unreadable"
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as part:
            part.write_bytes(image)
        return "written"

    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata
    console = Console(stderr=True, highlight=False, markup=False)
    counts: collections.Counter[str] = collections.Counter()
    try:
        with ThreadPool(args.threads) as pool:
            done = pool.imap_unordered(work, files, chunksize=8)
            counts.update(
                track(
                    done,
                    "Shrinking",
                    len(files),
                    console=console,
                    disable=not console.is_terminal,
                )
            )
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to resume.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"shrink.py: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return int(counts["unreadable"] > 0)


def shrink(encoded: bytes, side: int, quality: int) -> bytes:
    """Returns an encoded image whose shorter side has no more than ``side`` pixels."""
    image: Image.Image = Image.open(io.BytesIO(encoded))
    kind = image.format if image.format in ("PNG", "BMP", "WEBP") else "JPEG"
    shorter = min(image.size)
    if shorter <= side:
        image.load()  # to its end: is it whole?
        return encoded
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")  # as training does
    width, height = (math.ceil(edge * side / shorter) for edge in image.size)
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    shrunk = io.BytesIO()
    image.save(shrunk, kind, quality=quality)
    return shrunk.getvalue()


if __name__ == "__main__":
    sys.exit(main())
