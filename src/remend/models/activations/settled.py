"""Parts of a block that no longer change run once; what they gave is replayed in the passes that follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class Settled:
    """Children of a block whose linear layers have all been visited: each runs once more and is then replayed.

    Without this every later group of the block would pay for the attention before it again. `written` keeps what the
    settled layers gave that write into the residual stream.
    """

    def __init__(self, block: nn.Module) -> None:
        self._linears = {c: {m for m in c.modules() if isinstance(m, nn.Linear)} for c in block.children()}
        self._given: dict[nn.Module, list[Any]] = {}
        self.written: dict[nn.Module, Tensor] = {}
        self.visited: set[nn.Module] = set()

    @contextmanager
    def at(self, batch: int) -> Iterator[None]:
        """Around the block's pass over one batch."""
        with ExitStack() as undo:
            for child, linears in self._linears.items():
                if not linears or not linears <= self.visited:
                    continue
                given = self._given.setdefault(child, [])
                if len(given) > batch:
                    child.forward = partial(_replay, given[batch])
                    undo.callback(delattr, child, "forward")
                else:
                    hook = child.register_forward_hook(lambda _m, _a, output, given=given: given.append(output))
                    undo.callback(hook.remove)
            yield


def _replay(output: Any, *_args: Any, **_keywords: Any) -> Any:
    return output
