"""Runs that are killed at random moments: what they were to write is old or new, and the next write leaves no litter.

    python -m tests.benchmarks.trust.kills --kills 300

Children are forked, so that a kill falls into the work, not into the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import fxcollab
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict, write_state_dict
from samples.training.in_memory import InMemory
from samples.training.recipe import Recipe
from samples.training.steps import Step
from samples.training.trainer import Epoch, Kept, Training, epochs


def _network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))


def _train_model(seed: int) -> fxcollab.CollabGraphModule:
    return fxcollab.transform(_network(seed), splits="0,1", seed=seed, init="copy-anyway")


def killed(work: Callable[[], object], after: float) -> bool:
    """Run some work in a child, and kill it after some seconds; whether it was still at work."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def of_transform(folder: Path, random_: random.Random, kills: int) -> int:
    """Kills ``save(force=True)``; how many fell into the work."""
    models = {seed: _train_model(seed) for seed in (1, 2)}
    states = {seed: {k: v.clone() for k, v in model.state_dict().items()} for seed, model in models.items()}
    target, hit, seed = folder / "run", 0, 2
    fxcollab.save(models[1], target)
    limit = 1.5 * min(_seconds(lambda: fxcollab.save(models[1], target, force=True)) for _ in range(3))
    for _ in range(kills):
        hit += killed(lambda: fxcollab.save(models[seed], target, force=True), random_.uniform(0, limit))  # noqa: B023
        found = load_state_dict(target / "weights.safetensors")
        whole = [s for s, state in states.items() if all(torch.equal(found[k], v) for k, v in state.items())]
        assert whole, "neither the old one nor the new one"
        fxcollab.load(target, _network(whole[0]))
        seed = 3 - whole[0]
        if random_.random() < 0.3:
            fxcollab.save(models[seed], target, force=True)
            assert os.listdir(folder) == ["run"], os.listdir(folder)  # noqa: PTH208
            seed = 3 - seed
    fxcollab.save(models[1], target, force=True)
    assert os.listdir(folder) == ["run"], os.listdir(folder)  # noqa: PTH208
    return hit


def of_prune(folder: Path, random_: random.Random, kills: int) -> int:
    """Kills the writing of one head, with and without a file that is there."""
    run, out = folder / "run", folder / "head.safetensors"
    fxcollab.save(_train_model(1), run)
    heads = [load_head(run, head) for head in range(4)]
    limit = 1.5 * min(_seconds(lambda: write_state_dict(heads[0], out, force=True)) for _ in range(3))
    hit = 0
    for number in range(kills):
        if random_.random() < 0.3:
            out.unlink(missing_ok=True)
        there, head = out.exists(), heads[number % 4]
        hit += killed(lambda: write_state_dict(head, out, force=True), random_.uniform(0, limit))  # noqa: B023
        assert out.exists() or not there, "the old one is gone"
        if out.exists():
            found = load_file(out)
            assert any(all(torch.equal(found[k], v) for k, v in head.items()) for head in heads), "it is broken"
    write_state_dict(heads[0], out, force=True)
    assert sorted(os.listdir(folder)) == ["head.safetensors", "run"], os.listdir(folder)  # noqa: PTH208
    return hit


def of_training(folder: Path, random_: random.Random, kills: int) -> int:
    """Kills a training of several epochs until it is done, again and again; its numbers are those of one run."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (64, 1, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 2, (64,), generator=generator)
    data, recipe = InMemory(images, labels, images, labels, 2), Recipe(6, 16)

    def train(file: Path) -> None:  # in children alone: autograd can't be forked once it has run
        model = torch.nn.Sequential(torch.nn.Flatten(), _network(3), torch.nn.Linear(64, 2))
        optimizer = recipe.optimizer(model.parameters())

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        before: list[Epoch] = []
        training, kept = Training((model,), _as_step(step), (optimizer,)), Kept(file, {"run": 1})
        found = list(epochs(training, data, recipe, 1, kept=kept, before=before.append))
        file.with_suffix(".json").write_text(json.dumps([epoch.loss for epoch in (*before, *found)]))

    def losses(file: Path) -> str:
        assert not killed(lambda: train(file), 60)
        return file.with_suffix(".json").read_text()

    expected, file, hit = losses(folder / "whole.pt"), folder / "run.pt", 0
    limit = _seconds(lambda: losses(folder / "other.pt"))
    for _ in range(kills):
        now = killed(lambda: train(file), random_.uniform(0, limit))
        hit += now
        if not now or random_.random() < 0.2:
            assert losses(file) == expected, "other numbers"
            assert not [name for name in os.listdir(folder) if "part" in name], os.listdir(folder)  # noqa: PTH208
            file.unlink()
    return hit


def _as_step(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    return step  # type: ignore[return-value]


def run(kills: int, seed: int) -> dict[str, int]:
    """Kill each kind of run so many times; how many kills fell into the work."""
    found = {}
    for work in (of_transform, of_prune, of_training):
        with tempfile.TemporaryDirectory() as folder:
            found[work.__name__] = work(Path(folder), random.Random(seed), kills)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"kills of each": options.kills, "into the work": run(options.kills, options.seed)}))
    sys.exit(0)
