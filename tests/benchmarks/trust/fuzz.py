"""Mutated artifacts through load, prune, diff and verify: each ends as it should, or with an error of fxcollab's own.

    python -m tests.benchmarks.trust.fuzz --cases 5000 --seed 0

Cases run in processes of their own with a limit of memory and time. A case is a fault where anything but an
`FxCollabError` is raised, the process hangs or dies, what is loaded differs from what was saved, a file is opened for
writing elsewhere, or a program or a stranger's code is run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fxcollab
from fxcollab.io.artifact import load_head
from fxcollab.io.weights import load_state_dict
from fxcollab.sources.load import load as load_source
from fxcollab.sources.source import Source
from tests.benchmarks.trust import mutations

SECONDS, BYTES = 20, 3 << 30
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())
"""
STRANGER = "open('RAN', 'w').write('ran')\nfrom model import Net\n"


class Ran(BaseException):
    """Something was run, or written elsewhere."""


def base(root: Path) -> Path:
    """A saved training model in ``root/run``, made as ``root/case/run`` from a file beside it."""
    case = root / "case"
    (case / "model.py").write_text(NET)
    (case / "stranger.py").write_text(STRANGER)
    loaded = load_source(Source.parse(str(case / "model.py")))
    train_model = fxcollab.transform(
        loaded.model,
        splits="a,b",
        seed=1,
        source=loaded.source,
        factory=loaded.factory,
        example_inputs=torch.ones(2, 3),
    )
    return fxcollab.save(train_model, case / "run").rename(root / "run")


def carry_out(root: Path, number: int, seed: int) -> str:
    """One case: how it ended, for a count of endings.

    Raises:
        BaseException: a fault.
    """
    random_ = random.Random(f"{seed}/{number}")
    folder = root / "case" / "run"
    for old in folder.parent.iterdir():
        if old.suffix != ".py":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(root / "run", folder)
    saved = load_state_dict(root / "run" / "weights.safetensors")
    which = random_.randrange(10)
    if which < 7:  # more for plans and weights than for checkpoints
        random_.choice(mutations.IN_FOLDER)(folder, random_)
        weights = None
    elif which < 9:
        weights = root / "case" / "other.safetensors"
        mutations.checkpoint(saved, weights, random_)
    else:
        return _ending(lambda: _pruned(saved, mutations.state(saved, random_)))
    model = load_source(Source.parse(str(root / "case" / "model.py"))).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ends = [
        _ending(lambda: _loaded(folder, saved, weights)),
        _ending(lambda: _loaded(folder, saved, weights, model)),
        _ending(lambda: _heads(folder, saved, weights)),
    ]
    if random_.random() < 0.1:  # the slow part
        ends.append(_command(root, folder, random_))
    if ends[1] != "fine":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "half loaded"
    return "fine" if set(ends) <= {"fine"} else next(end for end in ends if end != "fine")


def _ending(call: Callable[[], None]) -> str:
    try:
        call()
    except fxcollab.FxCollabError as error:
        assert error.what and len(str(error)) < 20_000
        assert all(c.isprintable() or c in "\n\t" for c in str(error)), ascii(str(error))
        return type(error).__name__
    return "fine"


def _loaded(folder: Path, saved: dict[str, Any], weights: Path | None, model: Any = None) -> None:
    train_model = fxcollab.load(folder, model, weights=weights, trust_source=False)
    state = train_model.state_dict()
    assert list(state) == list(saved), "loaded with other names"
    if weights is None:
        assert all(_equal(state[name], saved[name]) for name in saved), "loaded with other values"
    fxcollab.diff(train_model).to_json()
    if model is None and weights is None:
        assert fxcollab.verify(train_model.root, train_model), "the proof fails"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _heads(folder: Path, saved: dict[str, Any], weights: Path | None) -> None:
    for head in range(4):
        found = load_head(folder, head, weights=weights)
        expected = fxcollab.prune_state_dict(saved, head)
        assert sorted(found) == sorted(expected), "pruned to other names"
        given = load_state_dict(weights) if weights else None
        for name, value in found.items():
            own = [key for key in saved if saved[key] is expected[name]]
            wanted = given[own[0]] if given and own[0] in given else expected[name]
            assert weights or _equal(value, expected[name]), "pruned to other values"
            assert not given or _equal(value, wanted), "a head with values of another"


