"""The whole proof on real networks: ``python -m tests.benchmarks.proof``.

Every network below goes through every head tree below; each line of `fxcollab.verify` must hold. Where plain fx
can trace the network, two more lines are shown: tracing the pruned graph gives the same code as tracing the
network, and the traced network, transformed, prunes back to the very same operations.

Prints a table and writes one JSON line a case to ``--output``; cases that stand there already are skipped, so an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import fx, nn

import fxcollab
from fxcollab.fx_utils import first_difference
from fxcollab.plan import plan_of
from samples.networks import densenet40_12, resnet32, resnet110

VIT = [f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)]
STAGES = ["layer1", "layer2", "layer3"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet50": (torchvision.models.resnet50, STAGES),
    "resnet18": (torchvision.models.resnet18, STAGES),
    "densenet121": (
        torchvision.models.densenet121,
        ["features.transition1", "features.transition2", "features.transition3"],
    ),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, ["features.3", "features.6", "features.12"]),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, ["features.2", "features.3", "features.5"]),
    "convnext_tiny": (torchvision.models.convnext_tiny, ["features.1", "features.3", "features.5"]),
    "vit_b_16": (partial(torchvision.models.vit_b_16, image_size=64), VIT),
    "swin_t": (torchvision.models.swin_t, ["features.1", "features.3", "features.5"]),
    "regnet_y_400mf": (
        torchvision.models.regnet_y_400mf,
        ["trunk_output.block1", "trunk_output.block2", "trunk_output.block3"],
    ),
    "googlenet": (
        partial(torchvision.models.googlenet, init_weights=True),
        ["inception3a", "inception3b", "inception4c"],
    ),
    "inception_v3": (
        partial(torchvision.models.inception_v3, init_weights=True),
        ["Mixed_5b", "Mixed_5d", "Mixed_6b"],
    ),
    "resnet32 (CIFAR)": (resnet32, ["conv1", "stage1", "stage2"]),
    "resnet110 (CIFAR)": (resnet110, ["conv1", "stage1", "stage2"]),
    "densenet40-12 (CIFAR)": (densenet40_12, ["transition1", "block2", "transition2"]),
}
TREES: dict[str, tuple[int, dict[str, Any]]] = {
    "multi-instance": (0, {"pattern": "multi-instance", "heads": 2}),
    "simple": (1, {"pattern": "simple", "heads": 3}),
    "hierarchical": (2, {"pattern": "hierarchical"}),
    "fan-outs (2,3)": (2, {"pattern": "hierarchical", "fanouts": (2, 3)}),
    "fan-outs (4,2)": (2, {"pattern": "hierarchical", "fanouts": (4, 2)}),
    "three levels": (3, {"pattern": "hierarchical"}),
}


@dataclass(frozen=True)
class Case:
    """One network under one head tree, and what was found."""

    network: str
    tree: str
    heads: int
    checks: int
    failed: tuple[str, ...]
    gradients: str
    same_code_traced: bool | None
    same_operations: bool | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.failed and self.same_code_traced is not False and self.same_operations is not False


def prove(network: str, tree: str) -> Case:
    """Transform one network along one tree, and verify."""
    start = time.perf_counter()
    build, names = NETWORKS[network]
    levels, arguments = TREES[tree]
    splits = names[-levels:] if levels else []
    model = build()
    train_model = fxcollab.transform(model, splits=splits, seed=0, **arguments)
    report = fxcollab.verify(model, train_model)
    traced = _traced(model)
    return Case(
        network,
        tree,
        plan_of(train_model).tree.heads,
        len(report.checks),
        tuple(f"{check.name}: {check.detail}" for check in report if not check.ok),
        report.checks[-1].detail,
        None if traced is None else fx.symbolic_trace(fxcollab.prune(train_model)).code == traced.code,
        None if traced is None else _same_operations(traced, splits, arguments),
        round(time.perf_counter() - start, 1),
    )


def _traced(model: nn.Module) -> fx.GraphModule | None:
    try:
        return fx.symbolic_trace(model)
    except Exception:
        return None


def _same_operations(traced: fx.GraphModule, splits: list[str], arguments: dict[str, Any]) -> bool:
    back = fxcollab.prune(fxcollab.transform(traced, splits=splits, seed=0, **arguments))
    return first_difference(back.graph, traced.graph) is None and back.code == traced.code


def _cases(arguments: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for network in arguments.networks or NETWORKS:
        for tree in arguments.trees or TREES:
            if (network, tree) not in done:
                yield network, tree


def main() -> None:
    """Run all cases that are not in the output yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS))
    parser.add_argument("--trees", nargs="*", choices=list(TREES))
    parser.add_argument("--output", type=Path, default=Path("proof.jsonl"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = (
        [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    )
    for network, tree in _cases(arguments, {(row["network"], row["tree"]) for row in rows}):
        case = prove(network, tree)
        rows.append({**asdict(case), "ok": case.ok, "torch": torch.__version__, "machine": platform.machine()})
        with arguments.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(_line(rows[-1]), flush=True)
    print(f"\n{sum(row['ok'] for row in rows)} of {len(rows)} cases hold")


def _line(row: dict[str, Any]) -> str:
    mark = "ok    " if row["ok"] else "FAILED"
    traced = {True: "same", False: "DIFFERENT", None: "fx can't trace it"}
    return (
        f"{mark} {row['network']:22} {row['tree']:15} {row['heads']:2} heads  {row['checks']:2} checks  "
        f"{row['gradients']}  traced code: {traced[row['same_code_traced']]}, "
        f"op-level: {traced[row['same_operations']]}  {row['seconds']} s {' '.join(row['failed'])}"
    )


if __name__ == "__main__":
    main()
