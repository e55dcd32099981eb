"""The index against a naive one under any stream of events, and its promises one by one."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router import run_tree
from dynamo.router.block_index import BlockIndex, UnknownParentError
from tests.router.index_model import NaiveIndex, check_consistency, check_levels, entered

HOLDERS = ("a", "b", "c")
locals_ = st.lists(st.integers(1, 3), min_size=1, max_size=6)
names = st.integers(1, 12)


@st.composite
def own_names(draw):
    """Events of engines that name blocks by their sequence hash: parents and removals are of prefixes."""
    holder = draw(st.sampled_from(HOLDERS))
    kind = draw(st.sampled_from(["store", "store", "store", "remove", "remove", "clear", "leave"]))
    path = draw(locals_)
    if kind == "store":
        cut = draw(st.integers(0, len(path) - 1))
        above = sequence_hashes(path)[cut - 1] if cut else None
        rest = path[cut:]
        return kind, holder, above, sequence_hashes(rest, above), rest
    if kind == "remove":
        seqs = sequence_hashes(path)
        ends_first = st.just(seqs[draw(st.integers(0, len(seqs) - 1)) :][::-1])
        return kind, holder, draw(ends_first | st.lists(st.sampled_from(seqs), max_size=4))
    return (kind, holder)


@st.composite
def foreign_names(draw):
    """Events with names of the engine's own, which it may use twice or move to another block."""
    holder = draw(st.sampled_from(HOLDERS))
    kind = draw(st.sampled_from(["store", "store", "store", "remove", "remove", "clear", "leave"]))
    if kind == "store":
        path = draw(locals_)
        called = draw(st.lists(names, min_size=len(path), max_size=len(path)))
        return kind, holder, draw(st.none() | names), called, path
    if kind == "remove":
        return kind, holder, draw(st.lists(names, max_size=4))
    return (kind, holder)


def apply(index, naive, event) -> None:
    kind, holder, *rest = event
    if kind == "store":
        if naive.store(holder, *rest):
            before = index.blocks(holder)
            parent, called, contents = rest
            if parent is not None and len(called) == 1 and index.append(holder, parent, called[0], contents[0]):
                assert index.blocks(holder) == before + 1
                return
            assert index.store(holder, *rest) >= index.blocks(holder) - before
        else:
            with pytest.raises(UnknownParentError):
                index.store(holder, *rest)
    elif kind == "remove":
        assert index.remove(holder, *rest) == naive.remove(holder, *rest)
    elif kind == "clear":
        index.clear(holder)
        naive.clear(holder)
    else:
        index.remove_holder(holder)
        naive.remove_holder(holder)


@pytest.mark.parametrize("moved", [0, 7], ids=["sequence hashes", "names of its own"])
def test_a_block_behind_a_run_of_ones_own_is_appended(moved):
    path = [1, 2, 3]
    seqs = sequence_hashes(path)
    names = [seq ^ moved for seq in seqs]
    index, naive = BlockIndex(keep_contents=True), NaiveIndex()
    for each in (index, naive):
        each.store("a", None, names[:2], path[:2])
        each.store("b", None, names[:1], path[:1])
    naive.store("a", names[1], names[2:], path[2:])
    assert not index.append("b", names[0], names[1], path[1])  # somebody has it
    assert not index.append("a", names[0], names[2], path[2])  # something follows
    assert not index.append("c", names[1], names[2], path[2])
    assert not index.append("a", names[1], names[2], -1)
    assert index.append("a", names[1], names[2], path[2])
    assert not index.append("a", names[1], names[2], path[2])
    compare(index, naive, [path])
    check_consistency(index, naive)


def compare(index, naive, paths) -> None:
    for path in paths:
        sequence = sequence_hashes(path)
        assert index.find(sequence) == naive.find(sequence)
        check_levels(index.levels(sequence))


@pytest.mark.parametrize("hidden_from", [3, 16])
@pytest.mark.parametrize("stream", [own_names(), foreign_names(), own_names() | foreign_names()])
def test_any_stream_of_events_ends_where_a_naive_index_does(stream, hidden_from, monkeypatch):
    monkeypatch.setattr(run_tree, "HIDDEN_FROM", hidden_from)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(events=st.lists(stream, max_size=30), paths=st.lists(locals_, min_size=1, max_size=5), keep=st.booleans())
    def run(events, paths, keep):
        index, naive = BlockIndex(keep_contents=keep), NaiveIndex()
        for event in events:
            apply(index, naive, event)
            check_consistency(index, naive)
            compare(index, naive, paths)
        while index.sweep(2):
            check_consistency(index, naive)
        assert entered(index) == {seq for run in index._tree.runs for seq in run.seqs}

    run()


