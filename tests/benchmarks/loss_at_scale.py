"""Losses of large vocabularies: ``python -m tests.benchmarks.loss_at_scale``.

Forward and backward of four heads with 4,096 rows: the seconds, and the memory at the peak beside the inputs, as a
share of the logits of all heads. The naive formula, the same a chunk of rows at a time (each chunk's backward at
once), ours; and, from hidden states of 512, ours with 128k classes against ours of the whole logits. Each runs alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxcollab
from tests.benchmarks.speed.loss import naive

HEADS, WIDTH = 4, 512
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FIELDS = ("hidden", "weight")


def main() -> None:
    """Each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--more-classes", type=int, default=128256)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        _measure(arguments.case[0], arguments.case[1], int(arguments.case[2]), arguments.rows)
        return
    cases = [(how, name, arguments.classes) for name in TYPES for how in ("naive", "chunked", "ours")]
    cases += [(how, "bf16", arguments.more_classes) for how in ("hidden", "whole logits")]
    for how, name, classes in cases:
        command = [sys.executable, "-m", "tests.benchmarks.loss_at_scale", "--rows", str(arguments.rows)]
        done = subprocess.run(
            [*command, "--case", how, name, str(classes)], capture_output=True, text=True, check=False
        )
        said = done.stdout.strip() or f"{how} {name}: ended with {done.returncode} {done.stderr.strip()[-200:]}"
        print(said, flush=True)


def _measure(how: str, name: str, classes: int, rows: int) -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, y = TYPES[name], torch.randint(classes, (rows,), device=device)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    logits = HEADS * rows * classes * dtype.itemsize
    if how in ("hidden", "whole logits"):
        outputs: Any = tuple({"hidden": made(rows, WIDTH), "weight": made(classes, WIDTH)} for _ in range(HEADS))
        ours = fxcollab.CollaborativeLoss(logits=FIELDS if how == "hidden" else "logits")
        given = outputs if how == "hidden" else None
    else:
        outputs, given, ours = tuple(made(rows, classes) for _ in range(HEADS)), None, fxcollab.CollaborativeLoss()
    before, began = _reset(device), time.perf_counter()
    if how == "chunked":
        for start in range(0, rows, 256):
            part = slice(start, start + 256)
            (naive([z[part] for z in outputs], y[part]) * (len(y[part]) / rows)).backward()
    elif how == "whole logits":
        ours(tuple(torch.nn.functional.linear(head["hidden"], head["weight"]) for head in outputs), y).backward()
    else:
        (naive if how == "naive" else ours)(given or outputs, y).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, extra = time.perf_counter() - began, _peak(device) - before
    print(
        f"{how:13s} {name:8s} {HEADS} x {rows} x {classes}: {seconds:6.1f} s, peak {extra / 2**20:7.0f} MB beside "
        f"the inputs, {extra / logits:.2f}x the logits"
    )


def _reset(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
