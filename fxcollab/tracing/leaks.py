"""What a traced forward has put into caches outside of the model is taken out again.

A function under ``lru_cache``, or one with a dictionary of its own, would hand the proxies of a trace to the model.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx


@contextmanager
def purge_leaked_proxies() -> Iterator[list[weakref.ref[fx.Proxy]]]:
    """On leaving, take the proxies in the yielded list out of caches; put it around what restores the model."""
    proxies: list[weakref.ref[fx.Proxy]] = []
    try:
        yield proxies
    finally:
        purge_caches(proxies)


def purge_caches(proxies: Iterable[weakref.ref[fx.Proxy]]) -> None:
    """Remove what is left of proxies from dictionaries, lists, sets and caches of functions.

    Whatever lives is gone through where one is left, so let go of an error first: its frames hold them.
    """
    if any(reference() is not None for reference in proxies):
        gc.collect(1)  # frames that torch.fx asks for are in circles
    alive = [proxy for reference in proxies if (proxy := reference()) is not None]
    if not alive:
        return
    holders = tuple(gc.get_referrers(*alive))  # a list would be among the holders of tuples, and change
    _take_out_of(holders, alive)
    tuples = tuple(holder for holder in holders if type(holder) is tuple)
    if tuples:  # a tuple can't be changed; whatever caches it, can
        outer = (o for o in gc.get_referrers(*tuples) if isinstance(o, dict | list | functools._lru_cache_wrapper))
        _take_out_of(outer, tuples)


def _take_out_of(holders: Iterable[Any], values: Collection[object]) -> None:
    ids = set(map(id, values))
    for holder in holders:
        if holder is not values:
            _take_out(holder, ids)


def _take_out(holder: Any, ids: set[int]) -> None:
    if type(holder) in (dict, OrderedDict, defaultdict):
        for key in [key for key, value in holder.items() if id(value) in ids]:
            del holder[key]
    elif type(holder) in (list, deque):
        kept = [value for value in holder if id(value) not in ids]
        holder.clear()
        holder.extend(kept)
    elif type(holder) is set:
        for value in [value for value in holder if id(value) in ids]:
            holder.discard(value)
    elif isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
