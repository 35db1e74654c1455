'''The mathematics of QRPO (Quantile Reward Policy Optimization, arXiv 2507.08068): losses, quantiles,
partition functions, log-probabilities. Pure functions of tensors that need only torch, so copy this
file, or a function of it.

The policy pi* that maximises E[R] - beta KL(pi || pi_ref) satisfies, for every single completion y of a
prompt x,

    beta log( pi*(y|x) / pi_ref(y|x) ) = R(x,y) - beta log Z(x),   Z(x) = E_{y ~ pi_ref} exp( R(x,y) / beta ).

For a raw reward, Z is unknown. QRPO takes R = f(q), where q is the quantile of the reward among the
rewards of the reference model's own completions. Under pi_ref, q is uniform on [0,1], so Z =
integral_0^1 exp(f(t)/beta) dt is known, and log(pi/pi_ref) can be regressed on its value at the
optimum, one completion at a time. As published, with f(q) = q, the loss is three lines:

    def qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards):
        """(1,) or (batch,), (batch,), (batch,), (batch,), (batch, num_ref_rewards) -> (batch,)"""
        q = (ref_rewards <= rewards[:, None]).float().mean(1)                # quantile of the reward, eq. 9
        log_Z = beta.log() + 1 / beta + torch.log1p(-torch.exp(-1 / beta))   # log of beta (e^{1/beta} - 1)
        return (q - beta * log_Z - beta * (logps - ref_logps)) ** 2          # eq. 11

`qrpo_loss` below adds other transforms f, rewards that tie, and unknown rewards.

    python -c 'import torch, qrpo; print(qrpo.log_partition(torch.tensor([0.1])))'

Shapes: `batch` completions, each with `num_ref_rewards` rewards of reference completions of the same
prompt. beta > 0 is (1,) or (batch,). logps are natural logs, summed over the tokens of the completion,
in float32.
'''
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F


# ---- the loss ----

def qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards,
              transform="identity", quantile="paper", norm="mse", among_refs=None):
    """( R - beta log Z - beta log(pi/pi_ref) )^2 with R = f(quantile of the reward), eq. 11 of the paper.

    beta (1,) or (batch,); logps, ref_logps, rewards (batch,); ref_rewards (batch, num_ref_rewards) ->
    (batch,). The defaults are the loss as published (the three lines above). transform, quantile and
    among_refs: see `target_log_ratios`. norm: a name in NORMS, the squared error (mse) or the absolute one
    (mae). Raises ValueError for an unknown name.
    """
    targets = target_log_ratios(beta, rewards, ref_rewards, transform, quantile, among_refs)  # R/beta - log Z
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    return NORMS[norm](beta * (targets - (logps - ref_logps)))


NORMS = {"mse": torch.square, "mae": torch.abs}


def forward_kl_loss(beta, logps, rewards, ref_rewards, transform="identity", quantile="exact",
                    among_refs=None):
    """-w log pi with the weight w = pi*/pi_ref of a completion of the reference model; as `qrpo_loss`.

    Averaged over the reference completions this is an unbiased estimate of the cross-entropy of pi and pi*,
    so maximum likelihood of the optimum itself: it raises good completions and pushes none down. With the
    quantile "exact" the weights average to 1. With the log transform this imitates the best of 1 + 1/beta
    references (BoNBoN, arXiv 2406.00832).
    """
    targets = target_log_ratios(beta, rewards, ref_rewards, transform, quantile, among_refs)
    return -targets.exp() * logps


def target_log_ratios(beta, rewards, ref_rewards, transform="identity", quantile="paper", among_refs=None):
    """log(pi*/pi_ref) of every completion, R/beta - log Z, (batch,) nats: where the loss is 0.

    beta, rewards, ref_rewards: as in `qrpo_loss`; NaN in ref_rewards is an unknown reward, which does
    not count. transform: a name in TRANSFORMS, a Transform, or any increasing function f of a tensor in
    [0,1]. quantile: a name in QUANTILES, "paper" or "exact". among_refs: (batch,) bool, True where the
    completion is itself one of its references; None: nowhere. Raises ValueError for an unknown name.
    """
    transform = get_transform(transform)
    if quantile not in QUANTILES:
        raise ValueError(f"unknown quantile {quantile!r}; choose from {', '.join(QUANTILES)}")
    beta = as_float(beta).expand(rewards.shape)
    log_weight = QUANTILES[quantile](beta, rewards, ref_rewards, transform, among_refs)  # R / beta, (batch,)
    return log_weight - log_partition(beta, transform)


