"""Proxies and fake tensors that the user's code has put into caches outside the model are removed.

A function under ``lru_cache``, or one with a dictionary of its own, would return them later.
"""

from __future__ import annotations

import functools
import gc
import threading
import traceback
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fxcollab._torch import FakeTensor, FakeTensorMode


class _Watched(threading.local):
    """Proxies, and modes of fake tensors, that this thread has made: those of others are in use."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Any]] = []


_WATCHED = _Watched()


def watch(value: Any) -> None:
    """Have a proxy, or the fake tensors of a mode, removed from caches by `purge_leaks`."""
    _WATCHED.references.append(weakref.ref(value))


@contextmanager
def purge_leaks() -> Iterator[None]:
    """On leaving, remove proxies and fake tensors that were made meanwhile from caches.

    A mode that isn't freed with its twin has tensors somewhere. The frames of an error, which keep what they made
    alive, lose their variables; their lines are still shown.
    """
    before = len(_WATCHED.references)
    try:
        with _old_objects_frozen():
            try:
                yield
            except BaseException as error:
                _clear_frames(error)
                raise
            finally:
                leaked = _alive(_WATCHED.references[before:])
    finally:
        del _WATCHED.references[before:]
        if leaked:
            gc.unfreeze()  # caches may be among the old objects
            _remove_from_caches(leaked)


_FROZEN = threading.Lock()
"""Held by the outermost call that lets the garbage collector leave alone what was there before."""


@contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """The garbage collector need not look at what was there before: there may be millions of objects."""
    owns = _FROZEN.acquire(blocking=False)
    frozen = owns and gc.get_freeze_count() == 0  # which counts them one by one
    if frozen:
        gc.freeze()
    try:
        yield
    finally:
        if frozen:
            gc.unfreeze()
        if owns:
            _FROZEN.release()


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)  # but for those that are running
        for frame, _ in traceback.walk_tb(error.__traceback__):
            frame.f_locals  # noqa: B018 (a dict of variables that somebody has read is brought up to date)
        error = error.__cause__


def _alive(references: Iterable[weakref.ref[Any]]) -> list[Any]:
    """The proxies that were not freed, and the fake tensors of modes that were not."""
    for generation in (1, 2):  # frames that torch.fx inspects, tracers and modules are in cycles of references
        if any(reference() is not None for reference in references):
            gc.collect(generation)
    alive = [value for reference in references if (value := reference()) is not None]
    modes = {id(value) for value in alive if type(value) is FakeTensorMode}  # not `isinstance`, which asks a proxy
    tensors = (one for one in gc.get_objects() if type(one) is FakeTensor) if modes else ()
    return [one for one in alive if id(one) not in modes] + [one for one in tensors if id(one.fake_mode) in modes]


def _remove_from_caches(values: Collection[object]) -> None:
    """Remove values from dictionaries, lists, sets and caches of functions; all live objects are searched."""
    referrers = tuple(gc.get_referrers(*values))  # not a list, which would refer to the tuples too, and be changed
    _remove(values, referrers)
    tuples = tuple(referrer for referrer in referrers if type(referrer) is tuple)
    if tuples:  # these can't be changed, but the caches that they are in can
        outer = (o for o in gc.get_referrers(*tuples) if isinstance(o, dict | list | functools._lru_cache_wrapper))
        _remove(tuples, outer)


def _remove(values: Collection[object], containers: Iterable[Any]) -> None:
    ids = set(map(id, values))
    for container in containers:
        if container is values:
            continue
        if type(container) in (dict, OrderedDict, defaultdict):
            _remove_entries(container, ids)
        elif type(container) in (list, deque):
            kept = [value for value in container if id(value) not in ids]
            container.clear()
            container.extend(kept)
        elif type(container) is set:
            for value in [value for value in container if id(value) in ids]:
                container.discard(value)
        elif isinstance(container, functools._lru_cache_wrapper):
            container.cache_clear()


def _remove_entries(container: dict[Any, Any], ids: set[int]) -> None:
    items = list(container.items())
    found = [key for key, value in items if not ids.isdisjoint((id(key), id(value)))]
    try:
        for key in found:
            del container[key]
    except LookupError:  # a proxy as a key is equal to no other
        container.clear()
        container.update((key, value) for key, value in items if ids.isdisjoint((id(key), id(value))))