def _pruned(saved: dict[str, Any], changed: dict[str, Any]) -> None:
    for head in range(4):
        found = fxcollab.prune_state_dict(changed, head)
        for name, value in fxcollab.prune_state_dict(saved, head).items():
            key = next(key for key in saved if saved[key] is value)
            of_peer = key.startswith("peers.") and name in found  # the trunk's are known by a model alone
            assert not of_peer or found[name].shape == value.shape, "a head with other shapes"
            lost = key.startswith("peers.") and key not in changed and name in found
            assert not (lost and found[name] is changed.get(name)), f"a head with {name} of head 0"


def _command(root: Path, folder: Path, random_: random.Random) -> str:
    """A command of the command line on the folder, in this process."""
    from fxcollab_cli.app import app
    from fxcollab_cli.console import run

    arguments: tuple[str, ...] = ()
    command = random_.choice(("diff", "verify", "prune", "costs", "splits", "transform"))
    if command == "prune":
        arguments = ("-o", str(root / "case" / "head.safetensors"))
    elif command == "transform":
        arguments = ("-o", str(root / "case" / "again"))
    sys.argv = ["fxcollab", command, str(folder), *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(app)
    assert code in (0, 2), (code, out.getvalue()[-500:], err.getvalue()[-500:])
    assert "--debug shows" not in err.getvalue() and "Traceback" not in err.getvalue(), err.getvalue()[-800:]
    return "fine" if code == 0 else "refused"


def _watch(root: Path) -> None:
    """Raise where a program is run, or a file is opened for writing outside of the case's own folder."""
    allowed = (str(root / "case"), os.environ.get("XDG_STATE_HOME", "?"), "/dev/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            raise Ran(f"{event} {arguments}")
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            path, writes = os.path.realpath(arguments[0]), arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not path.startswith(allowed) and "__pycache__" not in path and "torchinductor" not in path:
                raise Ran(f"opened {path}")

    sys.addaudithook(hook)


def _work(root: Path, numbers: list[int], seed: int, pipe: int) -> None:
    """Carry out cases in this process, which has limits, and tell of each."""
    os.chdir(root / "case")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    _watch(root)
    warnings.simplefilter("ignore")
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, which others may use
        try:
            ended = carry_out(root, number, seed)
        except BaseException as error:
            ended = f"FAULT {''.join(traceback.format_exception(error))[-3000:]}"
        if (root / "case" / "RAN").exists() or (root / "RAN").exists():
            ended = "FAULT a stranger's code was run"
        os.write(pipe, json.dumps([number, ended]).encode() + b"\n")
    signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(cases: int, seed: int, each: int = 100) -> Iterator[tuple[int, str]]:
    """The number of every case, with how it ended; faults begin with ``FAULT``."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        (root / "case").mkdir()
        base(root)
        waiting = list(range(cases))
        while waiting:
            batch, done = waiting[:each], []
            read, write = os.pipe()
            child = os.fork()
            if not child:
                os.close(read)
                _work(root, batch, seed, write)
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as lines:
                for line in lines:
                    number, ended = json.loads(line)
                    done.append(number)
                    yield number, ended
            status = os.waitpid(child, 0)[1]
            if status:
                died = next(number for number in batch if number not in done)
                done.append(died)
                signal_ = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
                yield died, f"FAULT {'it hangs' if signal_ == signal.SIGPROF else f'the process died: {status}'}"
            waiting = [number for number in waiting if number not in done]


def main() -> None:
    """Run, and print how many cases ended how; exits with 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ends: collections.Counter[str] = collections.Counter()
    for number, ended in fuzz(options.cases, options.seed):
        ends[ended.partition(" ")[0]] += 1
        if ended.startswith("FAULT"):
            print(f"case {number}: {ended}", file=sys.stderr, flush=True)
    print(json.dumps({"cases": options.cases, "seed": options.seed, "faults": ends.pop("FAULT", 0), "ends": ends}))
    sys.exit(ends["FAULT"] > 0)


if __name__ == "__main__":
    main()
