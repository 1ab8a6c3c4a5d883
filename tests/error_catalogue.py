"""The catalogue of errors: a page made from the classes, with an example of each that the command line gives.

python -m tests.error_catalogue > samples/errors.md
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from fxcollab_cli.app import app
from fxcollab_cli.console import run
from safetensors.torch import load_file, save_file

import fxcollab
from fxcollab import errors

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    def model():
        return Net()
"""
ASKS = "return self.c(self.b(self.a(x))) if x.tolist() else x"
SIZES = "return self.c(self.b(self.a(x))) * (2 if x.dim() == 3 else 1)"
RETURNS = "return self.c(self.b(self.a(x)))"
MADE = "fxcollab transform model.py --splits a"
FAILED_PROOF = """
from fxcollab.proof.report import Check, Report
Report((Check("outputs are equal", False, "they differ by up to 2"),)).raise_if_failed()
"""
HEAD = """# Errors

Every error of fxcollab has a code that stays the same: the command line prints it, in Python it is `error.code`. This
page is made from the classes in `fxcollab/errors.py` by `python -m tests.error_catalogue`; tests run its examples.
What the option parser refuses (unknown options, values that are no numbers) has no code; FXC000 was not foreseen.
"""
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "FXC001": (f"{MADE} --input words",),
    "FXC002": ("fxcollab transform asks.py:Net --splits b",),
    "FXC003": (
        "fxcollab transform asks.py:Sizes --splits a --input 2x3",
        """python -c 'import fxcollab, torch; fxcollab.load("asks_collab")(torch.ones(2, 4, 3))'""",
    ),
    "FXC004": ("fxcollab transform model.py --splits d",),
    "FXC005": ("fxcollab transform model.py --splits a --fanouts 2,2",),
    "FXC006": (
        MADE,
        "python single.py",
        "fxcollab prune model_collab --weights single.safetensors -o head.safetensors",
    ),
    "FXC007": ("fxcollab transform modle.py --splits a",),
    "FXC008": ("fxcollab verify .",),
    "FXC009": ("fxcollab transform model.py --splits a -o model.py --force",),
    "FXC010": (MADE, "cp -r . ../copy", "fxcollab verify ../copy/model_collab"),
    "FXC011": (f"{MADE} --pattern simple --heads 1000000",),
    "FXC012": ("python -c 'import fxcollab; fxcollab.CollaborativeLoss(beta=2)'",),
    "FXC013": ("python check.py",),
    "FXC014": (MADE, "fxcollab diff model_collab -o graph.pdf"),
    "FXC015": (MADE, "truncate -s 200 model_collab/weights.safetensors", "fxcollab verify model_collab"),
    "FXC017": ("python -c 'import fxcollab; fxcollab.save(None, 5)'",),
    "FXC016": (MADE, "python lose_one.py", "fxcollab prune model_collab --weights lost.safetensors --head 1 -o x"),
}
"""The commands, the last of which gives the error; none where the command line can't give it."""


def kinds() -> Iterator[type[errors.FxCollabError]]:
    """All kinds of errors that have a code, in the order of the codes."""
    found = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.FxCollabError)
    ]
    return iter(sorted(found, key=lambda kind: kind.code))


def example(code: str) -> str:
    """What the last command of an example says on stderr, in an empty folder."""
    Path("model.py").write_text(textwrap.dedent(NET))
    net = textwrap.dedent(NET)
    Path("asks.py").write_text(net.replace(RETURNS, ASKS) + net.replace("Net", "Sizes").replace(RETURNS, SIZES))
    said = ""
    for command in EXAMPLES[code]:
        said = _run(shlex.split(command))
    return said.replace(f"{Path.cwd()}/", "").replace(f"{Path.cwd().parent}/", "../")


def _run(words: list[str]) -> str:
    match words:
        case "fxcollab", *_:
            sys.argv = words
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                run(app)
            return said.getvalue()
        case "cp", "-r", old, new:
            shutil.copytree(old, new)
        case "truncate", _, size, file:
            os.truncate(file, int(size))
        case "python", "single.py":
            fxcollab.io.weights.write_state_dict(fxcollab.original(_made()).state_dict(), Path("single.safetensors"))
        case "python", "lose_one.py":
            state = load_file("model_collab/weights.safetensors")
            del state["peers.b1.c.weight"]
            save_file(state, "lost.safetensors")
        case "python", "check.py":
            return _error_of(FAILED_PROOF)
        case "python", "-c", code:
            return _error_of(code)
    return ""


def _error_of(code: str) -> str:
    try:
        exec(code)
    except errors.FxCollabError as error:
        return "".join(traceback.format_exception_only(error))
    return ""


def _made() -> fxcollab.CollabGraphModule:
    return fxcollab.load("model_collab")


def page(examples: Mapping[str, str]) -> str:
    """The page, with what the examples said."""
    parts = [HEAD]
    for kind in kinds():
        parts.append(
            f"## {kind.code}: {kind.__name__}\n\n{inspect.cleandoc(kind.__doc__ or '').partition(chr(10))[0]}"
        )
        parts.append(f"**Remedy.** {kind.remedy}")
        if EXAMPLES.get(kind.code):
            commands = "\n".join(f"$ {command}" for command in EXAMPLES[kind.code])
            parts.append(f"```console\n{commands}\n{examples[kind.code].strip()}\n```")
    return "\n\n".join(map(str.strip, parts)) + "\n"


def _in_empty_folder(code: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder).resolve() / "inner"
        inner.mkdir()
        with contextlib.chdir(inner):
            return example(code)


if __name__ == "__main__":
    sys.stdout.write(page({code: _in_empty_folder(code) for code in EXAMPLES}))
