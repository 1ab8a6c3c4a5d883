"""What patches and modes of torch use of a tracer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx, nn

from fxcollab._torch import pytree
from fxcollab.tracing.names import Names
from fxcollab.tracing.queries import ProxyQueries


class Recorder(Protocol):
    """What patches use of a tracer; ``notes`` has sentences about what the graph doesn't preserve."""

    names: Names
    queries: ProxyQueries
    notes: dict[str, None]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation."""

    def call_whole(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a leaf module; of any other run it."""

    def assign_buffer(self, module: nn.Module, name: str, value: Any) -> None:
        """Record an assignment to a buffer."""

    def proxy_of_state(self, tensor: Any) -> fx.Proxy | None:
        """The proxy of a tensor of the model; None for any other value."""

    def record_of_state(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Record what is computed from tensors of the model."""


def has_proxies(*values: Any) -> bool:
    """Whether there are proxies in nested values."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(values))