def paper_quantile(beta, rewards, ref_rewards, transform, among_refs=None):
    """R/beta = f(q)/beta as published, (batch,); q = #(ref_rewards <= reward) / num_ref_rewards.

    Where f is infinite at 0 or 1, q is clamped to [1/n, (n-1)/n], as in the authors' code. This assumes
    a continuous reward: with ties, e^target does not average to 1 over the references (all rewards
    equal asks for +log(1/beta)).
    """
    n = (~ref_rewards.isnan()).sum(1)
    q = (ref_rewards <= rewards[:, None]).to(rewards.dtype).sum(1) / n
    if 1 in transform.infinite_at and (n < 2).any():
        raise ValueError("this transform needs at least 2 reference rewards, or quantile='exact'")
    if 0 in transform.infinite_at:
        q = q.maximum(1 / n)
    if 1 in transform.infinite_at:
        q = q.minimum((n - 1) / n)
    return transform.f(q) / beta


def exact_quantile(beta, rewards, ref_rewards, transform, among_refs=None):
    """R/beta = log mean_{u in (lo, hi]} exp(f(u)/beta) over the completion's cell of quantiles, (batch,).

    e^target then averages to exactly 1 over the reference pool, whatever the ties, the transform, beta, and
    the number of references, so no clamp is needed. If all rewards are equal, the target is 0: no change.
    """
    lo, hi = quantile_cells(rewards, ref_rewards, among_refs)
    return log_mean_exp(beta, transform, lo, hi)


QUANTILES = {"paper": paper_quantile, "exact": exact_quantile}


def quantile_cells(rewards, ref_rewards, among_refs=None):
    """The interval (lo, hi] of quantiles that a completion occupies; two tensors (batch,).

    Among the m *other* reference completions: lo = #(ref < r)/(m+1), hi = (#(ref <= r) + 1)/(m+1). A
    continuous reward gives cells of width 1/(m+1); completions of equal reward share one wide cell.
    """
    itself = torch.zeros_like(rewards) if among_refs is None else among_refs.to(rewards.dtype)
    size = (~ref_rewards.isnan()).sum(1) + 1 - itself  # m + 1
    lower = (ref_rewards < rewards[:, None]).sum(1)
    lower_or_equal = (ref_rewards <= rewards[:, None]).sum(1) + 1 - itself
    return lower / size, lower_or_equal / size


# ---- transforms of the quantile and their partition functions ----

class Transform(NamedTuple):
    """R = f(q). Quadrature replaces a closed form that is None, so `Transform(f)` is enough for a new one."""
    f: Callable                    # increasing, of a tensor in [0,1]
    log_Z: Callable = None         # beta -> log integral_0^1 exp(f(t)/beta) dt
    log_mean_exp: Callable = None  # (beta, lo, hi) -> log of the mean of exp(f(u)/beta) over u in (lo, hi]
    infinite_at: tuple = ()        # where f is infinite: 0, 1, both or neither


def identity_log_Z(beta):
    """Z = beta (e^{1/beta} - 1). The authors' code omits the -1, which matters from about beta = 0.1."""
    a = 1 / beta
    return beta.log() + a + torch.log1p(-torch.exp(-a))


def identity_log_mean_exp(beta, lo, hi):
    """e^{a hi} (1 - e^{-a w}) / (a w), with a = 1/beta and w = hi - lo."""
    a, w = 1 / beta, hi - lo
    return a * hi + torch.log(-torch.expm1(-a * w)) - torch.log(a * w)


def log_log_Z(beta):
    """Z = beta / (1 + beta)."""
    return beta.log() - beta.log1p()


def log_log_mean_exp(beta, lo, hi):
    """(hi^{a+1} - lo^{a+1}) / ((a+1) w)."""
    a, w = 1 / beta, hi - lo
    log_ratio = (a + 1) * (lo / hi).log()  # of lo^{a+1} to hi^{a+1}
    return (a + 1) * hi.log() + torch.log1p(-log_ratio.exp()) - a.log1p() - w.log()


def sqrt_log_Z(beta):
    """Z = 2 beta [beta + (1 - beta) e^{1/beta}]."""
    a = 1 / beta
    return math.log(2) + beta.log() + a + torch.log1p(beta * torch.expm1(-a))


def normal_log_Z(beta):
    """Z = e^{1 / (2 beta^2)}."""
    return (1 / beta).square() / 2


def normal_log_mean_exp(beta, lo, hi):
    """e^{a^2/2} [Phi(z_hi - a) - Phi(z_lo - a)] / w, with z = Phi^-1."""
    a, w = 1 / beta, hi - lo
    upper = torch.special.log_ndtr(torch.special.ndtri(hi) - a)
    lower = torch.special.log_ndtr(torch.special.ndtri(lo) - a)
    return a.square() / 2 + upper + torch.log1p(-(lower - upper).exp()) - w.log()


