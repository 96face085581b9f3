"""Layouts are checked before anything starts, by errors that name the numbers; the mesh cuts ranks as it says."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import AXES, Axes, Mesh, even_bounds
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.placement import full_shapes, hf_shapes, place
from parallel.models import KINDS, tiny

_degrees = st.sampled_from([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        ("tp=3", "dense", r"tp 3 does not divide the model's 4 attention heads"),
        ("pp=5", "dense", r"5 stages \(pp 5 · virtual 1\) for 4 layers"),
        (
            "pp=2,split=1+2",
            "dense",
            r"split 1\+2 = 3 must have at least 1 layer a stage and the model's 4 in all",
        ),
        ("pp=2,split=1+2+1", "dense", r"split names 3 stages; pp 2 · virtual 1 = 2"),
        ("dp=2,ep=2", "dense", r"ep 2, but the model has no experts"),
        ("dp=3,ep=3", "moe", r"ep 3 does not divide the model's 4 experts"),
        ("cp=3,context=ulysses", "dense", r"Ulysses with cp 3 does not divide the 4 heads that tp 1 leaves"),
        ("tp=2,tp_invariant=true", "moe", r"tp_invariant is not promised of experts"),
        ("dp=3", "dense", r"dp 3 does not divide the step's 8 micro-batches"),
        ("pp=3,virtual=1,split=2+1+1,dp=1", "dense", None),
    ],
)
def test_a_layout_that_does_not_fit_says_which_numbers(layout: str, kind: str, message: str | None) -> None:
    parsed = Layout.parse(layout)
    if message is None:
        parsed.check(tiny(kind), 8)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        parsed.check(tiny(kind), 8)
    assert f"layout {parsed}" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=0", r"tp is 0; it must be at least 1"),
        ("zero=4", r"zero is 4; it must be 0, 1, 2 or 3"),
        ("dp=4,replicate=3", r"replicate 3 does not divide dp 4"),
        ("dp=2,ep=4", r"ep 4 does not divide dp_shard · cp = 2 · 1"),
        ("pp=2,virtual=2", r"virtual 2 with schedule '1f1b'"),
        ("pp=2,dp=2,zero=2,schedule=zero_bubble", r"zero 2 with the zero-bubble schedule"),
        ("tp=two", r"tp is 'two'; it must be a whole number"),
        ("tensor=2", r"'tensor=2' is not key=value with a key among pp, dp"),
        ("schedule=dualpipe", r"schedule is 'dualpipe'; choose among afab"),
        ("sequence_parallel=no", r"must be true or false"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(layout: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.parse(layout)


def test_the_interleaved_schedule_wants_full_rounds_of_micro_batches() -> None:
    layout = Layout.parse("pp=2,virtual=2,schedule=interleaved,dp=2")
    layout.check(tiny("dense"), 8)
    with pytest.raises(ConfigError, match="multiple of pp 2 micro-batches a replica; 6 over dp 2 leave 3"):
        layout.check(tiny("dense"), 6)


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 2 ranks \(pp 1 .* tp 2\), but 1 are running"):
        Mesh.build(Axes(tp=2))


def test_a_mesh_for_another_layout_is_refused() -> None:
    model = Decoder(tiny("dense"), device="meta")
    with pytest.raises(ConfigError, match="needs a mesh of"):
        parallelize(model, Layout(tp=2), Mesh.single())


@settings(deadline=None)
@given(
    pp=_degrees,
    dp=_degrees,
    cp=_degrees,
    tp=_degrees,
    zero=st.integers(0, 3),
    sequence_parallel=st.booleans(),
)
def test_a_layout_is_written_and_read(
    pp: int, dp: int, cp: int, tp: int, zero: int, sequence_parallel: bool
) -> None:
    layout = Layout(pp=pp, dp=dp, cp=cp, tp=tp, zero=zero, sequence_parallel=sequence_parallel)
    assert Layout.parse(str(layout)) == layout


@settings(deadline=None)
@given(pp=_degrees, dp_replicate=_degrees, dp_shard=_degrees, cp=_degrees, tp=_degrees, ep=_degrees)
def test_groups_partition_the_ranks(
    pp: int, dp_replicate: int, dp_shard: int, cp: int, tp: int, ep: int
) -> None:
    if dp_shard * cp % ep:
        with pytest.raises(ConfigError, match="does not divide"):
            Axes(pp, dp_replicate, dp_shard, cp, tp, ep)
        return
    axes = Axes(pp, dp_replicate, dp_shard, cp, tp, ep)
    everyone = list(range(axes.world))
    for rank in everyone:
        assert axes.rank(**axes.coordinates(rank)) == rank
    for name in AXES:
        groups = axes.along(name)
        assert sorted(rank for ranks in groups for rank in ranks) == everyone
        assert {len(ranks) for ranks in groups} == {getattr(axes, name)}
        for ranks in groups:  # neighbours differ on this axis alone
            others = {tuple(v for k, v in axes.coordinates(r).items() if k != name) for r in ranks}
            assert len(others) == 1
    for groups, size in ((axes.expert_groups(), ep), (axes.expert_shard_groups(), dp_shard * cp // ep)):
        assert sorted(rank for ranks in groups for rank in ranks) == everyone
        assert {len(ranks) for ranks in groups} == {size}
    assert sorted(axes.along("tp"))[0] == tuple(range(tp))  # the fastest axis: neighbours of a host


@settings(deadline=None)
@given(total=st.integers(0, 100), parts=st.integers(1, 9))
def test_even_bounds_cover_the_whole_with_pieces_that_differ_by_one(total: int, parts: int) -> None:
    bounds = even_bounds(total, parts)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout", ["one", "tp=2", "tp=4,pp=2", "tp=2,pp=4", "dp=2,ep=2,tp=2", "pp=2,split=3+1"]
)
def test_the_ranks_blocks_cover_every_tensor_of_the_checkpoint_once(kind: str, layout: str) -> None:
    config, parsed = tiny(kind), Layout.parse(layout)
    if parsed.ep > 1 and not any(config.moe_layers):
        with pytest.raises(ConfigError, match="no experts"):
            parsed.check(config)
        return
    covered = dict.fromkeys(hf_shapes(config), 0.0)
    for rank in range(parsed.world):
        mesh = _mesh_of(parsed, rank, parsed.key_copies(config))
        placement = place(config, parsed, mesh)
        for name, blocks in placement.blocks.items():
            assert sum(math.prod(b.shape) for b in blocks) == math.prod(placement.shapes[name])
            for block in blocks:
                copies = block.copies * parsed.dp
                copies //= parsed.ep if len(full_shapes(config)[name]) == 3 else 1
                if config.tie_word_embeddings and parsed.pp > 1 and name == "embedding":
                    copies *= 2
                covered[block.name] += math.prod(block.shape) / copies
    assert covered == {name: math.prod(shape) for name, shape in hf_shapes(config).items()}


def _mesh_of(layout: Layout, rank: int, key_copies: int) -> Mesh:
    """A rank's mesh without process groups: enough to say what it holds."""
    from mainspring.parallel.mesh import Group
    from mainspring.parallel.monitor import Monitor

    axes = layout.axes
    partitions = {"ep": axes.expert_groups(), "keys": axes.key_groups(key_copies), "tp": axes.along("tp")}
    groups = {
        name: Group(name, ranks, ranks.index(rank))
        for name, partition in partitions.items()
        for ranks in partition
        if rank in ranks
    }
    return Mesh(axes, rank, groups, Monitor(rank))
