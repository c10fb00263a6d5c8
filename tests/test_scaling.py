"""What devices send each other: reading it from programs, the benchmark, its page."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from compiled import scaling, targets
from compiled.collectives import collectives
from reports import plots, tables
from speed import step
from tests.devices import mesh

# A program as the compilers of CPUs, GPUs and TPUs write theirs, each in its way.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %p = (s32[], f32[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %c = f32[6]{0} get-tuple-element(%p), index=1
  %sum = f32[6]{0} all-reduce(%c), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %next = (s32[], f32[6]{0}) tuple(%i, %sum)
}

%scattered (q: f32[16]) -> f32[2] {
  %q = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%q), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: bf16[8,2], y: f32[16], z: (s32[], f32[6])) -> f32[2] {
  %x = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %y = f32[16]{0} parameter(1)
  %z = (s32[], f32[6]{0}) parameter(2)
  %sums = (bf16[8,2]{1,0}, /*index=1*/f32[16]{0}) all-reduce-start(%x, /*index=1*/%y), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%add
  %awaited = (bf16[8,2]{1,0}, f32[16]{0}) all-reduce-done(%sums)
  %gathered = (f32[16]{0}, f32[128]{0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}
  %all = f32[128]{0} all-gather-done(%gathered)
  %moved = f32[16]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  %mixed = f32[16]{0} all-to-all(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %alone = f32[16]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %loop = (s32[], f32[6]{0}) while(%z), condition=%done, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %begun = ((f32[16]{0}), f32[2]{0}) async-start(%y), calls=%scattered
  ROOT %ended = f32[2]{0} async-done(%begun), calls=%scattered
}

%done (d: (s32[], f32[6])) -> pred[] {
  %d = (s32[], f32[6]{0}) parameter(0)
  ROOT %never = pred[] constant(false)
}
"""  # noqa: E501


def test_collectives_are_read_with_their_groups_and_loops() -> None:
    found = [
        (each.kind, [*map(str, each.arrays)], each.group, each.times)
        for each in collectives(PROGRAM)
    ]
    assert found == [
        ("all-reduce", ["bf16[8,2]", "f32[16]"], 4, 1),
        ("all-gather", ["f32[16]"], 8, 1),
        ("collective-permute", ["f32[16]"], 8, 1),
        ("all-to-all", ["f32[16]"], 4, 1),
        ("all-reduce", ["f32[6]"], 2, 5),
        ("reduce-scatter", ["f32[16]"], 8, 1),
    ]


def test_each_device_sends_what_a_ring_does() -> None:
    assert [each.sent for each in collectives(PROGRAM)] == [
        2 * 3 / 4 * (32 + 64),
        7 / 8 * (8 * 64),  # of what is gathered
        64,
        3 / 4 * 64,
        5 * 2 * 1 / 2 * 24,
        7 / 8 * 64,
    ]


