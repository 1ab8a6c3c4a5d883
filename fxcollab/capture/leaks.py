"""What a traced forward has put into caches outside of the model is taken out again.

A function under ``lru_cache``, or one with a dictionary of its own, would hand the proxies of a trace to the model.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx


@contextmanager
def proxies_taken_out() -> Iterator[list[weakref.ref[fx.Proxy]]]:
    """On leaving, take the proxies in the yielded list out of caches; put it around what restores the model."""
    proxies: list[weakref.ref[fx.Proxy]] = []
    try:
        yield proxies
    finally:
        _take_out_of_caches(proxies)


def _take_out_of_caches(proxies: Iterable[weakref.ref[fx.Proxy]]) -> None:
    """Remove what is left of proxies from dictionaries, lists, sets and caches of functions."""
    alive = [proxy for reference in proxies if (proxy := reference()) is not None]
    if not alive:
        return
    ids = {id(proxy) for proxy in alive}
    for holder in tuple(gc.get_referrers(*alive)):  # a list would be among the holders of tuples, and change
        if holder is not alive:
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
    elif type(holder) is tuple:
        for outer in gc.get_referrers(holder):  # a tuple can't be changed; whatever caches it, can
            if isinstance(outer, dict | list | functools._lru_cache_wrapper):
                _take_out(outer, {id(holder)})
