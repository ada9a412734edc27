"""CVPO's M-step: fit a Gaussian policy to the E-step's weights within two KL bounds.

    min_theta  mean_b sum_k q_bk [-log N(a_bk; mu, sigma_old) - log N(a_bk; mu_old, sigma)]
    s.t.       mean_b KL_mu <= eps_mu,   mean_b KL_Sigma <= eps_Sigma.

In the old policy's units, shift = (mu - mu_old) / sigma_old and ratio = sigma / sigma_old, only two
moments of q enter, and the Lagrangian is minimised by numbers between the old policy's and q's.
Sources: Liu et al. 2022, arXiv 2201.11927, section 4.2; the separate bounds and their divergences:
Abdolmaleki et al. 2018, arXiv 1812.02256, section 4.2 and appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scpo_bench.baselines.off_policy_networks import GaussianActor


def gaussian_kl_split(
    mean: Tensor, std: Tensor, old_mean: Tensor, old_std: Tensor
) -> tuple[Tensor, Tensor]:
    """(KL_mu, KL_Sigma) per state [B] of diagonal Gaussians [B, A], summed over action dimensions.

    KL_mu = KL(N(old_mean, old_std) || N(mean, old_std)) and KL_Sigma = KL(N(old_mean, old_std) ||
    N(old_mean, std)) are constrained separately.
    """
    kl_mean = 0.5 * ((mean - old_mean) / old_std).square().sum(dim=-1)
    ratio = (old_std / std).square()
    kl_covariance = 0.5 * (ratio - 1 - ratio.log()).sum(dim=-1)
    return kl_mean, kl_covariance


def weighted_moments(
    actions: Tensor, weights: Tensor, old_mean: Tensor, old_std: Tensor
) -> tuple[Tensor, Tensor]:
    """E_q of noise and of noise^2, each [B, A], with noise = (a - old_mean) / old_std.

    actions: [B, K, A], drawn from the old policy; weights q: [B, K], rows summing to one. Of the
    uniform weights' moments the exact values, 0 and 1, replace the samples': the expectation over
    samples is the same, and a q close to uniform is not drowned in the noise of K samples.
    """
    noise = (actions - old_mean.unsqueeze(1)) / old_std.unsqueeze(1)
    tilt = weights - 1.0 / weights.shape[1]
    first = torch.einsum("bk,bka->ba", tilt, noise)
    second = 1.0 + torch.einsum("bk,bka->ba", tilt, noise.square())
    return first, second


def multipliers(
    first: Tensor, second: Tensor, eps_mean: float, eps_std: float
) -> tuple[float, float]:
    """The multipliers of the KL bounds for a policy free to choose mean and deviation per state.

    first, second: [B, A], see ``weighted_moments``. With multiplier alpha the fitted shift is first
    / (1 + alpha), so KL_mu = KL_mu(first) / (1 + alpha)^2 and alpha = max(0, sqrt(KL_mu(first) /
    eps) - 1). The fitted variance ratio is (second + beta) / (1 + beta); to second order in its
    distance from 1, KL_Sigma = (second - 1)^2 / (4 (1 + beta)^2).
    """
    kl_mean = 0.5 * first.square().sum(dim=-1).mean().item()
    kl_std = 0.25 * (second - 1.0).square().sum(dim=-1).mean().item()
    return max((kl_mean / eps_mean) ** 0.5 - 1.0, 0.0), max((kl_std / eps_std) ** 0.5 - 1.0, 0.0)


def weighted_nll_split(shift: Tensor, ratio: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """-mean_b sum_k q_bk [log N(a; mean, old_std) + log N(a; old_mean, std)], up to a constant.

    shift, ratio: [B, A] of the policy; first, second: [B, A] of q.
    """
    mean_term = 0.5 * (shift - first).square()
    covariance_term = ratio.log() + 0.5 * second / ratio.square()
    return (mean_term + covariance_term).sum(dim=-1).mean()


@torch.no_grad()
def pull_back(
    actor: GaussianActor,
    old: GaussianActor,
    observations: Tensor,
    eps_mean: float,
    eps_std: float,
    attempts: int = 20,
) -> tuple[float, float, float]:
    """Move ``actor`` back towards ``old`` until both mean KL on the observations [B, O] are met.

    Parameters move along the line between the two, to where the tighter bound is met to within a
    fifth. Returns (KL_mu, KL_Sigma, share of the way from ``old`` that is left: 1 where both bounds
    held, 0 where no share of it does).
    """
    base, new = old(observations), [p.clone() for p in actor.trained()]

    def at(share: float) -> tuple[float, float]:
        for p, start, end in zip(actor.trained(), old.trained(), new):
            p.copy_(torch.lerp(start, end, share) if share > 0 else start)
        kl_mean, kl_std = gaussian_kl_split(*actor(observations), *base)
        return kl_mean.mean().item(), kl_std.mean().item()

    low, high, share = 0.0, 1.0, 1.0
    for _ in range(attempts):
        kl_mean, kl_std = at(share)
        excess = max(kl_mean / eps_mean, kl_std / eps_std)
        if kl_mean <= eps_mean and kl_std <= eps_std:  # false where one of them is not a number
            low = share
            if share == 1.0 or excess > 0.8:
                return kl_mean, kl_std, share
        else:
            high = share
        # Where KL is quadratic on the line this is the root, times 0.95; where not, bisect.
        share = share * 0.95 / max(excess, 1e-12) ** 0.5
        if not low < share < high:
            share = 0.5 * (low + high)
    return *at(low), low
