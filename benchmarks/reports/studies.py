"""The studies of accuracy: which training runs they are made of, and their tables.

A study is a grid, ``examples/studies/NAME-PROTOCOL.toml``; its training runs are found
among the results of its protocol, ``examples/results/PROTOCOL.jsonl``.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from harness import grid, journal
from harness.grid import Experiment as Experiment
from harness.grid import experiment_of, setting_of, varied
from harness.journal import Record
from reports.tables import SPACE, markdown, number, percent, versions

_SHORT = {
    "MixedSampling": "Mixed",
    "FeatureSampling": "FS",
    "BatchSampling": "BS",
    "VirtualSampling": "VDN",
}
PM = f"{SPACE}±{SPACE}"
_EARLY = 3  # the epoch at which tables show how fast a training starts


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid and what has been trained of it.

    Attributes:
      name: of the grid's file.
      experiments: all of the grid.
      records: the results, of other studies of the protocol, too.
    """

    name: str
    experiments: list[Experiment]
    records: dict[Experiment, Record]

    @property
    def kind(self) -> str:
        """The name without the protocol."""
        return self.name.rpartition("-")[0]

    @property
    def settings(self) -> list[Experiment]:
        """What was trained with at least one seed, in the order of the grid."""
        trained = [e for e in self.experiments if e in self.records]
        return list(dict.fromkeys(map(setting_of, trained)))

    @property
    def started(self) -> bool:
        """Whether there is something to show; of micro-batches, any trained in them."""
        few = any(experiment.norm_batch_size for experiment in self.experiments)
        return any(setting.norm_batch_size or not few for setting in self.settings)

    def runs(self, setting: Experiment) -> dict[int, Record]:
        """Returns the results of a setting by seed."""
        return {
            e.seed: self.records[e]
            for e in self.experiments
            if e in self.records and setting_of(e) == setting
        }

    def reference(self, setting: Experiment) -> dict[int, Record]:
        """Returns the results of batch norm on the whole batch by seed."""
        return {
            experiment.seed: record
            for experiment, record in self.records.items()
            if experiment.norm == "bn"
            and experiment.norm_batch_size is None
            and _basis(experiment) == _basis(setting)
        }


def _basis(experiment: Experiment) -> Experiment:
    """Returns the experiment without what makes no difference to batch norm."""
    return dataclasses.replace(
        experiment,
        seed=0,
        norm="bn",
        norm_batch_size=None,
        fold=True,
        fresh_virtual=True,
    )


def read(examples: Path) -> list[Study]:
    """Returns the studies below a folder."""
    studies = []
    for path in sorted(examples.glob("studies/*.toml")):
        results = examples / "results" / f"{path.stem.rpartition('-')[2]}.jsonl"
        records = journal.read(results) if results.exists() else []
        by_experiment = {experiment_of(record): record for record in records}
        experiments = grid.experiments(grid.read(path))
        studies.append(Study(path.stem, experiments, by_experiment))
    return studies


def section(study: Study, images: Sequence[str]) -> str:
    """Returns what a page shows of a study."""
    table = TABLES.get(study.kind, setting_table)
    return "\n\n".join([caption(study), *images, table(study)])


def protocol(study: Study) -> str:
    """Returns what all training runs of a study have in common, as a sentence."""
    one = study.experiments[0]
    size = "" if one.image_size is None else f" at {one.image_size} × {one.image_size}"
    images = "all" if one.train_size is None else f"{one.train_size:,}"
    models = " and ".join(dict.fromkeys(e.model for e in study.experiments))
    width = "" if one.width is None else f" of width {one.width}"
    counts = Counter(map(setting_of, study.experiments)).values()
    return (
        f"**{study.name.rpartition('-')[2].capitalize()} protocol**: {models}{width}, "
        f"{images} training images of {one.dataset}{size}, batch {one.batch_size}, "
        f"{one.epochs} epochs, {_span(counts)} seeds."
    )


def caption(study: Study) -> str:
    """Returns the protocol, and on what the training runs ran."""
    records = [
        record for setting in study.settings for record in study.runs(setting).values()
    ]
    where = dict.fromkeys(f"{r['device']}, {r['machine']}" for r in records)
    days = _span([record["date"][:10] for record in records])
    software = "; ".join(dict.fromkeys(map(versions, records)))
    missing = len(study.experiments) - len(records)
    return (
        f"{protocol(study)} {len(records)} training runs"
        + (f" ({missing} more to run)" if missing else "")
        + f" on {' and '.join(where)}, {days}; {software}."
    )


