"""What becomes of one model, as one line of the results."""

from __future__ import annotations

import logging
import re
import signal
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.analysis.partition import partition
from fxcollab.errors import FxCollabError
from fxcollab.plan import plan_of
from fxcollab.proof.report import Check
from fxcollab.proof.structure import check_graphs, check_provenance, check_state
from fxcollab.tracing.capture import LIMITATIONS_KEY
from fxcollab.tracing.examples import accepts, example_tensors, guess_inputs
from fxcollab.tracing.interface import Interface
from tests.benchmarks.zoo.models import Entry, entries
from tests.benchmarks.zoo.other_libraries import other_entries
from tests.untouched import Untouched

Row = dict[str, Any]


def try_structure(name: str) -> Row:
    """Capture, transform and prune on meta tensors; graph, keys and the model itself must be as they were.

    Beside it stand plain ``symbolic_trace`` and torchvision's ``create_feature_extractor``.
    """
    return _timed(name, "meta", _structure)


def try_values(name: str) -> Row:
    """The whole proof of `fxcollab.verify` on real weights, at another batch size than the captured one.

    Images are as small as the model takes them: the proof is one of values, not of sizes.
    """
    return _timed(name, "cpu", _values)


def try_values_in_time(name: str) -> Row:
    """The same; after some time it is given up."""

    def stop(*_: object) -> None:
        raise _TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT, 5)  # again, should one be caught
    try:
        return try_values(name)
    except _TooLongError:
        return {"name": name, "family": other_entries()[name].family, "result": "timeout", "seconds": LIMIT}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


LIMIT = 120.0


class _TooLongError(BaseException):
    """No exception that a capture may take for the model's own."""


def _timed(name: str, device: str, attempt: Callable[[Entry, nn.Module, Row], list[str]]) -> Row:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    entry = other_entries().get(name) or entries()[name]
    row: Row = {"name": name, "family": entry.family}
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = _built(entry, "cpu" if entry.real else device)
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "pixels": _pixels(model)}
        row |= _outcome(entry, model, attempt)
    except Exception as error:  # whatever a library's constructor raises
        row |= {"result": "error", "why": _first_line(error)}
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def _built(entry: Entry, device: str) -> nn.Module:
    try:
        with torch.device(device):
            return entry.build()
    except NotImplementedError:  # a constructor that computes with values
        return entry.build().to(device)


def _outcome(entry: Entry, model: nn.Module, attempt: Callable[[Entry, nn.Module, Row], list[str]]) -> Row:
    late = attempt is _values and sum(p.numel() for p in model.parameters()) > LARGE
    row: Row = {"splits": list(entry.splits(model, late=late))}
    untouched = Untouched(model)
    try:
        wrong = attempt(entry, model, row)
        row |= {"result": "wrong" if wrong else "ok"}
    except FxCollabError as error:
        wrong = []
        row |= {"result": "refused", "error": _told(error)}
    except Exception as error:  # a line of the results, whatever it is
        wrong = []
        row |= {"result": "error", "why": _first_line(error), "trace": _portable(traceback.format_exc()[-2000:])}
    wrong += [f"{what} was changed" for what in untouched.differences()[:4]]
    if wrong:
        row |= {"result": "wrong", "wrong": [_portable(text) for text in wrong]}
    row |= _others(model, row["splits"]) if attempt is _structure else {}  # last: plain tracing writes to the model
    return row


LARGE = 150_000_000
"""Parameters of which a machine of 24 GiB can't hold four heads, with gradients, in float64."""


def _told(error: FxCollabError) -> dict[str, str | None]:
    told = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
    return {key: text and _portable(text) for key, text in told.items()}


def _structure(entry: Entry, model: nn.Module, row: Row) -> list[str]:
    inputs = entry.inputs(model)
    train_model = fxcollab.transform(model, splits=row["splits"], example_inputs=inputs, seed=0)
    interface = plan_of(train_model).interface
    captured = fxcollab.capture(model, row["splits"], inputs, interface=interface)
    cut = partition(captured, plan_of(train_model).tree)
    row |= {"nodes": len(captured.graph.nodes), "limitations": _limitations(train_model)}
    checks = [check_provenance(train_model), *check_graphs(captured, train_model)]
    return _failed([*checks, *check_state(model, cut, train_model)])


def _values(entry: Entry, model: nn.Module, row: Row) -> list[str]:
    inputs = entry.inputs(model)
    train_model = fxcollab.transform(model, splits=row["splits"], example_inputs=inputs, seed=0)
    row |= {"limitations": _limitations(train_model)}
    report = fxcollab.verify(model, train_model, entry.larger(model) or _one_more(inputs or _guessed(model)))
    row |= {"checks": len(report.checks)}
    if report.not_checked:
        row |= {"not_checked": [_portable(f"{check.name}: {check.detail}") for check in report.not_checked]}
    return _failed(report)


def _failed(checks: Iterable[Check]) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


def _guessed(model: nn.Module) -> Mapping[str, Any]:
    interface = _with_small_images(model, guess_inputs(model))
    return {spec.name: v for spec, v in zip(interface.inputs, example_tensors(model, interface), strict=True)}


def _with_small_images(model: nn.Module, interface: Interface) -> Interface:
    [spec] = interface.inputs
    sizes = SMALL if spec.shape is not None and len(spec.shape) == 4 else ()
    smaller = (replace(spec, shape=(*spec.shape[:2], size, size)) for size in sizes if spec.shape)
    tries = (replace(interface, inputs=(small,)) for small in smaller if small.shape < spec.shape)
    return next((one for one in tries if accepts(model, one)), interface)


SMALL = (64, 84, 96, 112, 128, 160)


def _one_more(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A larger batch."""
    return {k: torch.cat([v, v[:1]]) if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}


def _limitations(train_model: nn.Module) -> list[str]:
    notes: Any = train_model.meta[LIMITATIONS_KEY]
    return [_portable(note) for note in notes]


def _others(model: nn.Module, splits: list[str]) -> Row:
    keys = list(model.state_dict())
    return {
        "plain": _attempt(lambda: fx.symbolic_trace(model), keys),
        "extractor": _attempt(lambda: _feature_extractor(model, splits), None),
    }


def _attempt(make: Callable[[], nn.Module], keys: list[str] | None) -> str:
    try:
        made = make()
    except Exception as error:
        return type(error).__name__
    found = list(made.state_dict())
    if keys is None or found == keys:
        return "ok"
    return "order differs" if set(found) == set(keys) else "keys differ"


def _feature_extractor(model: nn.Module, splits: list[str]) -> nn.Module:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, splits)


def _pixels(model: nn.Module) -> int:
    """Of the input that a timm model declares."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    return int(size[-1] * size[-2]) if size else 0


def _first_line(error: BaseException) -> str:
    return _portable(f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:400])


def _portable(text: str) -> str:
    """Without the folders in which Python and libraries happen to be installed."""
    return re.sub(r"[^\s\"']*/site-packages/", "", text).replace(f"{sysconfig.get_path('stdlib')}/", "")
