"""The mathematics of QRPO (Quantile Reward Policy Optimization, arXiv 2507.08068): losses, quantiles, partition
functions, log-probabilities. Pure functions of tensors; torch only, so this file can be copied into any code base as
it is.

The KL-regularised optimum pi*(y|x) = pi_ref(y|x) exp(R(x,y)/beta) / Z(x) says, for every single completion,

    R(x,y) - beta log Z(x) - beta log( pi*(y|x) / pi_ref(y|x) ) = 0.

Z is unknown for a raw reward. For R = f(q), q the quantile of the reward among the reference model's own rewards, it is
known: q is uniform on [0,1] under pi_ref, so Z = integral_0^1 exp(f(t)/beta) dt. QRPO regresses the left side to 0.

    python -c 'import torch, qrpo; print(qrpo.log_partition(torch.tensor([0.1])))'

Shapes: batch completions, each with num_ref_rewards rewards of reference completions to the same prompt. beta is (1,)
or (batch,), > 0; logps are natural logs summed over the completion's tokens, in float32. The rest is float32 unless you
pass float64.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TRANSFORMS = {"identity": lambda t: t, "log": torch.log, "square": torch.square, "sqrt": torch.sqrt,
              "normal-icdf": torch.special.ndtri, "scaled-normal-icdf": torch.special.ndtri}


# ---- the loss ----

def qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards,
              transform="identity", quantile="paper", among_refs=None, std=1.0, norm="mse"):
    """QRPO, eq. 11 of the paper: ( R - beta log Z - beta log(pi_theta/pi_ref) )^2 for each completion.

    beta: (1,) or (batch,); beta/|y| per completion gives the length-normalised form.
    logps, ref_logps, rewards: (batch,), all known. ref_rewards: (batch, num_ref_rewards), NaN where one is unknown.
    transform, quantile, among_refs, std: see `transformed_rewards`. norm: "mse" (squared) or "mae" (absolute).
    Returns (batch,); its gradient reaches logps alone.
    """
    reward = transformed_rewards(beta, rewards, ref_rewards, transform, quantile, among_refs, std)
    log_Z = log_partition(beta, transform, std)
    if norm not in ("mse", "mae"):
        raise ValueError(f"unknown norm {norm!r}; choose from mse, mae")
    residual = reward - beta * log_Z - beta * (logps - ref_logps)
    return residual.square() if norm == "mse" else residual.abs()


def target_log_ratios(beta, rewards, ref_rewards, transform="identity", quantile="paper", among_refs=None, std=1.0):
    """R/beta - log Z, (batch,): the log-ratio log(pi_theta/pi_ref) at which `qrpo_loss` is 0. Arguments as there."""
    reward = transformed_rewards(beta, rewards, ref_rewards, transform, quantile, among_refs, std)
    return reward / beta - log_partition(beta, transform, std)


# ---- quantile rewards ----

def quantile_rewards(rewards, ref_rewards):
    """q = #(ref_rewards <= reward) / num_ref_rewards, eq. 9 of the paper. (batch,), (batch, n) -> (batch,) in [0,1].

    NaN reference rewards (unknown) are left out of the count.
    """
    return (ref_rewards <= rewards[:, None]).to(rewards.dtype).sum(1) / (~ref_rewards.isnan()).sum(1)


def quantile_cells(rewards, ref_rewards, among_refs=None):
    """The interval (lo, hi] of quantiles that a completion occupies; two tensors (batch,).

    Among the m other reference completions: lo = #(ref < r)/(m+1), hi = (#(ref <= r) + 1)/(m+1). A continuous reward
    gives cells of width 1/(m+1); a tie shares one wide cell. among_refs: (batch,) bool, True where the completion is
    itself one of its references (it is then left out of them); None: nowhere.
    """
    itself = torch.zeros_like(rewards) if among_refs is None else among_refs.to(rewards.dtype)
    size = (~ref_rewards.isnan()).sum(1) + 1 - itself  # m + 1
    below = (ref_rewards < rewards[:, None]).sum(1)
    below_or_tied = (ref_rewards <= rewards[:, None]).sum(1) + 1 - itself
    return below / size, below_or_tied / size


def transformed_rewards(beta, rewards, ref_rewards, transform="identity", quantile="paper", among_refs=None, std=1.0):
    """R, the transformed quantile reward. Shapes as in `qrpo_loss`; returns (batch,).

    transform: a name of TRANSFORMS, or any increasing function f of a tensor in [0,1].
    quantile="paper": R = f(q), with q clamped to [1/n, 1] for log and to [1/n, (n-1)/n] for normal-icdf, as
        published. It supposes a continuous reward: with ties the targets are beyond reach (all rewards equal asks for
        log-ratio 1/beta).
    quantile="exact": R = beta log mean_{u in (lo, hi]} exp(f(u)/beta) over the completion's cell (`quantile_cells`).
        Then exp((R - beta log Z)/beta) averages to exactly 1 over the reference pool, whatever the ties and however
        few.
    std: scale of "scaled-normal-icdf", a float or (batch,). The authors take the standard deviation of the prompt's own
        ref_rewards over its mean over the dataset, so that a prompt whose rewards differ more weighs more.
    """
    if quantile == "exact":
        lo, hi = quantile_cells(rewards, ref_rewards, among_refs)
        return beta * log_mean_exp(beta, transform, lo, hi, std)
    if quantile != "paper":
        raise ValueError(f"unknown quantile {quantile!r}; choose from paper, exact")
    q, n = quantile_rewards(rewards, ref_rewards), (~ref_rewards.isnan()).sum(1)
    if transform == "log":
        q = q.maximum(1 / n)
    elif transform in ("normal-icdf", "scaled-normal-icdf"):
        if (n < 2).any():
            raise ValueError(f"{transform} with quantile='paper' needs 2 reference rewards or more; use 'exact'")
        q = q.clamp(1 / n, (n - 1) / n)
    return apply_transform(q, transform, std)


def apply_transform(t, transform="identity", std=1.0):
    """f(t) for t in [0,1], elementwise. Raises ValueError for an unknown name."""
    if not callable(transform) and transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; choose from {', '.join(TRANSFORMS)}, or pass a function")
    out = transform(t) if callable(transform) else TRANSFORMS[transform](t)
    return out * std if transform == "scaled-normal-icdf" else out


# ---- partition functions ----

def log_partition(beta, transform="identity", std=1.0):
    """log Z = log integral_0^1 exp(f(t)/beta) dt; (1,) or (batch,), the shape of beta.

    The paper's scaled-normal-icdf also adds a mean to f: it adds mean/beta here and mean to R, and cancels in the loss.
    """
    a = 1 / beta
    if transform == "identity":  # Z = beta (e^{1/beta} - 1); the last term matters from about beta = 0.1 up
        return beta.log() + a + torch.log1p(-torch.exp(-a))
    if transform == "log":  # Z = beta / (1 + beta)
        return beta.log() - beta.log1p()
    if transform == "sqrt":  # Z = 2 beta [beta + (1 - beta) e^{1/beta}]
        return math.log(2) + beta.log() + a + torch.log1p(beta * torch.expm1(-a))
    if transform in ("normal-icdf", "scaled-normal-icdf"):  # Z = e^{std^2 / (2 beta^2)}
        return (std * a if transform == "scaled-normal-icdf" else a).square() / 2
    # "square" is sqrt(pi beta)/2 erfi(1/sqrt(beta)), for which torch has no function; and any f of the user's
    return log_mean_exp(beta, transform, torch.zeros_like(beta), torch.ones_like(beta), std)


def log_mean_exp(beta, transform, lo, hi, std=1.0):
    """log( 1/(hi-lo) integral_lo^hi exp(f(u)/beta) du ), (batch,). lo, hi: (batch,) with 0 <= lo < hi <= 1."""
    a, w = 1 / beta, hi - lo
    if transform == "identity":  # e^{a hi} (1 - e^{-a w}) / (a w)
        return a * hi + torch.log(-torch.expm1(-a * w)) - torch.log(a * w)
    if transform == "log":  # (hi^{a+1} - lo^{a+1}) / ((a+1) w)
        return (a + 1) * hi.log() + torch.log1p(-((a + 1) * (lo / hi).log()).exp()) - a.log1p() - w.log()
    if transform in ("normal-icdf", "scaled-normal-icdf"):  # e^{a^2/2} [Phi(z_hi - a) - Phi(z_lo - a)] / w
        a = a * std if transform == "scaled-normal-icdf" else a
        upper, lower = (torch.special.log_ndtr(torch.special.ndtri(t) - a) for t in (hi, lo))
        return a.square() / 2 + upper + torch.log1p(-(lower - upper).exp()) - w.log()
    nodes, log_weights = _quadrature(lo.dtype, lo.device)
    t = lo[:, None] + w[:, None] * nodes  # (batch, nodes)
    return torch.logsumexp(apply_transform(t, transform, std) / beta[:, None] + log_weights, dim=1)


def _quadrature(dtype, device, n=400, reach=2.9):
    """Tanh-sinh nodes in (0,1) and the logs of their weights: dense at both ends, where exp(f/beta) has its layers."""
    s = torch.linspace(-reach, reach, n, dtype=torch.float64)
    nodes = torch.sigmoid(math.pi * s.sinh())
    weights = s.cosh() * nodes * (1 - nodes)
    return nodes.to(device, dtype), (weights / weights.sum()).log().to(device, dtype)


# ---- baselines on pairs; every argument (batch,) ----

def dpo_loss(beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (l_c - l_r)), l = logps - ref_logps. Returns (batch,)."""
    return -F.logsigmoid(beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)))


