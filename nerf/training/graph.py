"""A training step's forward and backward as CUDA graphs: one launch instead of hundreds.

A small batch keeps a GPU busy for less time than Python needs to launch its kernels. A CUDA graph
records the kernels of one call, with the addresses of their tensors, and launches all of them
again at once. So the shapes must be the same, nothing may be read on the host, and inputs are
copied to where the recorded ones lay. Random numbers are drawn outside.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")

# Calls with the same shapes that run eagerly before they are recorded: libraries allocate what they
# need, and shapes that soon change are not worth recording.
WARM_UP = 4
MAX_GRAPHS = 24  # of a run; further shapes run eagerly


class StepGraphs:
    """Calls a function that leaves gradients, recorded as one CUDA graph per kind of its inputs.

    module: its parameters get gradients; all of them are set at every call. enabled: False: every
    call is eager, as on a CPU. If recording fails, ``log`` gets one line, and from then on every
    call is eager.
    """

    def __init__(self, module: nn.Module, log: Callable[[str], None], *, enabled: bool) -> None:
        self.parameters, self.log, self.enabled = list(module.parameters()), log, enabled
        self._graphs: dict[Any, _Recorded] = {}
        self._calls: dict[Any, int] = {}  # eager ones, by kind
        self._pool: Any = None  # memory that all graphs share: only one of them runs at a time
        self._stream: torch.cuda.Stream | None = None

    def run(self, function: Callable[[Any], T], inputs: Any, kind: Any = None) -> T:
        """function(inputs): its result, and gradients in the parameters, if possible by a graph.

        inputs: tensors in tuples, the only ones that change from call to call. kind: what else the
        call depends on, hashable. A result from a graph lives until the next call.
        """
        if not self.enabled:
            return function(inputs)
        tensors, structure = tree_flatten(inputs)
        kind = (kind, str(structure), *(_signature(tensor) for tensor in tensors))
        if kind in self._graphs:
            return self._graphs[kind].replay(tensors)
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        if calls <= WARM_UP or len(self._graphs) >= MAX_GRAPHS:
            return self._eager(function, inputs)
        try:
            self._graphs[kind] = self._record(function, tensors, structure)
        except Exception as error:
            self.enabled = False
            _explain(error, self.log)
            return function(inputs)
        return self._graphs[kind].replay(tensors)

    def _eager(self, function: Callable[[Any], T], inputs: Any) -> T:
        """function(inputs) on the stream on which it will be recorded, as recording requires."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = function(inputs)
        here.wait_stream(self._stream)
        return result

    def _record(self, function: Callable[[Any], Any], tensors: list, structure: Any) -> "_Recorded":
        own = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
        for parameter in self.parameters:
            parameter.grad = None  # so that backward writes gradients instead of adding to old ones
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = function(tree_unflatten(own, structure))
        self._pool = self._pool or graph.pool()
        gradients = [parameter.grad for parameter in self.parameters]
        return _Recorded(graph, own, result, self.parameters, gradients)


class FunctionGraphs:
    """Calls a differentiable function of one tensor by two CUDA graphs, one of them its gradient's.

    enabled, log: as of ``StepGraphs``. What the function reads besides its input, such as frozen
    weights, must stay where it lies. A result lives until the next call with the same shape, and so
    does what a backward pass needs: that has to come first.
    """

    def __init__(self, log: Callable[[str], None], *, enabled: bool) -> None:
        self.log, self.enabled = log, enabled
        self._graphs: dict[Any, Callable[[Tensor], Any]] = {}
        self._calls: dict[Any, int] = {}  # eager ones, by kind

    def run(self, function: Callable[[Tensor], T], x: Tensor) -> T:
        """function(x), by graphs where x needs a gradient and its shape comes often."""
        if not self.enabled or not (x.requires_grad and torch.is_grad_enabled()):
            return function(x)
        kind = _signature(x)
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        if kind not in self._graphs and (calls <= WARM_UP or len(self._graphs) >= MAX_GRAPHS):
            return function(x)
        if kind not in self._graphs:
            try:
                sample = x.detach().clone().requires_grad_()
                self._graphs[kind] = torch.cuda.make_graphed_callables(function, (sample,))
            except Exception as error:
                self.enabled = False
                _explain(error, self.log)
                return function(x)
        return self._graphs[kind](x)


def _explain(error: Exception, log: Callable[[str], None]) -> None:
    """Say why kernels could not be recorded, which can fail in any way: training must not.

    Raises an OutOfMemoryError again: smaller pieces may fit.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    log(f"CUDA graphs are not used ({reason}); training continues without them and is slower")


class _Recorded:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: Any,
        inputs: list,
        result: Any,
        parameters: list[nn.Parameter],
        gradients: list[Tensor | None],
    ) -> None:
        self.graph, self.inputs, self.result = graph, inputs, result
        self.parameters, self.gradients = parameters, gradients

    def replay(self, tensors: list) -> Any:
        """Copy the inputs in, launch the kernels, and give parameters this graph's gradients."""
        for own, new in zip(self.inputs, tensors, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.result


def _signature(value: Any) -> Any:
    """What must be equal for a graph to be used again."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return value
