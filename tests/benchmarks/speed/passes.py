"""The passes: partition and rewrite beside a plain trace, their growth with the graph, and their memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.analysis.partition import partition
from fxcollab.plan import plan_of
from fxcollab.proof.structure import check_graphs, check_provenance, check_state
from fxcollab.rewriting.rewrite import rewrite
from fxcollab.tracing.capture import capture
from fxcollab.tracing.interface import interface_of
from fxcollab.tree import hierarchical
from tests.benchmarks.rows import Row
from tests.benchmarks.speed.pairs import ratio
from tests.live_bytes import LiveBytes

LARGEST = {
    "nfnet_f7": ("stages.1", "stages.2"),
    "swinv2_cr_giant_224": ("stages.1", "stages.2"),
    "maxvit_rmlp_base_rw_224": ("stages.1", "stages.2"),
    "efficientnetv2_xl": ("blocks.3", "blocks.5"),
    "efficientnet_l2": ("blocks.3", "blocks.5"),
    "densenet264d": ("features.denseblock2", "features.denseblock3"),
    "vit_giant_patch16_lingbot": ("blocks.12", "blocks.24"),
    "eva02_enormous_patch14_clip_224": ("blocks.20", "blocks.40"),
}
"""Of timm's models that a plain trace takes, the largest, and splits at about a third and two thirds."""

SIZES = (12_500, 25_000, 50_000, 100_000)
DEPTH = 8
INITS = ("copy-anyway", "fresh", "fresh, of a factory")


def cases() -> Iterator[tuple[str, str]]:
    """Large models at op level, synthetic graphs of growing size, and the bytes of a transform."""
    yield from (("trace", name) for name in LARGEST)
    yield from (("nodes", str(size)) for size in SIZES)
    yield from (("bytes", init) for init in INITS)


def measure(what: str, which: str) -> Row:
    """Seconds beside a plain trace, microseconds a node, or bytes beside those of the peers."""
    measures: dict[str, Callable[[str], Row]] = {"trace": _beside_a_trace, "nodes": _growth, "bytes": _bytes}
    return measures[what](which)


def conclusion(rows: list[Row]) -> str:
    """The range of each."""
    kinds = {kind: [row for row in rows if row["case"][0] == kind] for kind in ("trace", "nodes", "bytes")}
    times = [1 / row["ratio"] for row in kinds["trace"]]
    small, large = kinds["nodes"][0], kinds["nodes"][-1]
    grown = ", ".join(
        f"{part} {small[part]} to {large[part]} us a node" for part in ("transform", "prune", "structure")
    )
    most = max(row["peak beside the peers"] for row in kinds["bytes"])
    return (
        f"partition and rewrite take {min(times):.2f} to {max(times):.2f}x a plain trace "
        f"(median {statistics.median(times):.2f}); {SIZES[0]} to {SIZES[-1]} nodes: {grown}; "
        f"peak at most {most:.2f}x the peers' bytes"
    )


def _beside_a_trace(name: str) -> Row:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    splits, size = LARGEST[name], model.pretrained_cfg["input_size"]
    captured = capture(model, splits, (torch.empty(1, *size, device="meta"),), "op")
    made: list[fx.GraphModule] = []

    def ours() -> None:
        made[:] = [rewrite(captured, partition(captured, hierarchical(splits)))]

    times = ratio(ours, lambda: fx.symbolic_trace(model), pairs=5)
    return {
        "nodes": len(captured.graph.nodes),
        "training nodes": len(made[0].graph.nodes),
        "graphs": len(list(captured.modes)),
        **times,
    }


def _growth(size: str) -> Row:
    """2^8 heads behind the last splits; the structural part of the proof for two heads, whose graphs are as long."""
    count = int(size)
    with torch.device("meta"):
        model = chain(count)
    interface = interface_of(model, (torch.empty(1, 4, device="meta"),))

    def tree(*splits: str) -> Any:
        return fxcollab.transform(model, splits=splits, interface=interface)

    many, transform = _timed(tree, *(f"layer{count // 10 - 12 * (DEPTH - k)}" for k in range(DEPTH)))
    nodes, heads = len(many.graph.nodes), 2**DEPTH
    _, prune = _timed(fxcollab.prune, many, heads - 1)
    del many
    two, _ = _timed(tree, f"layer{count // 20}")
    _, structure = _timed(_structure, model, two)
    return {
        "training nodes": nodes,
        "transform": round(1e6 * transform / nodes, 1),
        "prune": round(1e6 * prune / count, 1),
        "structure": round(1e6 * structure / count, 1),
        "seconds": [round(seconds, 2) for seconds in (transform, prune, structure)],
    }


def chain(count: int) -> fx.GraphModule:
    """A graph of so many nodes, every tenth of them a layer."""
    graph, root = fx.Graph(), nn.Module()
    value = graph.placeholder("x")
    for place in range(count):
        if place % 10 == 0:
            name = f"layer{place // 10}"
            root.add_module(name, nn.Linear(4, 4))
            value = graph.call_module(name, (value,))
        else:
            value = graph.call_function(torch.relu, (value,))
    graph.output(value)
    return fx.GraphModule(root, graph)


def _structure(model: fx.GraphModule, trained: Any) -> None:
    captured = capture(model)
    cut = partition(captured, hierarchical(plan_of(trained).tree.splits))
    for check in (
        check_provenance(trained),
        *check_graphs(captured, trained),
        *check_state(model, cut, trained),
    ):
        assert check.ok, check


def _bytes(init: str) -> Row:
    """What a transform of ResNet-50 allocates at the most, beside the bytes of the peers."""
    model = torchvision.models.resnet50()
    factory = torchvision.models.resnet50 if init.endswith("factory") else None
    inputs = (torch.empty(1, 3, 64, 64, device="meta"),)
    how: Any = init.partition(",")[0]
    with LiveBytes(_state(model)) as live:
        before = live.live
        trained = fxcollab.transform(
            model, splits=["layer2", "layer3"], init=how, factory=factory, interface=interface_of(model, inputs)
        )
    own = {id(tensor) for tensor in _state(model)}
    peers = sum(tensor.nbytes for tensor in _state(trained) if id(tensor) not in own)
    return {"bytes of the peers": peers, "peak beside the peers": round((live.peak - before) / peers, 3)}


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    found = function(*args)
    return found, time.perf_counter() - start
