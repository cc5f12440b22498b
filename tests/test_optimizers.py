"""The update rules, against Keras's written out in NumPy."""

import copy

import numpy as np
import pytest
import torch

from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD

pytestmark = pytest.mark.numeric

STEPS = 20


def keras_sgd(w, gradients, lr=0.01):
    """Apply keras.src.optimizers.sgd.SGD.update_step."""
    for g in gradients:
        w = w - lr * g
    return w


def keras_rmsprop(w, gradients, lr=1e-3, rho=0.9, eps=1e-7):
    """Apply keras.src.optimizers.rmsprop.RMSprop.update_step."""
    v = np.zeros_like(w)
    for g in gradients:
        v = rho * v + (1 - rho) * g**2
        w = w - lr * g / np.sqrt(v + eps)
    return w


def keras_adam(w, gradients, lr=1e-3, beta_1=0.9, beta_2=0.999, eps=1e-7):
    """Apply keras.src.optimizers.adam.Adam.update_step."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = m + (g - m) * (1 - beta_1)
        v = v + (g**2 - v) * (1 - beta_2)
        w = w - lr * np.sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (np.sqrt(v) + eps)
    return w


def torch_steps(optimizer_class, w, gradients, **arguments):
    parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = optimizer_class([parameter], **arguments)
    for g in gradients:
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return parameter.detach().numpy()


@pytest.fixture(params=[1.0, 1e-3, 1e-6, 1e-9], ids="gradients of {:g}".format)
def problem(request):
    """Return weights, and gradients of one order of magnitude."""
    rng = np.random.default_rng(0)
    return rng.normal(size=200), rng.normal(size=(STEPS, 200)) * request.param


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(KerasAdam, keras_adam), (KerasSGD, keras_sgd), (KerasRMSprop, keras_rmsprop)],
    ids=["adam", "sgd", "rmsprop"],
)
def test_the_update_rule_is_keras_s(problem, optimizer, rule):
    np.testing.assert_allclose(torch_steps(optimizer, *problem), rule(*problem), rtol=1e-12, atol=1e-15)


def test_adam_is_torch_s_but_for_epsilon():
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=200), rng.normal(size=(STEPS, 200))
    ours, theirs = torch_steps(KerasAdam, w, gradients, eps=0), torch_steps(torch.optim.Adam, w, gradients, eps=0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop])
def test_state_travels(optimizer):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(10, 200)).astype(np.float32)
    parameters = [torch.nn.Parameter(torch.ones(200)) for _ in range(2)]
    for parameter, halves in zip(parameters, ([gradients], [gradients[:4], gradients[4:]]), strict=True):
        state = None
        for half in halves:
            stepper = optimizer([parameter])
            if state is not None:
                stepper.load_state_dict(state)
            for gradient in half:
                parameter.grad = torch.from_numpy(gradient)
                stepper.step()
            state = copy.deepcopy(stepper.state_dict())
    assert torch.equal(*parameters)


def test_torch_s_rmsprop_is_another_rule():
    """Show the reason for KerasRMSprop: with small gradients, torch's steps are several times as long."""
    rng = np.random.default_rng(0)
    w, gradients = np.zeros(200), rng.normal(size=(STEPS, 200)) * 1e-5
    ours = torch_steps(KerasRMSprop, w, gradients)
    theirs = torch_steps(torch.optim.RMSprop, w, gradients, lr=1e-3, alpha=0.9, eps=1e-7)
    assert np.abs(theirs).mean() > 5 * np.abs(ours).mean()


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop])
def test_weight_decay_is_added_to_the_gradient(optimizer):
    rng = np.random.default_rng(0)
    w, gradient = rng.normal(size=200), rng.normal(size=(1, 200))
    decayed = torch_steps(optimizer, w, gradient, weight_decay=0.3)
    np.testing.assert_allclose(decayed, torch_steps(optimizer, w, gradient + 0.3 * w), rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (KerasAdam, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-7}),
        (KerasSGD, {"lr": 1e-2, "momentum": 0.0, "nesterov": False}),
        (KerasRMSprop, {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7}),
    ],
)
def test_defaults_are_keras_s(optimizer, expected):
    (group,) = optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasRMSprop])
def test_values_out_of_range_are_refused(optimizer):
    with pytest.raises(ValueError, match="lr -1 is negative"):
        optimizer([torch.nn.Parameter(torch.zeros(1))], lr=-1)
    with pytest.raises(ValueError, match="betas"):
        KerasAdam([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 1.0))


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasRMSprop])
def test_a_closure_is_run(optimizer):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer([parameter])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (parameter < 1).all()
