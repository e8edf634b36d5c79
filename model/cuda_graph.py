"""Steps of a training that cost the host next to nothing: on a GPU, replays of one captured CUDA graph.

A small network's step is some three hundred kernels of a few microseconds each, and launching one takes the host about
as long. A graph launches them all at once. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
Not measured on a GPU yet.
"""

import warnings
from collections.abc import Callable

import torch

Step = Callable[[], None]

WARM_UP_STEPS = 3
"""Steps that run one by one first: they create the optimizer's state, and cuDNN and cuBLAS choose and allocate."""


def graphed_step(step: Step, device: torch.device, generator: torch.Generator) -> Step:
    """A function that does what ``step`` does, each time it is called.

    Args:
        step: reads its inputs from tensors on the device and leaves its results in tensors there, without
            involving the host; it must launch the same work each time.
        device: on the CPU, ``step`` itself is returned.
        generator: whose random numbers ``step`` draws.
    """
    return _replayed_on_cuda(step, device, generator) if device.type == "cuda" else step


def _replayed_on_cuda(step: Step, device: torch.device, generator: torch.Generator) -> Step:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph: torch.cuda.CUDAGraph | None = None
    calls = 0

    def on_side_stream() -> None:
        """One step on another stream than the default one, which no graph can be captured from."""
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)

    def run() -> None:
        nonlocal graph, calls
        calls += 1
        if calls == WARM_UP_STEPS + 1:
            graph = _capture(step, side, generator)
        if graph is None:
            on_side_stream()
        else:
            graph.replay()

    return run


def _capture(step: Step, stream: torch.cuda.Stream, generator: torch.Generator) -> torch.cuda.CUDAGraph | None:
    """The step as a graph; None, with a warning, if it holds something that cannot be captured.

    Capturing runs nothing: a training goes on from the same state either way.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        warnings.warn(f"training steps run one by one, which may be slow: no CUDA graph: {text}", stacklevel=2)
        return None
    return graph
