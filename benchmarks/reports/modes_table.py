"""Training and evaluation mode during a training run, as Markdown."""

from reports.tables import Report, markdown, number, percent

_SHOWN = 4  # epochs


def modes_table(report: Report) -> str:
    """Returns a row for each method and some of the epochs, the last one at least.

    Args:
      report: what modes.py writes.
    """
    rows = report["results"]
    last = max(row["epoch"] for row in rows)
    shown = {1, *(last * (i + 1) // _SHOWN for i in range(_SHOWN))}
    lines = [
        [
            f"`{row['method']}`",
            str(row["epoch"]),
            *(percent(row[name]) for name in ("batch", "running", "estimated")),
            number(row["mean_error"], 3),
            number(row["log_var_error"], 3),
        ]
        for row in rows
        if row["epoch"] in shown
    ]
    header = [
        "method",
        "epoch",
        "batch's",
        "running",
        "estimated",
        "mean, off by",
        "log var, off by",
    ]
    settings = (
        f"{report['train_size']:,} training images of CIFAR-10, {last} epochs, one "
        f"seed; estimated from {report['images']:,} images."
    )
    return f"{settings}\n\n{markdown(header, lines, left=1)}"
