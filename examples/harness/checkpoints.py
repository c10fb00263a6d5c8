"""Checkpoints of a training, with Orbax: written beside it, read when it goes on.

Each is written under another name and renamed when it is whole, so that a process may
be killed at any time. The last few are kept, and the best.
"""

import logging
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from harness import processes

State = TypeVar("State")
_STATE, _SETTINGS = "state", "settings"
_METRIC = "top1"
# Orbax warns at each checkpoint without a metric, which most have not.
logging.getLogger("absl").setLevel(logging.ERROR)


class CheckpointError(Exception):
    """Checkpoints cannot be used: they are of something else, or all of them broken."""


class Checkpoints:
    """The checkpoints of a folder, one a step."""

    def __init__(self, folder: Path, settings: dict[str, Any], keep: int) -> None:
        """Opens a folder, or makes it.

        Args:
          folder: for checkpoints and nothing else.
          settings: what a training must have in common with one that it continues;
            of values that JSON knows.
          keep: how many of the last ones are kept, besides the best.
        """
        self.folder, self.settings = folder, settings
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_metric,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_metric,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def steps(self) -> list[int]:
        """Steps of which there are checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, top1: float | None = None) -> None:
        """Begins to write a checkpoint, unless the step has one.

        Args:
          step: number of steps done.
          state: arrays. They may be given away when this returns.
          top1: accuracy, if it is known; it tells which checkpoint is the best.
        """
        if step in self.steps:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state),
                    _SETTINGS: ocp.args.JsonSave(self.settings),
                }
            ),
            metrics=None if top1 is None else {_METRIC: top1},
        )

    def restore(self, state: State) -> State | None:
        """Returns the state of the newest whole checkpoint, or None if there are none.

        Those that are not whole are set aside, with a warning.

        Args:
          state: arrays of the same shapes, which tell where they are wanted.

        Raises:
          CheckpointError: if one was made with other settings, or none can be read.
        """
        found = self.steps
        for step in reversed(found):
            try:
                settings = self._read(step, _SETTINGS, ocp.args.JsonRestore())
                self._compare(step, settings)
                abstract = jax.tree.map(_abstract, state)
                return self._read(step, _STATE, ocp.args.StandardRestore(abstract))
            except CheckpointError:
                raise
            except Exception as error:  # whatever a broken file leads to
                self._set_aside(step, error)
        if found:
            raise CheckpointError(
                f"None of the checkpoints in {self.folder} can be read. Begin anew in "
                "another folder."
            )
        return None

    def wait(self) -> None:
        """Returns when all checkpoints are on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends what runs beside the training."""
        self._manager.close()

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[
            item
        ]

    def _compare(self, step: int, settings: dict[str, Any]) -> None:
        for name in settings.keys() | self.settings.keys():
            theirs, ours = settings.get(name), self.settings.get(name)
            if theirs != ours:
                raise CheckpointError(
                    f"Expected the checkpoint of step {step} in {self.folder} to be of "
                    f"the same training, but it has {name}={theirs!r}, and this one "
                    f"{name}={ours!r}. Give the same settings, or another folder."
                )

    def _set_aside(self, step: int, error: Exception) -> None:
        broken = self.folder / f"broken-{step}"
        reason = str(error).partition("\n")[0]
        if processes.is_first():
            (self.folder / str(step)).rename(broken)
        processes.wait_for_all(f"{broken} is set aside")
        warnings.warn(
            f"The checkpoint of step {step} cannot be read and is set aside as "
            f"{broken}: {type(error).__name__}: {reason[:200]}",
            stacklevel=3,
        )
        self._manager.reload()


def _metric(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