# The published code's scaled-normal-icdf, f = sigma Phi^-1 with a sigma for each prompt, is normal-icdf at
# beta / sigma, with the squared error times sigma^2. Z of the square is sqrt(pi beta)/2 erfi(1/sqrt(beta)),
# for which torch has no function.
TRANSFORMS = {
    "identity": Transform(lambda t: t, identity_log_Z, identity_log_mean_exp),
    "log": Transform(torch.log, log_log_Z, log_log_mean_exp, infinite_at=(0,)),
    "square": Transform(torch.square),
    "sqrt": Transform(torch.sqrt, sqrt_log_Z),
    "normal-icdf": Transform(torch.special.ndtri, normal_log_Z, normal_log_mean_exp, infinite_at=(0, 1)),
}


def get_transform(transform):
    """A Transform from its name, a function of a tensor in [0,1], or itself. ValueError: no such name."""
    if isinstance(transform, Transform):
        return transform
    if callable(transform):
        return Transform(transform)
    if transform not in TRANSFORMS:
        names = ", ".join(TRANSFORMS)
        raise ValueError(f"unknown transform {transform!r}; choose from {names}, or pass a function")
    return TRANSFORMS[transform]


def log_partition(beta, transform="identity"):
    """log Z = log integral_0^1 exp(f(t)/beta) dt, the shape of beta. Stable from beta = 3e-4 to beyond 5."""
    transform, beta = get_transform(transform), as_float(beta)
    if transform.log_Z:
        return transform.log_Z(beta)
    return log_mean_exp(beta, transform, torch.zeros_like(beta), torch.ones_like(beta))


def as_float(beta):
    """An integer beta would make integer quadrature nodes, all 0."""
    return beta if beta.is_floating_point() else beta.float()


def log_mean_exp(beta, transform, lo, hi):
    """log( 1/(hi-lo) integral_lo^hi exp(f(u)/beta) du ), all (batch,), 0 <= lo < hi <= 1."""
    transform = get_transform(transform)
    if transform.log_mean_exp:
        return transform.log_mean_exp(beta, lo, hi)
    nodes, log_weights = quadrature(lo.dtype, lo.device)
    u = lo[:, None] + (hi - lo)[:, None] * nodes  # (batch, nodes)
    return torch.logsumexp(transform.f(u) / beta[:, None] + log_weights, dim=1)


def quadrature(dtype, device, n=400, reach=2.9):
    """Tanh-sinh nodes in (0,1), dense at the ends, where exp(f/beta) is steep, and log weights, (n,) each."""
    s = torch.linspace(-reach, reach, n, dtype=torch.float64)
    nodes = torch.sigmoid(math.pi * s.sinh())
    weights = s.cosh() * nodes * (1 - nodes)
    log_weights = (weights / weights.sum()).log()
    return nodes.to(device, dtype), log_weights.to(device, dtype)


# ---- other losses on the same data: every argument and the result (batch,), lens in tokens ----

def dpo_loss(beta, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (l_c - l_r)), with l = logps - ref_logps."""
    return -F.logsigmoid(beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)))


def dpo_norm_loss(beta, chosen_log_ratios, rejected_log_ratios, chosen_lens, rejected_lens):
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124; Apertus, 2509.14233): beta / |y| instead of beta."""
    margin = chosen_log_ratios / chosen_lens - rejected_log_ratios / rejected_lens
    return -F.logsigmoid(beta * margin)


def simpo_loss(beta, gamma_beta_ratio, chosen_logps, rejected_logps, chosen_lens, rejected_lens):
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta (logp_c/|c| - logp_r/|r| - gamma/beta))."""
    margin = chosen_logps / chosen_lens - rejected_logps / rejected_lens
    return -F.logsigmoid(beta * (margin - gamma_beta_ratio))


def rebel_loss(beta, chosen_log_ratios, rejected_log_ratios, chosen_rewards, rejected_rewards):
    """REBEL (arXiv 2404.16767, eq. 1): ((r_c - r_r)/beta - (l_c - l_r))^2, with log-ratios l."""
    return ((chosen_rewards - rejected_rewards) / beta - (chosen_log_ratios - rejected_log_ratios)).square()


# ---- log-probabilities ----

def completion_logps(logits, tokens, prompt_lens, lens):
    """log pi(y|x), summed over the completion's tokens, in float32; (batch,).

    logits: (batch, time, vocab), of right-padded tokens (batch, time); those at t predict the token at t+1.
    prompt_lens, lens: (batch,) tokens of the prompt, and of prompt and completion together. The mask comes
    from these lengths alone, so pad may equal eos. model.py computes the same without ever holding all of the
    logits (`chunked_logps`).
    """
    logps = logits[:, :-1].float().log_softmax(-1)         # (batch, time-1, vocab)
    logps = logps.gather(2, tokens[:, 1:, None])[:, :, 0]  # (batch, time-1), of the next tokens
    position = torch.arange(1, tokens.shape[1], device=tokens.device)
    in_completion = (position >= prompt_lens[:, None]) & (position < lens[:, None])
    return logps.where(in_completion, 0).sum(1)
