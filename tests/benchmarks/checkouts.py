"""This checkout beside another one: ``python -m tests.benchmarks.checkouts --other DIR``.

Times of capture and transform of large models on meta, and the CPU time of `save` beside that of writing the same
tensors alone. Every measurement is a process of its own,
in turns; the least of ``--times`` is told. ``DIR`` may be any earlier commit: ``git worktree add DIR COMMIT``.

A line a case goes to ``checkouts.jsonl`` in ``--results``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.rows import Row, measured

HERE = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

MODELS = {
    "resnet50": ("torchvision.models.resnet50()", ["layer2", "layer3"]),
    "vit_b_16": (
        "torchvision.models.vit_b_16()",
        ["encoder.layers.encoder_layer_5", "encoder.layers.encoder_layer_8"],
    ),
    "swinv2_cr_giant_224": ("timm.create_model('swinv2_cr_giant_224')", ["stages.0", "stages.2"]),
    "llama, 80 layers": (
        "transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=80, use_cache=False))",
        ["model.layers.39", "model.layers.59"],
    ),
}

TRANSFORM = """
import gc, time, warnings
import torch
{imports}
import fxcollab
torch.set_num_threads(2)
warnings.simplefilter("ignore")
with torch.device("meta"):
    model = {build}
    inputs = {inputs}
gc.collect()
start = time.perf_counter()
fxcollab.capture(model, {splits}, inputs)
captured = time.perf_counter()
fxcollab.transform(model, "hierarchical", {splits}, example_inputs=inputs, seed=0)
print(captured - start, time.perf_counter() - captured)
"""

SAVE = """
import tempfile, time, warnings
import safetensors.torch, torch, torchvision
import fxcollab
torch.set_num_threads(2)
warnings.simplefilter("ignore")
train_model = fxcollab.transform(torchvision.models.resnet50, "hierarchical", ["layer2", "layer3"], seed=0)
with tempfile.TemporaryDirectory() as folder:
    state = dict(train_model.state_dict())
    start = time.process_time()
    safetensors.torch.save_file(state, folder + "/weights.safetensors")
    written = time.process_time()
    fxcollab.save(train_model, folder + "/out")
    print(time.process_time() - written, written - start)
"""


def main() -> None:
    """Measure what isn't in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, metavar="DIR")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    folders = {"this": HERE, "the other": arguments.other}

    def measure(name: str) -> Row:
        code, names = (SAVE, ("save", "write")) if name == "save" else (_transform(name), ("capture", "transform"))
        turns = [{which: _seconds(code, folder) for which, folder in folders.items()} for _ in range(arguments.times)]
        return {
            which: {"commit": _commit(folder)}
            | {name: round(min(turn[which][i] for turn in turns), 3) for i, name in enumerate(names)}
            for which, folder in folders.items()
        }

    measured(arguments.results / "checkouts.jsonl", "checkouts", [(name,) for name in (*MODELS, "save")], measure)


def _transform(name: str) -> str:
    build, splits = MODELS[name]
    tokens = name.startswith("llama")
    inputs = "{'input_ids': torch.zeros(1, 128, dtype=torch.long)}" if tokens else "(torch.zeros(2, 3, 224, 224),)"
    library = build.split(".")[0]
    return TRANSFORM.format(imports=f"import {library}", build=build, splits=splits, inputs=inputs)


def _seconds(code: str, folder: Path) -> list[float]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
    return [float(number) for number in run.stdout.split()[-2:]]


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
