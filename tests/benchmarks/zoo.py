"""Every model of timm, torchvision and transformers' classifiers: ``python -m tests.benchmarks.zoo``.

Each model is captured, transformed (hierarchical, two splits at its own stages) and pruned, on meta tensors; its
graph and its keys must come back. Beside it stand plain ``symbolic_trace`` and torchvision's
``create_feature_extractor`` on the same model. With ``--values`` the whole proof of `fxcollab.verify` runs on real
weights. One JSON line a model goes to ``--output``; models that stand there are skipped, so that an interrupted run
goes on. ``--summary`` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import fx, nn

import fxcollab
from fxcollab.capture.capture import NOTES_KEY
from fxcollab.errors import FxCollabError
from tests.benchmarks.zoo_models import Entry, entries


def try_model(name: str, values: bool) -> dict[str, Any]:
    """What becomes of one model, as one line of the output."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    entry = next(entry for entry in entries() if entry.name == name)
    row: dict[str, Any] = {"name": name, "library": entry.library, "values": values}
    start = time.perf_counter()
    try:
        row |= _measure(entry, values)
    except FxCollabError as error:
        row |= {"result": "refused", "what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
    except Exception as error:  # a line in the output, whatever it is
        row |= {"result": "error", "why": f"{type(error).__name__}: {error}"[:400]}
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _measure(entry: Entry, values: bool) -> dict[str, Any]:
    with torch.device("cpu" if values else "meta"):
        model = entry.build()
    keys, before = list(model.state_dict()), _fingerprint(model)
    splits = list(entry.splits(model))
    row: dict[str, Any] = {"splits": splits, "nodes": 0}
    train_model = fxcollab.transform(model, splits=splits, seed=0, init="copy-anyway" if not values else "fresh")
    pruned = fxcollab.prune(train_model)
    captured = fxcollab.capture(model, splits)
    row["nodes"] = len(captured.graph.nodes)
    wrong = []
    if list(pruned.state_dict()) != keys or list(train_model.state_dict())[: len(keys)] != keys:
        wrong.append("keys")
    if pruned.code != captured.code:
        wrong.append("code")
    if _fingerprint(model) != before:
        wrong.append("the model was changed")
    if not values:  # last, for plain tracing sets its constants on the model
        row |= {"plain": _attempt(lambda: fx.symbolic_trace(model), keys)}
        row |= {"extractor": _attempt(lambda: _feature_extractor(model, splits), None)}
    if values:
        report = fxcollab.verify(model, train_model)
        wrong += [f"{check.name}: {check.detail}" for check in report if not check.ok]
    return row | {"result": "wrong" if wrong else "ok", "wrong": wrong, "given_up": list(train_model.meta[NOTES_KEY])}


def _attempt(make: Callable[[], nn.Module], keys: list[str] | None) -> str:
    try:
        made = make()
    except Exception as error:
        return type(error).__name__
    return "ok" if keys is None or list(made.state_dict()) == keys else "keys differ"


def _feature_extractor(model: nn.Module, splits: list[str]) -> nn.Module:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, splits)


def _fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model that capturing must not change, but for the values of its tensors."""
    return [
        (
            path,
            type(module),
            module.training,
            sorted(module.__dict__),
            [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("hooks") and v],
            sorted(k for k in vars(type(module)) if not k.startswith("__")),
            [(k, id(v), getattr(v, "_version", 0)) for k, v in module._parameters.items()],
            [(k, id(v), getattr(v, "_version", 0)) for k, v in module._buffers.items()],
        )
        for path, module in model.named_modules()
    ]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _run(arguments: argparse.Namespace) -> None:
    done = {row["name"] for row in _rows(arguments.output)}
    names = [e.name for e in entries() if e.library in arguments.libraries and e.name not in done]
    if arguments.only:
        names = [name for name in names if any(part in name for part in arguments.only)]
    with (
        multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=40) as pool,
        arguments.output.open("a") as file,
    ):
        jobs = ((name, arguments.values) for name in names)
        for row in track(pool.imap_unordered(_star, jobs), total=len(names)):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _star(job: tuple[str, bool]) -> dict[str, Any]:
    return try_model(*job)


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of results, in Markdown."""
    yield "| library | models | fxcollab | plain fx, all keys kept | plain fx, traced | feature extractor |"
    yield "|---|---|---|---|---|---|"
    for library in dict.fromkeys(row["library"] for row in rows):
        mine = [row for row in rows if row["library"] == library]
        count = Counter(row["result"] for row in mine)
        plain = Counter(row.get("plain") for row in mine)
        extractor = sum(row.get("extractor") == "ok" for row in mine)
        yield (
            f"| {library} | {len(mine)} | {count['ok']} | {plain['ok']} | {plain['ok'] + plain['keys differ']} "
            f"| {extractor} |"
        )
    for row in rows:
        if row["result"] != "ok":
            details = " ".join(str(row.get(key, "")) for key in ("what", "wrong", "why"))
            yield f"- {row['name']}: {row['result']}: {details}"


def main() -> None:
    """Run what is missing, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="*", default=["timm", "torchvision", "transformers"])
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--values", action="store_true", help="real weights, the whole proof")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    if not arguments.summary:
        _run(arguments)
    print("\n".join(summary(_rows(arguments.output))))


if __name__ == "__main__":
    main()
