"""The traffic benchmark: what it records, prints and refuses, without its compilers."""

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from compiled import roofline, traffic
from compiled.explain import explain
from compiled.kernels import Kernel
from reports import tables
from speed import step

pytestmark = pytest.mark.optimized


@pytest.fixture
def small(monkeypatch):
    """Compiles x + 1, and x + y for plain batch norm, for the device at hand."""

    class Here:
        batch_size = 256
        memory_bandwidth = 1024.0  # of one array
        flops: ClassVar = {"float32": 1.0}
        launch_seconds = 0.5

        def devices(self, name):
            return jax.devices()[:1]

    def training_step(model, method, batch_size, dtype):
        def function(x, y):
            return x + y if method.kind == "flax" else x + 1

        x = jax.ShapeDtypeStruct((batch_size,), dtype)
        return step.Step(jax.jit(function), (x, x))

    monkeypatch.setattr(traffic.targets, "look_for_no_devices", lambda: None)
    monkeypatch.setattr(traffic, "training_step", training_step)
    monkeypatch.setitem(traffic.TARGETS, "h200", Here())
    return ["--target", "h200", "--dtype", "float32", "--variant", "Flax BN", "no norm"]


def test_it_writes_figures_and_prints_ratios(small, tmp_path, capsys) -> None:
    path = tmp_path / "results" / "traffic.json"
    assert traffic.main([*small, "--json", str(path), "--explain", "3"]) == 0
    report = json.loads(path.read_text())
    assert {"versions", "date", "machine", "dtype"} <= report.keys()
    bn, none = report["results"]
    assert (bn["target"], bn["model"], bn["batch_size"]) == ("h200", "resnet50", 256)
    assert (bn["traffic_bytes"], none["traffic_bytes"]) == (3 * 1024, 2 * 1024)
    assert bn["outside_bytes"] == 3 * 1024
    assert bn["kernels"] == none["kernels"] == 1
    assert none["temp_bytes"] == 0
    assert (bn["roofline_seconds"], none["roofline_seconds"]) == (3.5, 2.5)
    assert none["compile_seconds"] > 0

    printed = capsys.readouterr().out
    assert "resnet50 on h200, batch 256; in parentheses relative to Flax BN" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("| no norm")]
    assert row.split("|")[2].strip() == "0.0 (0.67, 1.00)"
    assert "2,500.0 (0.71, 1.00)" in row
    assert printed.count("written, MB") == 2

    before = path.read_text()
    with pytest.raises(SystemExit):
        traffic.main([*small, "--json", str(path)])
    assert path.read_text() == before


def test_a_step_too_large_is_noted(small, monkeypatch, tmp_path, capsys) -> None:
    def training_step(*args):
        def function(x):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20 GB of 16\nLong")

        return step.Step(jax.jit(function), (jax.ShapeDtypeStruct((1,), "float32"),))

    monkeypatch.setattr(traffic, "training_step", training_step)
    assert traffic.main([*small, "--json", str(tmp_path / "traffic.json")]) == 0
    assert "no norm: RESOURCE_EXHAUSTED: 20 GB of 16\n" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(small, monkeypatch, tmp_path) -> None:
    def measure(result, device, dtype):
        if result.variant == "no norm":
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(traffic, "measure", measure)
    path = tmp_path / "traffic.json"
    with pytest.raises(KeyboardInterrupt):
        traffic.main([*small, "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [row["variant"] for row in results] == ["Flax BN"]


def test_a_missing_compiler_is_named(small, monkeypatch, tmp_path, capsys) -> None:
    def get_topology_desc(**options):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(
        traffic.targets.topologies, "get_topology_desc", get_topology_desc
    )
    path = tmp_path / "traffic.json"
    assert traffic.main(["--target", "v5e", "--json", str(path)]) == 1
    assert not path.exists()
    assert "v5e" in (printed := capsys.readouterr().err)
    assert "`make traffic`" in printed


@pytest.mark.parametrize(
    "argv",
    [
        *[["--target", "tpu"], ["--model", "vgg"], ["--variant", "BN"]],
        *[["--batch-size", "0"], ["--explain", "0"], ["--dtype", "float8"]],
    ],
)
def test_what_it_does_not_know_is_refused(small, argv) -> None:
    with pytest.raises(SystemExit):
        traffic.main(argv)


def test_the_model_takes_the_longer_of_memory_and_products() -> None:
    class Target:
        memory_bandwidth = 10.0
        flops: ClassVar = {"bfloat16": 100.0, "float32": 50.0}
        launch_seconds = 1.0

    moving = Kernel("x", "fusion", 40, 20, "", times=3, flops=100)
    computing = Kernel("y", "convolution", 4, 2, "", flops=1000)
    copying = Kernel("z", "copy", 10, 10, "", beside=True)
    found = [moving, computing, copying]
    assert roofline.seconds(found, Target(), "bfloat16") == 3 * (6 + 1) + (10 + 1) + 2
    assert roofline.seconds(found, Target(), "float32") == 3 * (6 + 1) + (20 + 1) + 2


def test_results_without_the_model_have_no_column_of_it() -> None:
    row = {"variant": "Flax BN", "target": "h200", "model": "x", "batch_size": 1}
    old = {"results": [{**row, "traffic_bytes": 10, "error": None}]}
    assert "model" not in tables.traffic_table(old)
    new = {"results": [{**old["results"][0], "roofline_seconds": 0.01}]}
    assert "10.0 (1.00)" in tables.traffic_table(new)


def test_explain_counts_alike_kernels_together() -> None:
    found = [
        Kernel("reduce.1", "fusion", 3_000_000, 0, "jit(step)/Block_0/sum"),
        Kernel("reduce.2", "fusion", 4_000_000, 0, "jit(step)/Block_12/sum"),
        Kernel("conv.7", "convolution", 5_000_000, 1_000_000, "jit(step)/conv", 2),
    ]
    lines = explain(found, 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["conv.7", "convolution", "conv", "10.0", "2.0"] in cells
    assert ["reduce.2", "fusion", "Block_12/sum", "4.0", "0.0"] in cells
    assert ["reduce", "Block/sum", "2", "7.0"] in cells
    assert not any("reduce.1" in line for line in lines)


@pytest.mark.parametrize("variant", step.VARIANTS)
def test_a_step_gives_a_state_of_the_same_shapes(variant) -> None:
    function, args = step.training_step("resnet8", step.VARIANTS[variant], 64)
    state, loss = jax.eval_shape(function, *args)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, args[0])]
    assert shapes[0] == shapes[1]
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert args[1].dtype == jnp.bfloat16
