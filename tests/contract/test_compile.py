"""torch.compile on the model and on the step; decisions stay outside compiled code."""

import shutil

import pytest
import torch

from tests.contract.loops import build
from tests.problems import assert_same_bits, regression, train

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_model_trains_with_a_bounded_number_of_graphs(backend):
    problem = regression()
    opt = build(problem)
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    model = torch.compile(problem.model, backend=counting)

    def loss(index):
        x, y = problem.batches[index]
        return torch.nn.functional.mse_loss(model(x), y)

    for i in range(20):
        opt.step(lambda i=i: loss(i))
        with torch.no_grad():
            loss(i)
    assert opt.statistics()["predicted_steps"] > 5
    assert len(graphs) <= 2  # with and without gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_called_inside_compiled_code_is_exact(backend):
    """Decisions are host code, and stay it: the compiler goes around the step."""
    problem, reference = regression(), regression()
    opt, twin = build(problem), build(reference)

    def one(index):
        if opt.needs_backward:
            opt.zero_grad()
            problem.loss(index).backward()
        compiled()

    compiled = torch.compile(lambda: opt.step(), backend=backend)
    for i in range(15):
        one(i)
        if twin.needs_backward:
            twin.zero_grad()
            reference.loss(i).backward()
        twin.step()
    assert opt.statistics()["predicted_steps"] == twin.statistics()["predicted_steps"]
    assert opt.statistics()["predicted_steps"] > 0
    assert_same_bits(reference.weights(), problem.weights())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_model_trains():
    problem, reference = regression(), regression()
    opt, twin = build(problem), build(reference)
    model = torch.compile(problem.model)
    for i in range(15):
        x, y = problem.batches[i]
        opt.step(lambda x=x, y=y: torch.nn.functional.mse_loss(model(x), y))
    train(reference, twin, 15)
    for a, b in zip(reference.weights(), problem.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