@pytest.mark.parametrize("hidden_from", [3, 16])
def test_long_random_streams_of_long_prompts_agree_too(hidden_from, monkeypatch):
    monkeypatch.setattr(run_tree, "HIDDEN_FROM", hidden_from)
    rnd = random.Random(1)
    index, naive = BlockIndex(), NaiveIndex()
    prompts = [[rnd.randrange(4) for _ in range(rnd.randrange(1, 60))] for _ in range(40)]
    for i in range(3000):
        path = sequence_hashes(prompt := rnd.choice(prompts))
        holder, cut = rnd.choice(HOLDERS), rnd.randrange(len(path))
        if rnd.random() < 0.6:
            event = ("store", holder, path[cut - 1] if cut else None, path[cut:], prompt[cut:])
        elif rnd.random() < 0.98:
            event = ("remove", holder, path[cut:][::-1] if rnd.random() < 0.8 else path[cut : cut + 2])
        else:
            event = (rnd.choice(["clear", "leave"]), holder)
        apply(index, naive, event)
        if i % 50 == 0:
            check_consistency(index, naive)
            compare(index, naive, prompts)


def stored(holders, prompt) -> tuple[BlockIndex, list[int]]:
    """An index in which each of `holders` has the first so many blocks of `prompt`."""
    index, seqs = BlockIndex(), sequence_hashes(prompt)
    for holder, length in holders.items():
        index.store(holder, None, seqs[:length], prompt[:length])
    return index, seqs


def test_each_holder_matches_as_far_as_it_holds():
    index, seqs = stored({"a": 3, "b": 5, "c": 5, "d": 9}, list(range(10)))
    assert index.find(seqs) == {"a": 3, "b": 5, "c": 5, "d": 9}
    assert [(blocks, set(holders)) for blocks, holders in index.by_level(index.levels(seqs))] == [
        (3, {"a", "b", "c", "d"}),
        (5, {"b", "c", "d"}),
        (9, {"d"}),
    ]


def test_an_empty_prompt_and_one_that_nobody_knows_match_nowhere():
    index, _ = stored({"a": 3}, [1, 2, 3])
    assert index.find([]) == {}
    assert index.find(sequence_hashes([9, 2, 3])) == {}
    assert BlockIndex().find([1]) == {}


def test_a_block_that_is_gone_ends_the_match_until_it_is_back():
    index, seqs = stored({"a": 5, "b": 4}, [1, 2, 3, 4, 5])
    index.remove("a", [seqs[2]])
    assert index.find(seqs) == {"a": 2, "b": 4}
    assert index.holes("a") == {seqs[2]}
    index.store("a", seqs[1], [seqs[2]], [3])
    assert index.find(seqs) == {"a": 5, "b": 4}
    assert not index.holes("a")


def test_a_hole_goes_with_the_last_block_behind_it():
    index, seqs = stored({"a": 3}, [1, 2, 3])
    index.remove("a", seqs[:2])
    assert index.find(seqs) == {}
    index.remove("a", seqs[2:])
    assert len(index) == 0
    assert not index.holes("a")


def test_many_blocks_go_at_once_end_first_and_strangers_among_them_are_counted():
    index, seqs = stored({"a": 9}, list(range(1, 10)))
    assert index.remove("a", [seqs[8], seqs[7], 5, seqs[6], seqs[3]]) == 1
    assert (index.find(seqs), index.holes("a"), index.blocks("a")) == ({"a": 3}, {seqs[3]}, 5)
    assert index.remove("a", seqs[::-1]) == 4
    assert (len(index), index.blocks("a"), index.holes("a")) == (0, 0, frozenset())


def test_storing_twice_changes_nothing():
    index, seqs = stored({"a": 3}, [1, 2, 3])
    assert index.store("a", None, seqs, [1, 2, 3]) == 0
    assert index.blocks("a") == 3
    index.remove("a", seqs[2:])
    assert index.find(seqs) == {"a": 2}


def test_blocks_after_an_unknown_parent_are_refused():
    index, seqs = stored({"a": 3}, [1, 2, 3])
    with pytest.raises(UnknownParentError, match="does not hold the parent block 77"):
        index.store("a", 77, [4], [4])
    with pytest.raises(UnknownParentError):  # another holder's parent is no parent
        index.store("b", seqs[2], [4], [4])
    assert len(index) == 3