def test_collectives_of_a_compiled_program() -> None:
    def function(x, y):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.pmean(x, "data") * y, x)
        return jax.lax.all_gather(x, "data"), jax.lax.psum(y, "data")

    mapped = jax.shard_map(
        function,
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    x = jnp.ones((4, 2))
    text = jax.jit(mapped).lower(x, jnp.ones((32, 2))).compile().as_text()
    found = {each.kind: each for each in collectives(text) if each.times == 3}
    assert found["all-reduce"].sent == 3 * 2 * 7 / 8 * x.nbytes
    (gather,) = [each for each in collectives(text) if each.kind == "all-gather"]
    assert gather.sent == 7 * x.nbytes


@pytest.mark.parametrize(
    ("target", "count", "topology"),
    [
        ("h200", 1, {"topology": "1x1x1"}),
        ("h200", 8, {"topology": "1x1x8"}),
        ("h200", 64, {"topology": "1x8x8"}),
        ("v5e", 8, {"topology_name": "v5e:2x4"}),
    ],
)
def test_devices_are_those_of_full_hosts_or_slices(
    target, count, topology, monkeypatch
) -> None:
    class Description:
        devices = range(count)

    def get_topology_desc(**options):
        assert topology.items() <= options.items()
        return Description

    monkeypatch.setattr(targets.topologies, "get_topology_desc", get_topology_desc)
    assert len(targets.TARGETS[target].devices(target, count)) == count
    with pytest.raises(ValueError, match="got 12"):
        targets.TARGETS[target].devices(target, 12)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Compiles sums over rows, twice as wide with a norm, for the devices at hand."""

    class Here:
        def devices(self, name, count):
            return jax.devices()[:count]

    def training_step(model, method, batch_size, dtype, mesh):
        def function(state, images, labels, key):
            return state + images.sum(0)

        width = 4 if method.kind == "none" else 8
        shapes = ((width,), (batch_size, width), (batch_size,), ())
        args = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        return step.Step(jax.jit(function), args)

    monkeypatch.setattr(scaling.targets, "look_for_no_devices", lambda: None)
    monkeypatch.setattr(scaling.step, "training_step", training_step)
    monkeypatch.setitem(scaling.TARGETS, "h200", Here())
    path = tmp_path / "scaling.json"
    variants = ["--variant", "no norm, jit", "Flax BN, jit"]
    options = ["--devices", "1", "8", "--dtype", "float32", "--json", str(path)]
    assert scaling.main([*options, *variants]) == 0
    return json.loads(path.read_text())


def test_it_writes_and_prints_what_each_device_sends(small, capsys) -> None:
    assert {"versions", "date", "machine", "dtype"} <= small.keys()
    rows = {(row["devices"], row["variant"]): row for row in small["results"]}
    assert rows[1, "Flax BN, jit"]["sent_bytes"] == 0
    assert rows[1, "Flax BN, jit"]["kinds"] == {}
    assert rows[8, "Flax BN, jit"]["sent_bytes"] == 2 * 7 / 8 * 32
    assert rows[8, "Flax BN, jit"]["types"] == {"f32": 32}
    assert rows[8, "no norm, jit"]["kinds"] == {"all-reduce": 1}
    assert rows[8, "no norm, jit"]["batch_size"] == 32

    lines = tables.scaling_table(small).splitlines()
    assert lines[0].startswith("resnet50 on h200, 32 images per device; in parentheses")
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["Flax BN, jit", "0", "1", "0.0", "0.0", "0.0 (2.000)"]


def test_its_chart_is_of_the_most_devices(small) -> None:
    (case, groups), *others = plots.scaling(small).panels.items()
    assert case == "resnet50 on 8 x h200"
    assert not others
    assert groups == {"Flax BN": {"jit": plots.Bar(2.0, "0 MB")}}


@pytest.mark.parametrize(
    "argv",
    [
        *[["--target", "tpu"], ["--variant", "Flax BN"], ["--devices", "0"]],
        *[["--batch-size", "0"], ["--devices", "two"]],
    ],
)
def test_what_it_does_not_know_is_refused(argv) -> None:
    with pytest.raises(SystemExit):
        scaling.parse(argv)


def test_devices_that_do_not_fit_together_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling.targets, "look_for_no_devices", lambda: None)
    path = tmp_path / "scaling.json"
    assert scaling.main(["--devices", "12", "--json", str(path)]) == 1
    assert "full hosts of 8 GPUs, got 12" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("variant", scaling.VARIANTS)
def test_a_step_of_many_devices_is_one_of_the_same_shapes(variant) -> None:
    method, mapped = scaling.VARIANTS[variant].method, scaling.VARIANTS[variant].mapped
    function, args = step.training_step(
        "resnet8", method, 64, mesh=mesh() if mapped else None
    )
    state, loss = jax.eval_shape(function, *args)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, args[0])]
    assert shapes[0] == shapes[1]
    assert loss.shape == ()
