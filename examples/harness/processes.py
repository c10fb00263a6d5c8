"""Several devices and processes that train together.

All of them run the same program. Each process holds its own part of the data, and the
first one alone writes and speaks.
"""

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

_OWN = {"distributed", "data", "data_dir", "threads"}  # may be another in each process
AXIS = "data"  # of the mesh, along which the examples of a batch are divided


def add_option(group: Any) -> None:
    """Adds ``--distributed`` to a command line."""
    group.add_argument(
        "--distributed",
        nargs="*",
        metavar="ADDRESS N I",
        help="train with other processes: ADDRESS is HOST:PORT, a free port on the "
        "machine of the first one, N their number, I the index of this one, from 0; "
        "Slurm, Open MPI, Kubernetes and TPU pods need none of the three",
    )


def join(parser: argparse.ArgumentParser, values: Sequence[str] | None) -> None:
    """Meets the other processes, if there are any; before JAX is used."""
    if values is None:
        return
    match values:
        case []:
            given: tuple[Any, ...] = ()
        case [address, count, index] if count.isdecimal() and index.isdecimal():
            given = (address, int(count), int(index))
            if not given[2] < given[1]:
                parser.error(
                    f"--distributed ADDRESS N I needs I in 0 to N - 1, got I={index} "
                    f"and N={count}"
                )
        case _:
            parser.error("--distributed is followed by ADDRESS N I, or by nothing")
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        parser.error(
            "--distributed could not meet the other processes: "
            + str(error).partition("\n")[0]
        )


def is_first() -> bool:
    """Tells whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def agree(args: argparse.Namespace, problem: str | None) -> str | None:
    """Returns why not all processes can begin, the same in all of them, or None.

    Args:
      args: what they should have been started with alike, but for what is their own.
      problem: why this one cannot begin.
    """
    settings = {name: v for name, v in vars(args).items() if name not in _OWN}
    own = json.dumps({"problem": problem, "settings": settings}, default=str)
    text = np.frombuffer(own.encode(), np.uint8)
    lengths = _gather(np.array([text.size]))
    padded = np.full(lengths.max(), ord(" "), np.uint8)
    padded[: text.size] = text
    everyone = [json.loads(bytes(row)) for row in _gather(padded)]
    for index, other in enumerate(everyone):
        for name, value in everyone[0]["settings"].items():
            if (theirs := other["settings"].get(name)) != value:
                return (
                    "Expected all processes to be started with the same settings, got "
                    f"{name}={value!r} in process 0 and {theirs!r} in process {index}."
                )
    for index, other in enumerate(everyone):
        if found := other["problem"]:
            return f"In process {index}: {found}" if len(everyone) > 1 else found
    return None


def wait_for_all(reason: str) -> None:
    """Returns when every process has come here."""
    multihost_utils.sync_global_devices(reason)


def _gather(array: NDArray[Any]) -> NDArray[Any]:
    """Returns the arrays of all processes, first axis."""
    gathered = np.asarray(multihost_utils.process_allgather(array))
    return gathered.reshape(jax.process_count(), *array.shape)


class Stop:
    """Whether the training has been asked to end, by SIGTERM or Ctrl-C.

    The second time ends the process at once. Of several processes JAX notes SIGTERM for
    all of them, and says after which step they end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        """Begins to listen."""
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves everything as it was."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Tells whether to end after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            step
        ):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _note(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[self.signal])


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns the first devices, or all of them, in a row.

    Raises:
      ValueError: if there are not so many, or processes would be left out.
    """
    available = jax.device_count()
    count = available if num_devices is None else num_devices
    if count > available or (count < available and jax.process_count() > 1):
        raise ValueError(
            f"Expected {'' if jax.process_count() > 1 else 'at most '}the {available} "
            f"devices that there are, got devices={count}."
        )
    return Mesh(np.array(jax.devices()[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def by_example(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch: each device has its part of the examples."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Returns the layout of parameters: each device has them."""
    return NamedSharding(mesh, PartitionSpec())


def put(array: NDArray[Any], sharding: NamedSharding) -> jax.Array:
    """Lays out an array that every process has; each keeps what its devices need."""
    pick: Callable[[Any], NDArray[Any]] = array.__getitem__
    return jax.make_array_from_callback(array.shape, sharding, pick)
