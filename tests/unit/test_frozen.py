"""Records' mappings: dicts for those who read, shut for those who write."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest

from avmm.frozen import FrozenDict


@dataclass(frozen=True)
class Holder:
    values: FrozenDict[str, int]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(b=2),
        lambda d: d.__setitem__("b", 2),
        lambda d: d.__delitem__("a"),
        lambda d: d.__ior__({"b": 2}),
        lambda d: d.setdefault("b", 2),
        lambda d: d.pop("a"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
    ],
)
def test_nothing_changes_it(change: Callable[[FrozenDict[str, int]], object]) -> None:
    frozen = FrozenDict({"a": 1})
    with pytest.raises(TypeError, match="frozen"):
        change(frozen)
    assert frozen == {"a": 1}


def test_equal_ones_hash_equally() -> None:
    one, other = FrozenDict({"a": 1, "b": 2}), FrozenDict({"b": 2, "a": 1})
    assert {one: "x"}[other] == "x"
    assert hash(Holder(one)) == hash(Holder(other))


def test_json_asdict_pickle_and_copy_take_it_for_a_dict() -> None:
    frozen = FrozenDict({"a": 1})
    assert json.dumps(asdict(Holder(frozen))) == '{"values": {"a": 1}}'
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    assert copy.deepcopy(frozen) == frozen
