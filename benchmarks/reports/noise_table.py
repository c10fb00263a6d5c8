"""The errors of samples as Markdown: of gradients by batch size, and of statistics."""

from typing import Any

from reports.studies import PM
from reports.tables import Report, markdown, number, percent


def noise_table(report: Report) -> str:
    """Returns a table of the gradients, and one of the statistics of the largest batch.

    Args:
      report: what noise.py writes.
    """
    rows = report["results"]
    sizes = sorted({row["batch_size"] for row in rows}, reverse=True)
    first = [row for row in rows if row["batch_size"] == sizes[0]]
    found = {(row["sampler"], row["batch_size"]): row for row in rows}
    lines = []
    for row in sorted(first, key=lambda row: row["gradient"]):
        name = row["sampler"]
        of_sizes = [found.get((name, size)) for size in sizes]
        lines.append([_name(name), percent(row["measured"]), *map(_gradient, of_sizes)])
    header = ["sampler", "measured", *(f"batch {size}" for size in sizes)]
    maps = [errors["size"] for errors in first[0]["statistics"]]
    statistics = [
        [
            _name(row["sampler"]),
            *(_offset_and_noise(e, "mean") for e in row["statistics"]),
            *(_offset_and_noise(e, "log_var") for e in row["statistics"]),
        ]
        for row in sorted(first, key=lambda row: row["gradient"])
    ]
    columns = [f"{what}, {n} × {n}" for what in ("mean", "log var") for n in maps]
    settings = report["settings"]
    return "\n\n".join(
        [
            f"{settings['model']} of width {settings['width']}, trained with batch "
            f"norm for {settings['epochs']} epochs on {report['train_size']:,} images "
            f"of CIFAR-10 (test accuracy {percent(report['test_accuracy'], 0)}); "
            f"{first[0]['batches']} batches of these images.",
            "Squared distance of the gradient from that with the whole batch's "
            "statistics, divided by the variance of the gradient between batches; with "
            "its standard error where that is more than a tenth:",
            markdown(header, lines, left=1),
            f"Errors of the statistics of batches of {sizes[0]}, by size of the map: "
            "root mean squares, in thousandths. The first number is the part that is "
            "the same in all batches, the second the part that varies. Errors of the "
            "mean are in standard deviations:",
            markdown(["sampler", *columns], statistics, left=1),
        ]
    )


def _name(sampler: str) -> str:
    return f"`{sampler}`" if sampler.endswith(")") else sampler


def _gradient(row: dict[str, Any] | None) -> str:
    """Returns an error of two digits, and its own where that is large."""
    if row is None:
        return "-"
    value, error = row["gradient"], row["gradient_error"]
    if value < 1e-6:  # all is measured
        return "0"
    digits = 0 if value >= 10 else 1 if value >= 1 else 2 if value >= 0.1 else 3
    text = number(value, digits)
    return text if error <= 0.1 * value else f"{text}{PM}{number(error, digits)}"


def _offset_and_noise(errors: dict[str, float], what: str) -> str:
    offset, noise = (1000 * errors[f"{what}_{part}"] for part in ("offset", "noise"))
    return f"{offset:.0f}, {noise:.0f}"
