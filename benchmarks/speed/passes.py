"""The passes that floors are made of, and other ways to take them."""

import torch

from benchmarks.speed.comparison import Step
from benchmarks.speed.problem import Problem

BATCHED = "the floor's passes, batched"
"""One backward pass, batched over the losses, in the place of K."""
GRAPHED = "the floor's passes, as a CUDA graph"
"""Forward and K backward passes recorded once and replayed."""


def backward_passes(problem: Problem, count: int) -> Step:
    """One forward pass, K backward passes and the base's step on the last gradient."""
    model, base = problem.pair()
    parameters = list(model.parameters())

    def step() -> None:
        losses = problem.losses(model, count)
        for number, loss in enumerate(losses):
            grads = torch.autograd.grad(loss, parameters, retain_graph=number < count - 1)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        base.step()
        base.zero_grad()

    return step


def batched_passes(problem: Problem, count: int) -> Step:
    """The same in one backward pass, batched over the losses by `is_grads_batched`."""
    model, base = problem.pair()
    parameters = list(model.parameters())
    each = torch.eye(count, device=problem.x.device)

    def step() -> None:
        losses = torch.stack(problem.losses(model, count))
        grads = torch.autograd.grad(losses, parameters, each, is_grads_batched=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad[-1]
        base.step()
        base.zero_grad()

    return step


def summed_losses(problem: Problem, count: int) -> Step:
    """One forward pass, one backward pass of the sum of the losses, and the base's step."""
    model, base = problem.pair()

    def step() -> None:
        torch.stack(problem.losses(model, count)).sum().backward()
        base.step()
        base.zero_grad()

    return step


def graphed_passes(problem: Problem, count: int) -> Step:
    """The same as a CUDA graph, whose kernels the host starts by one call."""
    model, base = problem.pair()
    parameters = list(model.parameters())

    def passes() -> list[tuple[torch.Tensor, ...]]:
        losses = problem.losses(model, count)
        return [
            torch.autograd.grad(loss, parameters, retain_graph=number < count - 1)
            for number, loss in enumerate(losses)
        ]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries choose their kernels before anything is recorded
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = passes()

    def step() -> None:
        graph.replay()
        for parameter, grad in zip(parameters, grads[-1], strict=True):
            parameter.grad = grad
        base.step()
        base.zero_grad()

    return step
