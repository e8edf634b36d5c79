"""A convolution by `model.kernels.winograd` against PyTorch's own, forward and both gradients, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.training.winograd [--threads N] [--seconds 1.5] [typical ...]

PyTorch's side casts the float32 weights to bfloat16, and their gradient back; Winograd's transforms them: what a
training step does. Times are the least of as many as fit into the seconds; GFLOP/s count a direct convolution's
products.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.kernels import winograd

Shape = tuple[int, int, int, int]

SHAPES: dict[str, list[Shape]] = {  # images, inputs, outputs, height and width
    "typical": [(128, 48, 192, 16), (128, 96, 384, 8), (128, 192, 384, 4)],
    "seed-advanced": [(64, 512, 2560, 16), (64, 512, 2560, 8), (64, 512, 2560, 4), (64, 512, 2560, 2)],
    "large": [(128, 128, 512, 16), (128, 256, 1024, 8), (128, 256, 768, 4)],
    "small": [(128, 24, 72, 16), (128, 48, 144, 8), (128, 96, 192, 4)],
    "first": [(128, 3, 96, 32), (128, 8, 24, 16)],
}
LEAST_ROUNDS, MOST_ROUNDS = 3, 300


def directions(shape: Shape) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """For each direction, PyTorch's way and Winograd's."""
    n, inputs, outputs, size = shape
    x, grad = _activations(n, inputs, size), _activations(n, outputs, size)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1).to(memory_format=torch.channels_last)
    weight, bias = conv.weight.detach(), conv.bias
    assert bias is not None

    def back(*mask: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, x, weight.bfloat16(), [outputs], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(mask)
        )

    def weights() -> tuple[Tensor, Tensor]:
        _, grad_weight, grad_bias = back(False, True, True)
        return grad_weight.float(), grad_bias.float()

    return {
        "forward": (
            lambda: F.conv2d(x, weight.bfloat16(), bias.bfloat16(), padding=1),
            lambda: winograd.convolution(x, weight, bias),
        ),
        "grad_x": (
            lambda: back(True, False, False),
            lambda: winograd.gradient_of_input(grad, weight),
        ),
        "grad_w": (weights, lambda: winograd.gradient_of_weight(x, grad)),
    }


def _activations(n: int, channels: int, size: int) -> Tensor:
    return torch.randn(n, channels, size, size).bfloat16().contiguous(memory_format=torch.channels_last)


def in_turns(pair: tuple[Callable[[], Any], Callable[[], Any]], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of every call of either."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or (time.perf_counter() - start < seconds and len(times[0]) < MOST_ROUNDS):
        for call, into in zip(pair, times, strict=True):
            begin = time.perf_counter()
            call()
            into.append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.winograd", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("network, shape, direction: ms PyTorch, Winograd (least); GFLOP/s; ratio of least, of medians")
    for name in given.names or SHAPES:
        for shape in SHAPES[name]:
            flops, totals = 2 * 9 * shape[0] * shape[1] * shape[2] * shape[3] ** 2, [0.0, 0.0]
            for direction, pair in directions(shape).items():
                theirs, ours = in_turns(pair, given.seconds)
                a, b = min(theirs), min(ours)
                totals = [totals[0] + a, totals[1] + b]
                print(
                    f"{name:14} {shape!s:22} {direction:8} {a * 1e3:8.2f} {b * 1e3:8.2f}  "
                    f"{flops / a / 1e9:5.0f} {flops / b / 1e9:5.0f}  {a / b:.2f} {median(theirs) / median(ours):.2f}",
                    flush=True,
                )
            a, b = totals
            print(f"{name:14} {shape!s:22} all      {a * 1e3:8.2f} {b * 1e3:8.2f}               {a / b:.2f}")


if __name__ == "__main__":
    main()
