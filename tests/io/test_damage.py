"""Damaged artifacts: what is wrong is named."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxcollab
from fxcollab import DamagedError, LimitError, limits
from fxcollab.io import plan_file
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict, save_state_dict
from fxcollab.plan import RewriteOptions
from tests.io.helpers import Net, made, refused
from tests.speeds import slow_but


def test_a_folder_without_a_plan_is_no_artifact(tmp_path: Path) -> None:
    assert "it has no plan.json" in str(refused(fxcollab.load, tmp_path).why)
    assert "no such directory" in str(refused(fxcollab.load, tmp_path / "none").why)


@pytest.mark.parametrize(
    "text",
    slow_but(
        [b"", b"not json", b"[1, 2]", b"[" * 100_000],
        [b"", b"not json", b"[1, 2]", b"null", b'{"format": 1', b"\xff\xfe\x00", b"[" * 100_000],
    ),
)
def test_a_plan_that_is_no_json_object_is_damaged(saved: Path, text: bytes) -> None:
    (saved / "plan.json").write_bytes(text)
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan is damaged."
    assert error.where == str(saved / "plan.json")


@pytest.mark.parametrize(
    "key", ["pattern", "splits", "fanouts", "granularity", "inputs", "fixed", "source", "fingerprint"]
)
def test_a_plan_without_one_of_its_keys_is_damaged(saved: Path, key: str) -> None:
    _edit_plan(saved, **{key: ...})
    for read in (fxcollab.load, plan_file.read_plan):
        error = refused(read, saved)
        assert error.what == "The plan is damaged."
        assert error.why == f"it has no {key!r}"


@pytest.mark.parametrize("option", ["init", "seed", "rescale", "peers", "recompute"])
def test_an_option_that_a_plan_of_an_earlier_version_lacks_has_its_default(saved: Path, option: str) -> None:
    _edit_plan(saved, **{option: ...})
    assert getattr(plan_file.read_plan(saved).options, option) == getattr(RewriteOptions(), option)
    assert fxcollab.load(saved, Net).code == made(Net, "a", "b").code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("pattern", 3, marks=pytest.mark.slow),
        ("pattern", "multi-instance"),
        ("pattern", "ladder"),
        ("pattern", "simple"),
        ("splits", "a,b"),
        ("splits", [1, 2]),
        pytest.param("splits", ["a"], marks=pytest.mark.slow),
        pytest.param("fanouts", 4, marks=pytest.mark.slow),
        ("fanouts", [2, 2.5]),
        ("fanouts", [2, 1]),
        pytest.param("fanouts", [2, 2, 2], marks=pytest.mark.slow),
        ("init", None),
        ("seed", "1"),
        pytest.param("rescale", "yes", marks=pytest.mark.slow),
        pytest.param("granularity", [], marks=pytest.mark.slow),
        ("granularity", "fine"),
        pytest.param("peers", {}, marks=pytest.mark.slow),
        pytest.param("inputs", "x", marks=pytest.mark.slow),
        ("inputs", ["x"]),
        ("inputs", [{"name": "x"}]),
        ("inputs", [{"name": "x", "shape": [2, 3], "dtype": "float32"}] * 2),
        ("inputs", [{"name": "x", "shape": [2, 3], "dtype": "quint8"}]),
        ("inputs", [{"name": name, "shape": [2**30 + 1], "dtype": "float32"} for name in "xy"]),
        pytest.param("inputs", [{"name": "x", "shape": "2x3", "dtype": None}], marks=pytest.mark.slow),
        pytest.param("source", "torchvision:resnet18", marks=pytest.mark.slow),
        ("source", {"kind": "url", "location": "x", "name": None, "arguments": {}}),
        pytest.param("fingerprint", None, marks=pytest.mark.slow),
    ],
)
def test_a_plan_with_a_value_of_a_wrong_kind_is_damaged(saved: Path, key: str, value: object) -> None:
    _edit_plan(saved, **{key: value})
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan is damaged."
    assert error.where == str(saved / "plan.json") and error.why


@pytest.mark.parametrize("number", [2, "1", None, True, ...])
def test_a_plan_of_another_format_names_it(saved: Path, number: object) -> None:
    _edit_plan(saved, format=number)
    error = refused(fxcollab.load, saved)
    assert error.what == "The plan has another format."
    assert "this version reads 1" in str(error.why)


def test_a_plan_that_fixes_what_the_forward_does_not_take_is_refused(saved: Path) -> None:
    _edit_plan(saved, fixed={"nothing": 1})
    error = refused(fxcollab.load, saved, Net)
    assert error.why == "The forward has no parameter nothing."


def _edit_plan(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "plan.json").read_text()) | {"checksum": ...} | changes
    (folder / "plan.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _pickle_it(file: Path) -> None:
    torch.save({"a.weight": torch.zeros(1)}, file)


def _with_metadata(**metadata: str) -> Callable[[Path], None]:
    return lambda file: save_file(load_file(file), file, {f"fxcollab.{key}": v for key, v in metadata.items()})


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _pickle_it,
        pytest.param(lambda file: file.write_bytes(b""), marks=pytest.mark.slow),
        pytest.param(lambda file: file.write_bytes(b"\x00" * 100), marks=pytest.mark.slow),
        lambda file: file.write_text("garbage " * 50),
        _with_metadata(order="{"),
        pytest.param(_with_metadata(order="3"), marks=pytest.mark.slow),
        _with_metadata(order='["nothing"]'),
        pytest.param(_with_metadata(aliases="[1]"), marks=pytest.mark.slow),
    ],
)
def test_damaged_weights_are_named(saved: Path, damage: Callable[[Path], object]) -> None:
    damage(saved / "weights.safetensors")
    error = refused(fxcollab.load, saved)
    assert error.what == "The weights file can't be read."
    assert error.where == str(saved / "weights.safetensors")
    assert error.why


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header["a.bias"].pop("dtype"),
        lambda header: header["a.bias"].update(shape=3),
        lambda header: header.update({"a.bias": []}),
        lambda header: header.update(__metadata__=[1]),
        lambda header: header["__metadata__"].update({"fxcollab.order": "no JSON"}),
        lambda header: header["__metadata__"].update({"fxcollab.aliases": "[" * 100_000}),
        lambda header: header["__metadata__"].update({"fxcollab.aliases": '{"x": {}}'}),
    ],
)
@pytest.mark.parametrize("load", [lambda *given, weights: load_head(given[0], 1, weights=weights), fxcollab.load])
def test_a_damaged_header_beside_other_weights_is_told(
    saved: Path, tmp_path: Path, load: Callable[..., object], damage: Callable[[dict[str, Any]], object]
) -> None:
    weights = saved / "weights.safetensors"
    content = weights.read_bytes()
    (tmp_path / "copy.safetensors").write_bytes(content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    damage(header)
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(DamagedError, match="weights file can't be read"):
        load(saved, Net(), weights=tmp_path / "copy.safetensors")


def test_a_type_without_a_name_is_told(saved: Path) -> None:
    data = json.loads((saved / "plan.json").read_text())
    data["inputs"] = [{"name": "x", "shape": [1, 3], "dtype": ""}]
    (saved / "plan.json").write_text(json.dumps({k: v for k, v in data.items() if k != "checksum"}))
    with pytest.raises(DamagedError, match="has the type ''"):
        fxcollab.load(saved, Net())


def test_long_names_take_no_more_memory_than_their_length() -> None:
    one = torch.ones(1)
    tracemalloc.start()
    try:
        fxcollab.prune_state_dict({"w": one, "peers.b1.w": one, "." * 20_000: one}, 1)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_copies_of_one_tensor_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 10_000)
    one = torch.ones(1000)
    with pytest.raises(LimitError, match="copies of one tensor"):
        save_state_dict(dict.fromkeys("abcd", one), Path("never.safetensors"))
    assert not Path("never.safetensors").exists()


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "weights.safetensors").unlink()
    error = refused(fxcollab.load, saved)
    assert error.what == "There is no weights file." and error.where == str(saved / "weights.safetensors")


def _without(state: dict[str, Tensor]) -> None:
    del state["peers.b1.c.weight"]


def _reshaped(state: dict[str, Tensor]) -> None:
    state["peers.b1.c.weight"] = torch.zeros(2, 9)


def _with_more(state: dict[str, Tensor]) -> None:
    state["peers.b1.c.gain"] = torch.zeros(1)


@pytest.mark.parametrize("change", slow_but([_without, _reshaped], [_without, _reshaped, _with_more]))
def test_weights_of_other_names_or_shapes_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    folder, model = fxcollab.save(made(Net), tmp_path / "run"), Net()
    before = copy.deepcopy(model.state_dict())
    state = load_state_dict(folder / "weights.safetensors")
    change(state)
    save_state_dict(state, folder / "weights.safetensors")
    error = refused(fxcollab.load, folder, model)
    assert error.what == "The weights don't fit the plan."
    assert "peers.b1.c." in str(error.where)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("entry", "value"),
    [("peers", "a" * 20_000), ("peers", "a.b"), ("peers", "class"), ("splits", ["a+" * 10_000 + "a", "b"])],
    ids=["a long name", "a path", "a keyword", "a long split"],
)
def test_names_that_no_plan_has_are_refused_before_anything_is_looked_for(
    saved: Path, entry: str, value: Any
) -> None:
    _edit_plan(saved, **{entry: value})
    for read in (lambda: load_head(saved, 1), lambda: fxcollab.load(saved, Net())):
        with pytest.raises(DamagedError, match=r"(?s)plan is damaged.*(characters in the name|can't be the name)"):
            read()


@pytest.mark.parametrize("shape", [[0, 10**30], [0, 2**62, 2**62], [10**30, 0]])
def test_shapes_that_torch_cannot_count_are_refused(saved: Path, shape: list[int]) -> None:
    _edit_plan(saved, inputs=[{"name": "x", "shape": shape, "dtype": "float32", "structured": False}])
    with pytest.raises(DamagedError, match=r"(?s)plan is damaged.*values of input 'x' are too many"):
        fxcollab.load(saved, Net())
