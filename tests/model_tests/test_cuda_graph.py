"""The order of warm-up, capture and replay, with a stand-in for CUDA: what really runs on a GPU is not shown here."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from model import cuda_graph as replay
from model.cuda_graph import WARM_UP_STEPS, graphed_step

GPU = torch.device("cuda", 0)


class FakeCuda:
    """Notes what is asked of CUDA. In a capture a step is recorded, not run; a replay runs what was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.failure = failure
        cuda = self

        class Stream:
            def __init__(self, *_: Any) -> None:
                pass

            def wait_stream(self, _: Any) -> None:
                cuda.log.append("wait")

        class Graph:
            def register_generator_state(self, _: torch.Generator) -> None:
                cuda.log.append("generator")

            def replay(self) -> None:
                cuda.log.append("replay")

        @contextmanager
        def graph(_: Graph, stream: Stream, capture_error_mode: str) -> Any:
            cuda.capturing = True
            yield
            cuda.capturing = False
            if cuda.failure:
                raise cuda.failure
            cuda.log.append("captured")

        @contextmanager
        def stream(_: Stream) -> Any:
            yield

        for name, value in {
            "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream,
            "current_stream": lambda _: Stream(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def step(self) -> None:
        self.log.append("recorded" if self.capturing else "ran")


def test_the_cpu_runs_the_very_step() -> None:
    def step() -> None: ...

    assert graphed_step(step, torch.device("cpu"), torch.Generator()) is step


def test_a_few_steps_run_then_one_is_captured_and_replayed_for_every_further_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    run = graphed_step(cuda.step, GPU, torch.Generator())
    for _ in range(WARM_UP_STEPS):
        run()
    assert cuda.log == ["wait", "ran", "wait"] * WARM_UP_STEPS
    cuda.log.clear()
    for _ in range(3):
        run()
    assert cuda.log == ["generator", "recorded", "captured", "replay", "replay", "replay"]


def test_what_cannot_be_captured_runs_step_by_step_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore"))
    run = graphed_step(cuda.step, GPU, torch.Generator())
    for _ in range(WARM_UP_STEPS):
        run()
    with pytest.warns(UserWarning, match="no CUDA graph: operation not permitted when stream is capturing$"):
        run()
    run()
    assert cuda.log.count("ran") == WARM_UP_STEPS + 2  # and no step is lost
    assert "replay" not in cuda.log


def test_out_of_memory_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    run = graphed_step(cuda.step, GPU, torch.Generator())
    for _ in range(WARM_UP_STEPS):
        run()
    with pytest.raises(torch.OutOfMemoryError):
        run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_steps_equal_those_run_one_by_one() -> None:
    results = []
    for way in (graphed_step, lambda step, *_: step):
        generator = torch.Generator(GPU).manual_seed(0)
        total = torch.zeros(1000, device=GPU)
        run = way(lambda: total.add_(torch.rand(1000, generator=generator, device=GPU)), GPU, generator)  # noqa: B023
        for _ in range(20):
            run()
        results.append((total.cpu(), torch.rand(5, generator=generator, device=GPU).cpu()))
    torch.testing.assert_close(*results)
    assert replay.WARM_UP_STEPS < 20
