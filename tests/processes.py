"""Jobs in several processes of one gloo group; starting these takes longest, so that all jobs share them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

Saved = Iterator[tuple[str, Any]]
"""Names and values, for the test."""
Jobs = Mapping[str, Callable[[int], Saved]]
"""By name; each takes the rank. They are functions of a module, for they go to other processes."""
FOLDER = "FXCOLLAB_TEST_FOLDER"
"""The variable of the environment that has a folder for a job's files."""


def saved_by(jobs: Jobs, processes: int, folder: Path) -> Callable[[str], list[Any]]:
    """Run jobs, one after the other. Gives what they saved under ``job`` or ``job/name``, rank by rank."""
    # Forked off one server that has imported what takes long; it has used no threads.
    imported = ["fxcollab", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"]
    multiprocessing.set_forkserver_preload(imported)
    arguments = (jobs, processes, str(folder))
    torch.multiprocessing.start_processes(_work, arguments, nprocs=processes, start_method="forkserver")

    def load(name: str) -> list[Any]:
        job, _, value = name.partition("/")
        if (folder / f"{job}.error").exists():
            pytest.fail((folder / f"{job}.error").read_text())
        return [torch.load(folder / f"{job}.{value}.{rank}.pt") for rank in range(processes)]

    return load


def _work(rank: int, jobs: Jobs, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ[FOLDER] = folder
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    try:
        for name, job in jobs.items():
            try:
                for value_name, value in job(rank):
                    torch.save(value, Path(folder) / f"{name}.{value_name}.{rank}.pt")
            except Exception:  # whatever it is, the test that asks for the job shows it
                (Path(folder) / f"{name}.error").write_text(traceback.format_exc())
    finally:
        dist.destroy_process_group()
