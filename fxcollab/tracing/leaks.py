"""Proxies and fake tensors that the user's code has put into caches outside the model are removed.

A function under ``lru_cache``, or one with a dictionary of its own, would return them later.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from fxcollab._torch import FakeTensor, FakeTensorMode


@contextmanager
def purge_leaked_proxies() -> Iterator[list[weakref.ref[fx.Proxy]]]:
    """On leaving, remove the proxies in the yielded list from caches; enter it before what restores the model."""
    proxies: list[weakref.ref[fx.Proxy]] = []
    try:
        yield proxies
    finally:
        purge_caches(proxies)


class _Made(threading.local):
    """The modes that this thread has made: those of others are in use."""

    def __init__(self) -> None:
        self.modes: list[weakref.ref[FakeTensorMode]] = []


_MADE = _Made()


def watch_for_leaks(mode: FakeTensorMode) -> None:
    """Have the fake tensors of a mode removed from caches by `purge_leaked_tensors`."""
    _MADE.modes.append(weakref.ref(mode))


@contextmanager
def purge_leaked_tensors() -> Iterator[None]:
    """On leaving, remove fake tensors that were made meanwhile from caches; a decorator of what makes twins.

    A mode that isn't freed with its twin has tensors somewhere.
    """
    before, found = len(_MADE.modes), list[weakref.ref[Any]]()
    try:
        with _OLD_OBJECTS.apart():
            try:
                yield
            finally:
                found += _alive(_MADE.modes[before:])
                del _MADE.modes[before:]
    finally:
        purge_caches(found)


def _alive(modes: Sequence[weakref.ref[FakeTensorMode]]) -> list[weakref.ref[Any]]:
    """The fake tensors of modes that were not freed."""
    for generation in (1, 2):  # tracers and modules are in cycles of references
        if any(mode() is not None for mode in modes):
            gc.collect(generation)
    alive = {id(mode) for reference in modes if (mode := reference()) is not None}
    objects = gc.get_objects() if alive else []
    return [weakref.ref(one) for one in objects if type(one) is FakeTensor and id(one.fake_mode) in alive]


class _OldObjects:
    """Objects that the garbage collector need not look at, since they were there before: there may be millions."""

    def __init__(self) -> None:
        self._are_apart = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A context in which the collector leaves them alone, unless someone else has kept some apart, or `join`."""
        owns = not self._are_apart and gc.get_freeze_count() == 0
        if owns:
            gc.freeze()
            self._are_apart = True
        try:
            yield
        finally:
            if owns:
                self.join()

    def join(self) -> None:
        """Have it look at all objects again."""
        if self._are_apart:
            gc.unfreeze()
            self._are_apart = False


_OLD_OBJECTS = _OldObjects()


def purge_caches(values: Iterable[weakref.ref[Any]]) -> None:
    """Remove values that are still alive from dictionaries, lists, sets and caches of functions.

    If there are any, all live objects are searched. An error must be released before: its frames keep proxies alive.
    """
    if any(reference() is not None for reference in values):
        gc.collect(1)  # frames that torch.fx inspects are in reference cycles
    alive = [value for reference in values if (value := reference()) is not None]
    if not alive:
        return
    _OLD_OBJECTS.join()  # caches may be among them
    referrers = tuple(gc.get_referrers(*alive))  # not a list, which would refer to the tuples too, and be changed
    _remove(alive, referrers)
    tuples = tuple(referrer for referrer in referrers if type(referrer) is tuple)
    if tuples:  # these can't be changed, but the caches that they are in can
        outer = (o for o in gc.get_referrers(*tuples) if isinstance(o, dict | list | functools._lru_cache_wrapper))
        _remove(tuples, outer)


def _remove_entries(container: dict[Any, Any], ids: set[int]) -> None:
    items = list(container.items())
    found = [key for key, value in items if not ids.isdisjoint((id(key), id(value)))]
    try:
        for key in found:
            del container[key]
    except LookupError:  # a proxy as a key is equal to no other
        container.clear()
        container.update((key, value) for key, value in items if ids.isdisjoint((id(key), id(value))))


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
