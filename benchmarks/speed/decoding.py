"""Times the input of examples/imagenet.py against decoding alone, and other decoders.

`decode` turns a JPEG into an array; `crop` also resizes a random part, flipped or not;
`input` is all that a training run waits for: reading, `crop`, shuffling and batching.
The JPEGs are cut from scikit-learn's two photos, with nearly as many bytes per pixel as
ImageNet's; there are also copies from shrink.py, and enlarged ones. All variants run in
turns. The processor time of all threads counts, so other programs matter less; a ratio
is the median of the rounds' ratios. Prints tables, and rewrites a JSON file after each
kind of file.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.command_line import Parser  # first: it says which package is missing

# isort: split
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from harness import crops
from harness.measuring import (
    add_counts,
    check_positive,
    describe_device,
    interleaved,
    median_ratio,
)
from harness.pipeline import DiskInput, Folder, Splits
from reports import tables
from shrink import shrink
from speed import timing
from tests import photos

_SIZE, _QUALITY = (500, 375), 96  # 89 kB; the mean of ImageNet is about 110
_LARGE = 4  # times as wide and high
_IMAGES = 1_281_167  # of ImageNet: the order of few costs more
DECODE, CROP = "decode: Pillow", "crop: Pillow"
_BATCH = 64
# The name of the module, and of the package that brings it.
_MODULES = {
    "opencv": ("cv2", "opencv-python-headless"),
    "simplejpeg": ("simplejpeg",) * 2,
}
# A fork, which has the same name.
LIBRARY = "Pillow-SIMD" if "post" in PIL.__version__ else "Pillow"
Pixels = NDArray[np.uint8]
Step = Callable[[bytes, int], Any]  # an array, or what becomes one


@dataclasses.dataclass
class Result:
    """One way to read images.

    Attributes:
      library: what the name PIL stands for.
      shape: width and height of the files.
      kilobytes: of a file, on average.
      variant: what is done, and by what.
      images_per_second: of processor time.
      ratio: of time to that of decoding alone with Pillow.
      difference: of a pixel to Pillow's, on average, of 255; None of the input.
    """

    library: str
    shape: tuple[int, int]
    kilobytes: float
    variant: str
    images_per_second: float
    ratio: float
    difference: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--decoders",
        nargs="*",
        choices=tuple(_MODULES),
        default=tuple(_MODULES),
        help="decoders to time besides Pillow (default: all)",
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=(1, 2),
        metavar="N",
        help="numbers of threads of the input (default: 1 2)",
    )
    add_counts(
        parser,
        image_size=(224, "side of the crops, in pixels"),
        side=(256, "shorter side of the files that shrink.py makes"),
        photos=(64, "different files"),
        images=(512, "images that each measurement of the input reads"),
        rounds=(15, "measurements of each variant"),
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    check_positive(parser, args, "image_size", "side", "photos", "images", "rounds")
    modules = {}
    for name in args.decoders:
        module, package = _MODULES[name]
        try:
            modules[name] = importlib.import_module(module)
        except ImportError as error:
            parser.error(
                f"--decoders {name}: {error}. Type: pip install {package}; or leave it "
                "out, with --decoders."
            )
    path = timing.new_path(parser, args.json, "decoding-{device}")
    packages = [_MODULES[name][1] for name in args.decoders]
    device = describe_device("grain", *packages)
    device["versions"][LIBRARY] = PIL.__version__
    report: dict[str, Any] = {
        "benchmark": "decoding",
        "what": "images a second of processor time, decoded, cropped and in batches",
        **device,
        "image_size": args.image_size,
        "rounds": args.rounds,
        "results": [],
    }
    originals = [
        photos.encoded(photo, quality=_QUALITY)
        for photo in photos.photos(args.photos, _SIZE)
    ]
    shrunk = [shrink(file, args.side, quality=90) for file in originals]
    large = [enlarge(file) for file in originals[: 1 + len(originals) // _LARGE**2]]
    for files in originals, shrunk, large:
        results = measure(files, modules, args)
        report["results"] += [dataclasses.asdict(result) for result in results]
        timing.say(f"{len(report['results'])} variants measured")
        timing.write(path, report)
    print(tables.TABLES["decoding"](report))
    print(f"Numbers: {path}")
    return 0


def enlarge(file: bytes) -> bytes:
    """Returns a photo with more pixels, and no more detail."""
    image = Image.open(io.BytesIO(file))
    size = image.width * _LARGE, image.height * _LARGE
    return photos.encoded(image.resize(size, Image.Resampling.BICUBIC), quality=90)


def measure(
    files: list[bytes], modules: dict[str, Any], args: argparse.Namespace
) -> Iterator[Result]:
    """Yields the results of files of one size."""
    steps = variants(modules, args.image_size)
    pixels = {
        name: [step(file, number) for number, file in enumerate(files)]
        for name, step in steps.items()
    }
    counts = dict.fromkeys(steps, len(files))
    runs: dict[str, Callable[[], None]] = {
        name: functools.partial(_call, steps[name], files) for name in steps
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(Path(folder, f"{number}.jpg") for number in range(len(files)))
        for path, file in zip(paths, files, strict=True):
            path.write_bytes(file)
        for threads in args.threads:
            name = f"input: Pillow, {threads} thread{'s' * (threads > 1)}"
            counts[name] = args.images * len(files) // args.photos
            runs[name] = functools.partial(_read, paths, threads, counts[name], args)
        by_call = interleaved(runs, args.rounds, clock=time.process_time)
    seconds = {name: [t / counts[name] for t in by_call[name]] for name in runs}
    for name, times in seconds.items():
        difference = None
        if name in pixels:
            pillow = pixels[DECODE if name.startswith("decode") else CROP]
            errors = map(
                functools.partial(np.subtract, dtype=float), pixels[name], pillow
            )
            difference = statistics.mean(
                float(np.abs(error).mean()) for error in errors
            )
        yield Result(
            library=LIBRARY,
            shape=Image.open(io.BytesIO(files[0])).size,
            kilobytes=statistics.mean(map(len, files)) / 1e3,
            variant=name,
            images_per_second=1 / statistics.median(times),
            ratio=median_ratio(times, seconds[DECODE]),
            difference=difference,
        )


def variants(modules: dict[str, Any], size: int) -> dict[str, Step]:
    """Returns what makes pixels of a file and its number, by names of variants."""

    def box_and_flip(shape: tuple[int, ...], number: int) -> tuple[Any, bool]:
        rng = np.random.default_rng(number)
        return crops._random_box(rng, shape[1], shape[0]), rng.random() < 0.5

    def pillow(file: bytes, number: int) -> Pixels:
        image = crops.Encoded("", file, 0)
        return crops.random(image, size, np.random.default_rng(number))

    def plain(file: bytes, number: int) -> Pixels:
        width, height = Image.open(io.BytesIO(file)).size
        return photos.plain_crop(file, size, *box_and_flip((height, width), number))

    def load(file: bytes, number: int) -> Image.Image:
        image = Image.open(io.BytesIO(file))
        image.load()
        return image

    decode: dict[str, Step] = {
        DECODE: lambda file, number: np.asarray(load(file, number)),
        "decode: Pillow, no array": load,
    }
    crop: dict[str, Step] = {CROP: pillow, "crop: Pillow, step by step": plain}
    if simplejpeg := modules.get("simplejpeg"):
        decode["decode: simplejpeg"] = lambda file, number: simplejpeg.decode_jpeg(file)

        def simplejpeg_and_pillow(file: bytes, number: int) -> Pixels:
            decoded = simplejpeg.decode_jpeg(file)
            box, flip = box_and_flip(decoded.shape, number)
            resized = Image.fromarray(decoded).resize(
                (size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0
            )
            if flip:
                resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return np.asarray(resized)

        crop["crop: simplejpeg, Pillow"] = simplejpeg_and_pillow
    if cv2 := modules.get("opencv"):
        cv2.setNumThreads(1)

        def opencv(file: bytes, number: int) -> Pixels:
            return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)

        def opencv_crop(interpolation: int, file: bytes, number: int) -> Pixels:
            decoded = opencv(file, number)
            box, flip = box_and_flip(decoded.shape, number)
            left, top, right, bottom = map(int, box)
            part = decoded[top:bottom, left:right]
            resized = cv2.resize(part, (size, size), interpolation=interpolation)
            return cv2.flip(resized, 1) if flip else resized

        decode["decode: OpenCV"] = opencv
        for name in "area", "linear":
            interpolation = getattr(cv2, f"INTER_{name.upper()}")
            crop[f"crop: OpenCV, {name}"] = functools.partial(
                opencv_crop, interpolation
            )
    return decode | crop


def _call(step: Step, files: list[bytes]) -> None:
    for number, file in enumerate(files):
        step(file, number)


def _read(
    paths: tuple[Path, ...], threads: int, count: int, args: argparse.Namespace
) -> None:
    """Reads so many of ImageNet's number of images, as a training does."""
    repeated = Folder(paths * (_IMAGES // len(paths)), (0,) * _IMAGES, ("photo",))
    disk = DiskInput(
        Splits(repeated, repeated, 1), args.image_size, _BATCH, 0, threads, False
    )
    for _ in disk.batches(disk.crops()[:count], _BATCH):
        pass


if __name__ == "__main__":
    sys.exit(main())
