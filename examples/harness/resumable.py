"""A training that may end at any step, however it ends, and goes on from there."""

import functools
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from harness import processes
from harness.checkpoints import Checkpoints
from harness.learning import Learner, Model, Task, Totals
from harness.logs import Accuracy, Log
from harness.methods import Method
from harness.networks import Settings, Variables
from harness.optimizers import learning_rate
from harness.pipeline import MEAN, STD, Batch, Input


class DivergedError(Exception):
    """Parameters are not finite any more."""


class State(NamedTuple):
    """All that a training is, on every device."""

    model: Model
    key: jax.Array
    step: jax.Array  # number of those done
    skipped: jax.Array  # images that could not be read so far


class Training:
    """A training that may end and go on at any step."""

    def __init__(
        self,
        settings: Settings,
        method: Method,
        images: Input,
        mesh: Mesh,
        *,
        max_steps: int | None = None,
    ) -> None:
        """Checks that all fits together, without computing anything.

        Args:
          settings: see there.
          method: the normalization.
          images: where they come from.
          mesh: the devices.
          max_steps: after how many steps of the schedule it ends, if earlier.

        Raises:
          ValueError: if it does not.
        """
        if method.copies > 1:
            raise ValueError(
                "Expected a norm without batch augmentation, which train.py has, got "
                f"{method.name!r}."
            )
        self.input, self.mesh = images, mesh
        self.epoch = self.input.num_images // settings.batch_size  # in steps
        if not self.epoch:
            raise ValueError(
                f"Expected at most the {self.input.num_images} training images in a "
                f"batch, got batch_size={settings.batch_size}."
            )
        task = Task(images.shape, images.num_classes, MEAN, STD)
        self.learner = Learner(settings, method, task, self.epoch, mesh)
        self.rate = learning_rate(settings, method, self.epoch)
        self.last = min(settings.epochs * self.epoch, max_steps or sys.maxsize)
        jit = functools.partial(jax.jit, out_shardings=processes.everywhere(mesh))
        self._init = jit(self._initial)
        self._step = jit(self._next, donate_argnums=0)
        self._count = jit(self._correct)
        self._finite = jit(_all_finite)

    def run(
        self,
        seed: int,
        folder: Path,
        checkpoints: Checkpoints,
        console: Console,
        *,
        checkpoint_every: int,
        log_every: int,
    ) -> signal.Signals | None:
        """Trains from the newest checkpoint on; returns the signal that ended it.

        Args:
          seed: of all that is random, but for the input's own.
          folder: for the log.
          checkpoints: to go on from, and to write.
          console: for what a person should see.
          checkpoint_every: steps from one to the next, besides each epoch's.
          log_every: steps from one entry to the next.

        Raises:
          CheckpointError: if there are checkpoints that cannot be used.
          DataError: if an image cannot be read.
          DivergedError: if parameters become infinite or NaN; the checkpoints are those
            from before.
        """
        state = self._init(jax.random.key(seed), self._placeholder())
        state = checkpoints.restore(state) or state
        begin = int(state.step)
        if begin == self.last:
            console.print(f"All {begin:,} steps are done: nothing is left to do.")
        elif begin:
            console.print(f"Goes on after step {begin:,} of {self.last:,}.")
        steps = range(begin + 1, self.last + 1)
        batches = self.input.train(begin) if steps else ()
        settings = self.learner.settings
        log = Log(
            folder,
            console,
            self.learner.method.name,
            steps=steps,
            epoch=self.epoch,
            batch_size=settings.batch_size,
            every=log_every,
            learning_rate=self.rate,
        )
        with processes.Stop() as stop, log:
            for step, batch in zip(steps, batches, strict=False):
                state, totals = self._step(state, *self._on_devices(batch))
                log.add(step, totals)
                last, accuracy = step == self.last, None
                if last or step % self.epoch == 0:
                    log.flush()
                    accuracy = self._evaluate(state, settings.micro_batch_size)
                    if accuracy:
                        log.evaluated(step, accuracy)
                ending = stop.asked(step)
                due = last or step % checkpoint_every == 0
                if due or ending or accuracy:
                    log.flush()
                    self._check(state, step)
                    checkpoints.save(step, state, accuracy and accuracy.top1)
                if ending:
                    break
            checkpoints.wait()
        log.summary()
        if skipped := int(state.skipped):
            console.print(f"{skipped:,} times an image could not be read.")
        return stop.signal

    def _check(self, state: State, step: int) -> None:
        if not self._finite(state.model):
            raise DivergedError(
                f"The parameters are not finite after step {step:,}. The checkpoints "
                "are from before. Lower the learning rate, or train in float32."
            )

    def _initial(self, key: jax.Array, images: jax.Array) -> State:
        key, init_key = jax.random.split(key)
        zero = jnp.zeros((), jnp.int32)
        return State(self.learner.init(init_key, images), key, zero, zero)

    def _placeholder(self) -> Any:
        """Returns the images that methods start from which start from data."""
        if self.learner.method.starts_from_data:
            return self._on_devices(next(self.input.train(0)))[0]
        return ()

    def _next(
        self,
        state: State,
        images: jax.Array,
        labels: jax.Array,
        skipped: jax.Array,
    ) -> tuple[State, Totals]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        model, totals = self.learner.update(state.model, images, labels, *keys)
        skipped = state.skipped + skipped.sum()
        return State(model, state.key, state.step + 1, skipped), totals

    def _correct(
        self, variables: Variables, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """Returns how many labels are first, among the first five, and there at all."""
        logits = self.learner.evaluate(variables, images)
        _, order = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = order == labels[:, None]
        return jnp.stack([hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])

    def _evaluate(self, state: State, batch_size: int) -> Accuracy | None:
        """Returns how many are right, or None where there are no images to evaluate."""
        counts = np.zeros(3, int)
        for batch in self.input.test(batch_size):
            counts += self._count(state.model.variables, *self._on_devices(batch))
        first, five, images = map(int, counts)
        return Accuracy(first / images, five / images, images) if images else None

    def _on_devices(self, batch: Batch) -> list[jax.Array]:
        """Returns this process's part of a batch as part of an array over all."""
        split = processes.by_example(self.mesh)
        return [
            jax.make_array_from_process_local_data(split, array)
            for array in batch.values()
        ]


def _all_finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