def test_a_block_of_two_names_stays_until_both_are_gone():
    index = BlockIndex()
    index.store("a", None, [71], [1])
    index.store("a", None, [72], [1])
    index.remove("a", [71])
    assert index.find([1]) == {"a": 1}
    index.remove("a", [72])
    assert index.find([1]) == {}


def test_a_name_that_moves_leaves_its_block():
    index = BlockIndex()
    index.store("a", None, [71], [1])
    index.store("a", None, [71], [2])
    assert index.find([1]) == {}
    assert index.find([2]) == {"a": 1}


def test_a_holder_that_leaves_takes_its_blocks_along_and_frees_them_later():
    index, seqs = stored({"a": 1000, "b": 10}, list(range(1000)))
    index.remove_holder("a")
    assert index.find(seqs) == {"b": 10}
    assert len(index) == 10
    assert index.sweep(100)
    assert not index.sweep(10_000)
    assert len(entered(index)) == 10


def test_storing_sweeps_what_others_left():
    index, seqs = stored({"a": 1000}, list(range(1000)))
    index.remove_holder("a")
    other = list(range(5000, 5600))
    index.store("b", None, sequence_hashes(other), other)
    assert entered(index) == set(sequence_hashes(other))
    assert index.find(seqs) == {}


def test_blocks_stored_again_before_they_were_swept_are_there():
    index, seqs = stored({"a": 500}, list(range(500)))
    index.clear("a")
    assert index.find(seqs) == {}
    index.store("a", None, seqs[:400], list(range(400)))
    assert index.find(seqs) == {"a": 400}
    while index.sweep(50):
        pass
    assert index.find(seqs) == {"a": 400}
    assert len(entered(index)) == 400


def test_blocks_that_the_same_holders_reach_stay_together_however_they_were_told():
    prompt = list(range(600))
    index, seqs = stored({"a": 600}, prompt)
    for start in range(0, 600, 7):
        cut = slice(start, start + 7)
        index.store("b", seqs[start - 1] if start else None, seqs[cut], prompt[cut])
    assert len(index._tree.root.children) == 1
    assert [len(run.seqs) for run in index._tree.reached(index.bit("a"))] == [600]
    for seq in reversed(seqs[100:]):
        index.remove("a", [seq])
    assert sorted(len(run.seqs) for run in index._tree.reached(index.bit("b"))) == [100, 500]
    assert index.find(seqs) == {"a": 100, "b": 600}


def test_a_thousand_holders_are_told_apart():
    prompt = list(range(1200))
    index, seqs = stored({number: number + 1 for number in range(1000)}, prompt)
    assert index.find(seqs) == {number: number + 1 for number in range(1000)}
    for number in range(0, 1000, 2):  # half of them
        index.remove_holder(number)
    assert index.find(seqs[:600]) == {number: min(number + 1, 600) for number in range(1, 1000, 2)}


def test_what_is_no_hash_is_refused_and_nothing_is_stored():
    index = BlockIndex()
    for bad in ([-1], [2**64], [1, -1], ["x"]):
        with pytest.raises(ValueError, match="tokens_hash"):
            index.store("a", None, [1] * len(bad), bad)
    with pytest.raises(ValueError, match="2 names for 1 local hashes"):
        index.store("a", None, [1, 2], [1])
    assert len(index) == 0


def test_an_index_without_contents_gives_no_account():
    with pytest.raises(ValueError, match="keep_contents"):
        BlockIndex().account("a")


def test_an_account_tells_everything_that_is_needed_to_store_it_elsewhere():
    index = BlockIndex(keep_contents=True)
    seqs = sequence_hashes([1, 2, 3, 4])
    index.store("a", None, [71, 72, 73, 74], [1, 2, 3, 4])
    index.store("a", 72, [75], [5])
    index.store("a", 72, [76], [5])
    index.remove("a", [71])
    index.store("b", None, seqs[:1], [1])
    account = index.account("a")
    copy = BlockIndex()
    for run in account.runs:
        copy.store_after("a", run.parent, run.sequence_hashes, run.local_hashes)
    assert copy.find(seqs) == {"a": 4}
    assert copy.find(sequence_hashes([1, 2, 5])) == {"a": 3}
    assert account.holes == {seqs[0]}
    assert account.names[seqs[1]] == 72
    fork = sequence_hashes([1, 2, 5])[-1]
    assert {account.names[fork], *account.more_names[fork]} == {75, 76}
    assert index.account("b").names is None
    assert index.account("nobody").runs == []
