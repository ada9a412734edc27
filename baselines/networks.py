"""Small multilayer perceptrons in NumPy, with hand-written derivatives, and Adam.

Why not autograd: at batch 64 and 64x64 units a training step through torch is mostly dispatch
(about 1.2 ms for an actor and two critics); the same arithmetic written out takes about a third of
that. Parameters live in the torch modules of the Stable-Baselines3 policy: a network here is a copy
of them for the duration of one update, written back at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scpo_bench.errors import UserError

Array = NDArray[np.float32]


class Mlp:
    """``x -> W_L act(... act(W_1 x + b_1) ...) + b_L`` on a flat parameter vector.

    linears: torch layers the parameters are copied from; activation: "tanh" or "relu"; extra:
    further parameters kept after the layers' in the vector (a state-independent log standard
    deviation). theta, grad: [P], layer by layer (weight [out, in], then bias [out]), then extra.
    The dtype is that of the torch layers.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        activation: str = "tanh",
        extra: Sequence[nn.Parameter] = (),
    ):
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation: expected 'tanh' or 'relu', got {activation!r}")
        self.activation = activation
        self.tensors = [p for layer in linears for p in (layer.weight, layer.bias)] + list(extra)
        self.theta: Array = np.concatenate([p.detach().numpy().ravel() for p in self.tensors])
        self.grad: Array = np.zeros_like(self.theta)
        self.weights, self.biases, self.extra = self._views(self.theta)
        self.weight_grads, self.bias_grads, self.extra_grads = self._views(self.grad)
        self._inputs: list[Array] = []  # of each layer, from the last forward

    def _views(self, vector: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """Weights, biases and extra parameters as views into ``vector`` [P]."""
        views, start = [], 0
        for p in self.tensors:
            views.append(vector[start : start + p.numel()].reshape(p.shape))
            start += p.numel()
        layers = sum(p.dim() == 2 for p in self.tensors)
        return views[0 : 2 * layers : 2], views[1 : 2 * layers : 2], views[2 * layers :]

    def write_back(self) -> None:
        """Copy theta into the torch parameters."""
        layers = [v for pair in zip(self.weights, self.biases) for v in pair]
        with torch.no_grad():
            for p, w in zip(self.tensors, layers + self.extra):
                p.copy_(torch.from_numpy(w))

    def forward(self, x: Array) -> Array:
        """x: [B, in] -> [B, out]. Stores what ``backward`` and ``jvp`` need."""
        self._inputs = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = x @ weight.T
            x += bias
            if self.activation == "tanh":
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0.0, out=x)
            self._inputs.append(x)
        return x @ self.weights[-1].T + self.biases[-1]

    def backward(self, d_out: Array) -> None:
        """Gradient of L into ``grad``, from d_out = dL/d(output) [B, out] of the last forward.

        The part of ``grad`` that belongs to extra parameters is left alone.
        """
        delta = d_out
        for layer in range(len(self.weights) - 1, -1, -1):
            np.matmul(delta.T, self._inputs[layer], out=self.weight_grads[layer])
            np.add.reduce(delta, axis=0, out=self.bias_grads[layer])
            if layer > 0:
                delta = delta @ self.weights[layer]
                delta *= self._slope(self._inputs[layer])

    def jvp(self, direction: Array) -> Array:
        """d(output)/d(theta) @ direction at the last forward: [B, out]. direction: [P]."""
        weights, biases, _ = self._views(direction)
        tangent = self._inputs[0] @ weights[0].T + biases[0]
        for layer in range(1, len(weights)):
            tangent *= self._slope(self._inputs[layer])
            tangent = tangent @ self.weights[layer].T
            tangent += self._inputs[layer] @ weights[layer].T
            tangent += biases[layer]
        return tangent

    def _slope(self, activated: Array) -> Array:
        """Derivative of the activation, from its own output."""
        if self.activation == "relu":
            return (activated > 0.0).astype(activated.dtype)
        slope = activated * activated
        return np.subtract(1.0, slope, out=slope)


class Adam:
    """Adam on one flat vector; minimises.

    Source: Kingma & Ba 2015, arXiv 1412.6980, end of section 2.
    """

    def __init__(
        self,
        size: int,
        dtype: np.dtype | type = np.float32,
        beta1: float = 0.9,
        beta2: float = 0.999,
    ) -> None:
        self.first, self.second = np.zeros(size, dtype), np.zeros(size, dtype)
        self._work = np.zeros(size, dtype)
        self.steps, self.beta1, self.beta2, self.eps = 0, beta1, beta2, 1e-8

    def update(self, theta: Array, grad: Array, lr: float, max_grad_norm: float = np.inf) -> None:
        """One step, in place on ``theta`` [P].

        The norm of ``grad`` [P] is first clipped to ``max_grad_norm``, in place.
        """
        norm = float(np.sqrt(grad @ grad))
        if norm > max_grad_norm:
            grad *= max_grad_norm / norm
        self.steps += 1
        work = self._work
        self.first *= self.beta1
        self.first += np.multiply(grad, 1 - self.beta1, out=work)
        np.multiply(grad, grad, out=work)
        work *= 1 - self.beta2
        self.second *= self.beta2
        self.second += work
        np.sqrt(self.second, out=work)
        correction = np.sqrt(1 - self.beta2**self.steps)
        work += self.eps * correction
        np.divide(self.first, work, out=work)
        work *= lr * correction / (1 - self.beta1**self.steps)
        theta -= work


def sequential_layers(*modules: nn.Module) -> tuple[list[nn.Linear], str]:
    """(linear layers in order, "tanh" or "relu") of plain torch MLPs applied one after the other.

    Raises UserError for any other module, or for mixed activations.
    """
    flat: list[nn.Module] = []
    for module in modules:
        flat += list(module) if isinstance(module, nn.Sequential) else [module]
    linears = [m for m in flat if isinstance(m, nn.Linear)]
    names = {nn.Tanh: "tanh", nn.ReLU: "relu"}
    others = {type(m) for m in flat if not isinstance(m, nn.Linear)}
    if others - set(names) or len(others) > 1:
        found = sorted(map(str, others))
        raise UserError(f"policy_kwargs.activation_fn: expected nn.Tanh or nn.ReLU, got {found}")
    return linears, names[others.pop()] if others else "tanh"