def _span(values: Collection[Any]) -> str:
    """Returns the least and the greatest value, or the one that all are."""
    return " to ".join(map(str, dict.fromkeys((min(values), max(values)))))


def setting_table(study: Study) -> str:
    """Returns accuracies and losses: a row a setting, compared with batch norm."""
    names = varied(study.settings)
    lines = []
    for setting in study.settings:
        runs, reference = study.runs(setting), study.reference(setting)
        measured = next(iter(runs.values()))["measured"]
        lines.append(
            [
                _label(setting, study.settings[0], names),
                "-" if measured is None else percent(measured),
                spread([100 * r["test_accuracy"][-1] for r in runs.values()], 1),
                difference(runs, reference, _final_accuracy, 1),
                _mean_loss(runs, _EARLY - 1),
                _mean_loss(runs, -1),
                difference(runs, reference, lambda r: r["train_loss"][-1], 3),
            ]
        )
    header = [
        "method",
        "measured",
        f"test accuracy,{SPACE}%",
        f"accuracy −{SPACE}bn",
        f"loss, epoch{SPACE}{_EARLY}",
        "final loss",
        f"loss −{SPACE}bn",
    ]
    return markdown(header, lines, left=1)


def few_table(study: Study) -> str:
    """Returns test accuracies: a row a norm, a column a number of images."""
    cells: dict[str, dict[int | None, str]] = {}
    for setting in study.settings:
        accuracies = [_final_accuracy(r) for r in study.runs(setting).values()]
        images = setting.norm_batch_size
        cells.setdefault(setting.norm, {})[images] = spread(accuracies, 1)
    columns = sorted({n for found in cells.values() for n in found}, key=_or_all)
    header = ["norm", *(f"{n} images" if n else "all" for n in columns)]
    lines = [
        [f"`{short(norm)}`", *(found.get(n, "-") for n in columns)]
        for norm, found in cells.items()
    ]
    return markdown(header, lines, left=1)


def _or_all(images: int | None) -> float:
    return float("inf") if images is None else images


def _mean_loss(runs: dict[int, Record], epoch: int) -> str:
    return number(statistics.mean(r["train_loss"][epoch] for r in runs.values()))


def _final_accuracy(record: Record) -> float:
    return 100 * record["test_accuracy"][-1]


def _label(setting: Experiment, first: Experiment, names: Sequence[str]) -> str:
    """Returns the norm, and whatever else differs from the first setting."""
    others = [name for name in names if name != "norm"]
    changed = [
        f"{name} {str(getattr(setting, name)).lower()}"
        for name in others
        if getattr(setting, name) != getattr(first, name)
    ]
    return ", ".join([f"`{short(setting.norm)}`", *changed])


def short(norm: str) -> str:
    """Returns a norm as tables and charts name it.

    Example:
      >>> short("FeatureSampling(1/64, groups=8)")
      'FS(1/64, groups=8)'
    """
    for name, initials in _SHORT.items():
        norm = norm.replace(name, initials)
    return norm


def spread(values: Sequence[float], digits: int) -> str:
    r"""Returns a mean and standard deviation.

    Example:
      >>> spread([1.0, 3.0], 1), spread([2.0], 1)
      ('2.0\xa0±\xa01.4', '2.0')
    """
    mean = number(statistics.mean(values), digits)
    if len(values) < 2:
        return mean
    return f"{mean}{PM}{number(statistics.stdev(values), digits)}"


def difference(
    runs: dict[int, Record],
    reference: dict[int, Record],
    value: Callable[[Record], float],
    digits: int,
) -> str:
    r"""Returns the mean difference of runs with the same seed, and its standard error.

    Example:
      >>> difference({0: 5.0, 1: 7.0}, {0: 4.0, 1: 4.0, 2: 4.0}, lambda r: r, 1)
      '+2.0\xa0±\xa01.0'
    """
    both = [
        value(runs[seed]) - value(reference[seed]) for seed in runs if seed in reference
    ]
    if not both or not any(both):
        return "-"
    mean = f"{statistics.mean(both):+.{digits}f}"
    if len(both) < 2:
        return mean
    error = statistics.stdev(both) / len(both) ** 0.5
    return f"{mean}{PM}{number(error, digits)}"


TABLES: dict[str, Callable[[Study], str]] = {
    "few": few_table,
    "normalizers": few_table,
}
