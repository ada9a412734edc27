"""Policies that can be proved: an affine backup plus a small network, of one action.

    u(x) = gain . x + offset + s(x) N(x),

N a tanh or ReLU network with a linear head, s = 1, or the smooth step of a backup that acts alone
near its target (:class:`scpo_bench.policies.TargetBackup`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from scpo_bench.contract import Floats
from scpo_bench.errors import UserError

Activation = Literal["tanh", "relu"]
EPS32 = 2.0**-24  # unit roundoff of float32
RAMP_MARGIN = 1e-3  # relative: more than float32 can misjudge x'Px by
TANH_ULPS = 4.0  # of torch's float32 tanh, at most; its documented kernels stay below 2


@dataclass(frozen=True)
class Policy:
    """u(x) for x [n], as above. Weights are those of the deployed network, exactly.

    gain: [n]. hidden: (W [h, inputs], b [h]) of each hidden layer. head: [h], the last layer.
    gate: (P [n, n], level) of s, None for s = 1.
    """

    gain: Floats
    offset: float
    hidden: tuple[tuple[Floats, Floats], ...]
    head: Floats
    head_bias: float
    activation: Activation = "tanh"
    gate: tuple[Floats, float] | None = None

    def in_coordinates(self, M: Floats) -> Policy:
        """The same policy as a function of y, where x = M y."""
        (W, b), *rest = self.hidden
        gate = None if self.gate is None else (M.T @ self.gate[0] @ M, self.gate[1])
        return replace(self, gain=self.gain @ M, hidden=((W @ M, b), *rest), gate=gate)

    def features(self, x: Floats) -> Floats:
        """[N, h + 1]: what u is linear in, s(x) (last hidden layer, 1), for x [N, n]."""
        h = x
        for W, b in self.hidden:
            z = h @ W.T + b
            h = np.tanh(z) if self.activation == "tanh" else np.maximum(z, 0.0)
        phi = np.concatenate([h, np.ones((len(x), 1))], axis=1)
        return phi if self.gate is None else self.scale(x)[:, None] * phi

    def scale(self, x: Floats) -> Floats:
        """s(x) [N]."""
        if self.gate is None:
            return np.ones(len(x))
        P, level = self.gate
        t = np.clip(np.einsum("ni,ij,nj->n", x, P, x) / level - 1.0, 0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)

    def __call__(self, x: Floats) -> Floats:
        """u [N], unclipped and in float64, for x [N, n]."""
        residual = self.features(x) @ np.append(self.head, self.head_bias)
        return x @ self.gain + self.offset + residual


def rounding_error(policy: Policy, bound: Floats) -> tuple[float, float]:
    """Bounds on |u in float32 - u| over |x| <= bound [n]; the observation is rounded, too.

    The second is what to add on the ramp of a gate (x'Px < 2 level, and within RAMP_MARGIN of it).

    Running error analysis: a sum of k products in any order is off by at most k eps / (1 - k eps)
    times the sum of their absolute values (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1).
    """

    def affine(W: Floats, b: Any, size: Floats, error: Floats) -> tuple[Floats, Floats]:
        """(bound, error) of W h + b, where |h| <= size is known up to ``error``."""
        k = W.shape[-1] + 2
        total = np.abs(W) @ (size + error) + np.abs(b)
        return total, np.abs(W) @ error + k * EPS32 / (1 - k * EPS32) * total

    seen = EPS32 * bound
    size, error = bound, seen
    for W, b in policy.hidden:
        size, error = affine(W, b, size, error)
        if policy.activation == "tanh":
            size, error = np.ones(len(b)), error + 2 * TANH_ULPS * EPS32
    total, error_n = affine(policy.head, policy.head_bias, size, error)
    backup, error_b = affine(policy.gain, policy.offset, bound, seen)
    whole, ramp = float(error_n + error_b) + 2 * EPS32 * float(total + backup), 0.0
    if policy.gate is not None:
        P, level = policy.gate
        # Off the ramp s is 0 or 1, exactly. On it x'Px <= 2 level, which bounds |x|'|P||x|.
        inner = np.sqrt(2 * level * np.diag(np.linalg.inv(P)))
        terms = float(inner @ np.abs(P) @ inner) / level
        ramp = float(total) * (1.5 * 8 * (len(bound) + 2) * EPS32 * terms + 16 * EPS32)
    return whole, ramp


# ---- from torch modules


def _array(tensor: Any) -> Floats:
    return tensor.detach().double().numpy().copy()


def from_modules(layers: nn.Sequential, head: nn.Linear, backup: nn.Module | None) -> Policy:
    """The policy backup(x) + s(x) head(layers(x)). UserError names what is not covered."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    others = {type(layer) for layer in layers if not isinstance(layer, nn.Linear)}
    names: dict[Any, Activation] = {nn.Tanh: "tanh", nn.ReLU: "relu"}
    if len(others) != 1 or not others <= set(names) or len(layers) != 2 * len(linears):
        raise UserError(
            "proof: policies are covered whose hidden layers are all tanh or all ReLU, got "
            f"{layers}"
        )
    if head.out_features != 1:
        raise UserError(f"proof: policies of one action are covered, got {head.out_features}")
    gain, offset, gate = np.zeros(linears[0].in_features), 0.0, None
    if backup is not None:
        known: Any = backup
        if not hasattr(known, "gain"):
            raise UserError(f"proof: affine backups are covered, got {type(backup).__name__}")
        gain, offset = _array(known.gain)[0], float(known.offset[0].item())
        if hasattr(known, "residual_scale"):
            gate = _array(known.P), float(known.level)
    return Policy(
        gain,
        offset,
        tuple((_array(layer.weight), _array(layer.bias)) for layer in linears),
        _array(head.weight)[0],
        float(head.bias[0].item()),
        names[others.pop()],
        gate,
    )
