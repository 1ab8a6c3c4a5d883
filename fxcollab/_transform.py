"""Transform: capture, partition and rewrite in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from unicodedata import normalize

import torch
from torch import nn

from fxcollab._torch import pytree
from fxcollab.arguments import checked
from fxcollab.codegen.branches import Recompute
from fxcollab.codegen.module import CollabGraphModule
from fxcollab.errors import CaptureError, ForwardError, PatternError, StateError, warn_caller
from fxcollab.functional import tensors_of
from fxcollab.limits import check_seed
from fxcollab.passes import AfterPass, CapturePass, PartitionPass, run_passes, training_passes
from fxcollab.patterns import AUTO, Fanouts, fanouts_to_choose, head_tree, is_made_by, split_names
from fxcollab.plan import RewriteOptions
from fxcollab.rewriting.init_rules import Init
from fxcollab.rewriting.outputs import EvalOutput
from fxcollab.rewriting.rewrite import SMALL_LEVELS_KEY
from fxcollab.sources.loaded import model_of, refuse_while_loading
from fxcollab.sources.source import Source, source_of
from fxcollab.splits.budget import Amount
from fxcollab.splits.choice import Choice
from fxcollab.splits.choose import choose_splits
from fxcollab.splits.nearest import with_nearest_splits
from fxcollab.tracing.capture import LIMITATIONS_KEY, Granularity
from fxcollab.tracing.examples import failures_on
from fxcollab.tracing.interface import ExampleInputs, Interface, interface_of
from fxcollab.tree import HeadTree, hierarchical


@checked
def transform(
    model: nn.Module | Callable[[], nn.Module],
    pattern: str = "hierarchical",
    splits: Sequence[str] | str | Choice = (),
    heads: int | None = None,
    fanouts: Fanouts | None = None,
    example_inputs: ExampleInputs | None = None,
    init: Init = "fresh",
    seed: int | None = None,
    rescale: bool = True,
    granularity: Granularity = "auto",
    *,
    factory: Callable[[], nn.Module] | None = None,
    source: Source | None = None,
    peers: str = "peers",
    interface: Interface | None = None,
    max_time: Amount | None = None,
    max_memory: Amount | None = None,
    recompute: Recompute | None = None,
    eval_output: EvalOutput = "head",
    after_pass: AfterPass | None = None,
    force: bool = False,
) -> CollabGraphModule:
    """Make a training model with several heads of ``model`` (paper, section 3.1).

    Its forward has the model's inputs. In train mode it returns a tuple of H outputs, head 0 first, each with the
    structure of the model's own output; in eval mode head 0's output alone. Trunk and head 0 are the model's own
    modules and tensors: training it trains ``model``.

    Args:
        model: any module on any device, meta included; a zero-argument factory of one; or a ``GraphModule``,
            which is not traced again.
        pattern: ``multi-instance`` (H instances, no split), ``simple`` (one split, H heads), ``hierarchical`` (K
            splits, a tree), ``ladder`` (K splits, K + 1 heads), or another that is registered; see
            `register_pattern`.
        splits: names, ordered along the data flow (default none); a string may list them with commas. A module's path
            cuts after its output, ``name@2`` after its second call, ``a+b`` at two values; other names are those of
            nodes. ``auto`` uses `choose_splits`, whose result can also be given. The plan and the summary say why a
            split was chosen.
        heads: H of ``simple`` and ``multi-instance`` (default 2).
        fanouts: branches at each split of ``hierarchical`` (default 2 each): ``(2, 3)``, or one number for each
            branch, ``(2, (2, 1))``; ``auto`` with ``splits="auto"`` and a budget, see `choose_splits`.
        example_inputs: tuple or dict (default None). Tensors in it are inputs of the graph, also for optional
            parameters; other values, such as ``use_cache=False``, are fixed. Needed only where the model has several
            inputs, or depends on values of an input whose shape can't be guessed.
        init: how peers start. ``fresh``: anew, by the factory where there is one, else by the modules' own
            ``reset_parameters``. ``finetune``: as copies of the given model's, except for every head's last layer.
            ``copy``: as copies, which raises where nothing behind the splits is random (``copy-anyway`` doesn't).
            ``{"fc": "fresh", "*": "copy"}``: by parameter, module or glob; the first that matches counts. Or
            ``callable(module, path)`` for each branch. What is frozen, with its buffers, and buffers that no state
            dict has are always copied.
        seed: the peers' initialisation is a function of it; by default ``torch.initial_seed()``.
        rescale: False leaves gradients unscaled at the splits (default True).
        granularity: ``auto`` opens only the modules that hold a split; ``op`` everything down to torch's layers.
        factory: makes models like ``model``, for ``init="fresh"`` where ``model`` is an instance (default None).
        source: where the model came from, for `save` (default None); known for importable factories.
        peers: the name of the module that has the other heads' state (default ``peers``).
        interface: that of an earlier capture, to be used again without examples (default None).
        max_time: the most FLOPs of a training step, as a ratio to the original's (default None); with
            ``splits="auto"``, as for `choose_splits`.
        max_memory: the highest peak of a step's memory, as such a ratio or a size (default None); likewise.
        recompute: ``heads`` to keep the activations of the trunk and of one branch at a time (default None): those of
            the others are computed again in the backward pass, which costs one more forward of what lies behind the
            splits. State in globals, in closures, or written through ``.data`` then changes twice.
        eval_output: what eval mode returns: ``head`` head 0's output, exactly as the original, and nothing else is
            computed; ``all`` the tuple; ``mean`` the mean of the heads' floating-point tensors. `all_heads` calls
            all heads in either mode.
        after_pass: ``callable(name, graph_module)``, called after the passes ``capture``, ``partition``, ``rewrite``
            and ``codegen`` with the module that each returned (default None); see `fxcollab.passes`.
        force: go on where there seems to be too little memory for the peers (default False).

    Returns:
        A ``GraphModule`` that trains like any module. `prune` returns the original from it.

    Raises:
        PatternError: pattern, splits, heads, fan-outs and budgets don't fit together.
        SplitError: a split can't be found or cut, or no choice keeps the budgets.
        CaptureError: an opened forward can't be traced; the hint names the nearest splits that work.
        StateError: the model has something named ``peers``, or a ``state_dict`` of its own; or it is sharded already,
            as by ``fully_shard``.
        LimitError: more heads or splits than are ever needed, or than there is memory for.
        The model is never changed by a failure.
    """
    names = splits.splits if isinstance(splits, Choice) else split_names(splits)
    refuse_while_loading("transform")
    automatic = names == (AUTO,)
    if isinstance(splits, Choice) and example_inputs is None:
        example_inputs = splits.example_inputs
    tree = None if automatic else _tree(splits, pattern, names, heads, fanouts)
    if not automatic and (max_time is not None or max_memory is not None):
        raise PatternError(
            "Named splits have no budget.",
            why="their costs are fixed",
            hint="use splits='auto' (--splits auto), or leave the budget out",
        )
    if not isinstance(model, nn.Module):
        factory, source = factory or model, source or source_of(model)
    model = model_of(model)
    _refuse_made(model)
    if any(isinstance(leaf, torch.Tensor) and leaf.is_quantized for leaf in pytree.tree_leaves(example_inputs)):
        raise CaptureError("An example input is quantised.", hint="give floats: the model quantises them itself")
    if tree is None:
        splits = choose_splits(
            model,
            example_inputs,
            fanouts=fanouts_to_choose(pattern, heads, fanouts),
            max_time=max_time,
            max_memory=max_memory,
            granularity=granularity,
            recompute=recompute,
        )
        tree = _tree(splits, pattern, splits.splits, heads, fanouts)
    chosen = splits.reason if isinstance(splits, Choice) else None
    seed = torch.initial_seed() if seed is None else check_seed(seed)
    peers = normalize("NFKC", peers)  # as Python does with names in code
    options = RewriteOptions(
        init=init, seed=seed, rescale=rescale, peers=peers, recompute=recompute, eval_output=eval_output
    )
    interface = interface or interface_of(model, example_inputs)
    how = CapturePass(tree.splits, example_inputs, granularity, interface)
    passes = training_passes(tree, how, options, factory, force, pattern=pattern, source=source, chosen=chosen)
    try:
        train_model = run_passes(passes, model, after_pass)
    except ForwardError as error:
        _check_example_inputs(model, interface, example_inputs)
        raise _with_way_out(error, model, how) from error.__cause__
    for sentence in train_model.meta[LIMITATIONS_KEY]:
        warn_caller(f"limitation: {sentence}")
    for sentence in train_model.meta[SMALL_LEVELS_KEY]:
        warn_caller(f"{sentence}: that saves hardly any work, or lets heads hardly differ (see `fxcollab splits`)")
    return train_model


def _refuse_made(model: nn.Module) -> None:
    """Raise a StateError for a training model, and for a model that torch has sharded or wrapped already."""
    if isinstance(model, CollabGraphModule) and model.name_of_peers:
        raise StateError(
            "The model is a training model already.",
            where=f"other heads live in {model.name_of_peers!r}",
            why="heads are made of a network that has one",
            hint="transform what it was made from: fxcollab.transform(fxcollab.original(train_model), ...)",
        )
    sharded = next((name for name, tensor in tensors_of(model).items() if hasattr(tensor, "device_mesh")), None)
    if sharded is not None or isinstance(model, nn.parallel.DistributedDataParallel):
        raise StateError(
            "The model is distributed already.",
            where=sharded or type(model).__qualname__,
            why="layers that are cloned belong to ranks and groups of their own",
            hint="transform first, then shard or wrap what it returns",
        )


def _with_way_out(error: ForwardError, model: nn.Module, how: CapturePass) -> ForwardError:
    """``error`` with a hint that names what works: another granularity, or the nearest splits."""
    if how.granularity == "op":
        error.hint = f"granularity 'auto' keeps modules whole that no split lies in; or {error.hint}"
        return error

    def attempt(*splits: str) -> None:
        run_passes([replace(how, splits=splits), PartitionPass(HeadTree(splits, (2,) * max(1, len(splits))))], model)

    return with_nearest_splits(error, how.splits, attempt)


def _tree(
    splits: Sequence[str] | str | Choice,
    pattern: str,
    names: tuple[str, ...],
    heads: int | None,
    fanouts: Fanouts | None,
) -> HeadTree:
    """The head tree of named splits, or of chosen ones, which have to fit the pattern."""
    if not isinstance(splits, Choice):
        return head_tree(pattern, names, heads, fanouts)
    chosen = splits.option.fanouts
    given = heads is not None or fanouts is not None
    planned = fanouts_to_choose(pattern, heads, fanouts) if given else chosen
    if planned not in (chosen, AUTO):
        raise PatternError(
            f"The splits were chosen for fan-outs {chosen}, not for {planned}.",
            hint=f"choose anew, choose_splits(model, fanouts={planned}), or leave heads and fan-outs out",
        )
    tree = hierarchical(names, chosen)
    if not is_made_by(pattern, tree):
        raise PatternError(
            f"The splits were chosen for fan-outs {chosen}, which are not those of pattern {pattern!r}.",
            hint="leave the pattern out, or name the splits",
        )
    return tree


def _check_example_inputs(model: nn.Module, interface: Interface, example_inputs: ExampleInputs | None) -> None:
    """Raise if not only the capture but the model itself fails on the example inputs."""
    if example_inputs is None:
        return
    for failure in filter(None, failures_on(model, interface, interface.values_of(model, example_inputs))):
        raise failure