def simpo_loss(beta, gamma_beta_ratio, chosen_logps, rejected_logps, chosen_lens, rejected_lens):
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta (logp_c/|c| - logp_r/|r| - gamma/beta)); lens in tokens."""
    return -F.logsigmoid(beta * (chosen_logps / chosen_lens - rejected_logps / rejected_lens - gamma_beta_ratio))


def rebel_loss(beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_rewards, rejected_rewards):
    """REBEL (arXiv 2404.16767, eq. 1): ((r_c - r_r)/beta - (l_c - l_r))^2. Returns (batch,)."""
    log_ratio = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return ((chosen_rewards - rejected_rewards) / beta - log_ratio).square()


# ---- log-probabilities ----

def completion_logps(hidden, tokens, prompt_lens, lens, output_layer, chunk_size=1024):
    """log pi(y|x), summed over the completion's tokens in float32; (batch,).

    hidden: (batch, time, dim), the last hidden states of right-padded tokens (batch, time); the state at t predicts the
    token at t+1. prompt_lens, lens: (batch,) tokens of the prompt, and of prompt and completion together. Masks come
    from these lengths alone, so pad may equal eos. output_layer: maps (n, dim) to logits (n, vocab). It runs at
    completion positions only, chunk_size of them at a time, and again in the backward (but for the last chunk, where
    the backward begins): no (batch, time, vocab) tensor ever exists.
    """
    position = torch.arange(1, tokens.shape[1], device=tokens.device)
    supervised = (position >= prompt_lens[:, None]) & (position < lens[:, None])  # (batch, time-1)
    states, labels = hidden[:, :-1][supervised], tokens[:, 1:][supervised]  # (n, dim), (n,)

    def chunk_logps(states, labels):
        return TokenLogps.apply(output_layer(states), labels)

    *chunks, last = zip(states.split(chunk_size), labels.split(chunk_size))
    chunks = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks] + [chunk_logps(*last)]
    token_logps = torch.zeros(supervised.shape, device=tokens.device).masked_scatter(supervised, torch.cat(chunks))
    return token_logps.sum(1)


class TokenLogps(torch.autograd.Function):
    """logits (n, vocab), labels (n,) -> log-probabilities of the labels, float32 (n,). As -cross_entropy, but the
    backward writes the gradient where the log-probabilities stood: one (n, vocab) tensor less, of the largest of all.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        logps = logits.float().log_softmax(1)
        ctx.save_for_backward(logps, labels)
        ctx.dtype = logits.dtype
        return logps.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        logps, labels = ctx.saved_tensors
        out = logps.exp_().mul_(-gradient[:, None])  # d logp_y / d logit_v = [v = y] - p_v
        return out.scatter_add_(1, labels[:, None], gradient[:, None]).to(ctx.dtype), None
