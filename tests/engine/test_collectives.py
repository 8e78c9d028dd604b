"""Collectives and the axis they run along, in texts as XLA writes them and in compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from slt_jax.engine.collectives import collectives_of


@pytest.fixture
def mesh():
    """Devices 0 1, 2 3, 4 5, 6 7: the axis ``model`` runs faster."""
    return jax.make_mesh((4, 2), ("chain", "model"), axis_types=(AxisType.Auto,) * 2)


IDS = "channel_id=1, use_global_device_ids=true"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "axis", "kind"),
    [
        (f"%a = f32[4] all-reduce(%x), replica_groups={{{{0,1}},{{2,3}},{{4,5}}}}, {IDS}", "model", "all-reduce"),
        (f"%a = f32[4] all-reduce(%x), replica_groups=[4,2]<=[8], {IDS}", "model", "all-reduce"),
        (f"%a = f32[4] all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), {IDS}", "chain", "all-gather"),
        (f"%a = f32[4] reduce-scatter(%x), replica_groups=[1,8]<=[8], {IDS}", "chain and model", "reduce-scatter"),
        (f"%a = f32[4] all-reduce(%x), replica_groups={{}}, {IDS}", "chain and model", "all-reduce"),
        ("%a = f32[4] all-reduce(%x), channel_id=1, replica_groups={{0}}", "chain and model", "all-reduce"),
        ("%a = f32[4] collective-permute(%x), source_target_pairs={{0,2},{2,4}}", "chain", "collective-permute"),
        ("%a = (f32[4], /*index=1*/f32[4]) all-to-all(%x), replica_groups={{0,1},{2,3}}", "model", "all-to-all"),
    ],
)  # fmt: skip
def test_the_axis_of_a_line(mesh, line, axis, kind):
    """Kills: rows and columns of groups that change places; groups that are not read at all."""
    assert collectives_of(line, mesh) == {axis: {kind: 1}}


@pytest.mark.quick
@pytest.mark.parametrize(
    "line",
    [
        "%b = f32[4] fusion(%all-reduce.1), calls=%c",
        "%b = f32[4] all-reduce-done(%all-reduce-start)",
        f"%a = f32[4] all-reduce(%x), replica_groups={{{{0}},{{1}},{{2}}}}, {IDS}",
    ],
)
def test_lines_that_exchange_nothing(mesh, line):
    """Kills: an operation that is counted at each use; groups of one device."""
    assert collectives_of(line, mesh) == {}


@pytest.mark.parametrize("axis", ["chain", "model"])
def test_a_compiled_program(mesh, axis):
    """Kills: texts in which XLA writes something else than this reads."""
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=PartitionSpec("chain", "model"), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    text = jax.jit(total).lower(jnp.ones((8, 4))).compile().as_text()
    assert collectives_of(text, mesh) == {axis: {"all-reduce": 1}}
