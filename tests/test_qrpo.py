"""The mathematics against figures that were computed elsewhere, or by another way."""
import json
import math
import random

import numpy as np
import pytest
import torch

import qrpo
from conftest import MATERIAL, needs

BETAS = (3e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 5.0)


def golden():
    for case in json.loads((MATERIAL / "golden_losses.json").read_text()):
        inputs = {key: torch.tensor(value) for key, value in case["inputs"].items()}
        for loss in case["losses"]:
            yield inputs, loss, torch.tensor([loss["beta"]]), torch.tensor(loss["value"])


@needs("golden_losses.json")
def test_qrpo_matches_the_published_code():
    for x, loss, beta, theirs in golden():
        if loss["loss"] != "qrpo":
            continue
        side = loss["side"]
        logps = x[f"logps_{side}"].clone()
        dropped = beta * torch.log1p(-torch.exp(-1 / beta))  # the term of beta log Z that the published identity leaves out
        if loss["transform"] == "identity":
            logps = logps - dropped / beta  # residual - dropped: their loss
        ours = qrpo.qrpo_loss(beta, logps, x[f"ref_logps_{side}"], x[f"rewards_{side}"], x["ref_rewards"],
                              loss["transform"], std=x["ref_rewards"].std(1) / loss["mean_std_ref_rewards"], norm=loss["norm"])
        assert ((ours - theirs).abs() / (theirs.abs() + 1e-3)).max() < 1e-5, loss
        if loss["beta"] < 0.1:
            assert dropped.abs() < 1e-8  # so that as it stands it agrees as well
        elif loss["norm"] == "mse":
            ours = qrpo.qrpo_loss(beta, x[f"logps_{side}"], x[f"ref_logps_{side}"], x[f"rewards_{side}"], x["ref_rewards"],
                                  loss["transform"], std=x["ref_rewards"].std(1) / loss["mean_std_ref_rewards"])
            assert ((ours - theirs).abs() / (theirs.abs() + 1e-3)).max() < 1e-3, loss


@needs("golden_losses.json")
def test_baselines_match_the_published_code():
    for x, loss, beta, theirs in golden():
        if loss["loss"] == "qrpo":
            continue
        pair = x["logps_chosen"], x["logps_rejected"]
        ref_pair = x["ref_logps_chosen"], x["ref_logps_rejected"]
        ours = {"dpo": lambda: qrpo.dpo_loss(beta, *pair, *ref_pair),
                "simpo": lambda: qrpo.simpo_loss(beta, loss["gamma_beta_ratio"], *pair, x["lengths_chosen"], x["lengths_rejected"]),
                "rebel": lambda: qrpo.rebel_loss(beta, *pair, *ref_pair, x["rewards_chosen"], x["rewards_rejected"])}
        assert ((ours[loss["loss"]]() - theirs).abs() / (theirs.abs() + 1e-3)).max() < 1e-5, loss


def log_integral(f, beta, lo=0.0, hi=1.0):
    """log integral_lo^hi exp(f(t)/beta) dt by Gauss-Legendre on panels that shrink towards both ends."""
    x, w = np.polynomial.legendre.leggauss(40)
    edges = np.array([0.0, *(2.0 ** -k for k in range(45, 1, -1)), 0.5, *(1 - 2.0 ** -k for k in range(2, 46)), 1.0])
    edges = lo + (hi - lo) * edges
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    exponent = f(middle + half * x) / beta
    top = exponent.max()
    return top + math.log((np.exp(exponent - top) * w * half).sum())


def log_normal_integral(beta, std=1.0):
    """log E[exp(std z / beta)] over the standard normal, on 12 standard deviations around the peak."""
    x, w = np.polynomial.legendre.leggauss(200)
    z = 12 * x + std / beta
    exponent = std * z / beta - z ** 2 / 2 - math.log(2 * math.pi) / 2
    return exponent.max() + math.log((np.exp(exponent - exponent.max()) * w).sum() * 12)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-9), (torch.float32, 3e-6)))
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("transform, f", (
    ("identity", lambda t: t), ("square", lambda t: t ** 2), ("sqrt", np.sqrt), ("log", np.log),
    (lambda t: t ** 3 - t, lambda t: t ** 3 - t), ("normal-icdf", None), ("scaled-normal-icdf", None)))
def test_partition_functions_against_quadrature(transform, f, beta, dtype, tolerance):
    std = 0.7 if transform == "scaled-normal-icdf" else 1.0
    truth = log_integral(f, beta) if f else log_normal_integral(beta, std)
    ours = qrpo.log_partition(torch.tensor([beta], dtype=dtype), transform, std).item()
    assert abs(ours - truth) <= tolerance * (1 + abs(truth))


def test_sqrt_partition_is_the_designs_formula_and_square_is_erfi():
    for beta in (0.05, 0.3, 1.0):
        formula = math.log(2 * beta * (beta + (1 - beta) * math.exp(1 / beta)))
        assert abs(qrpo.log_partition(torch.tensor([beta], dtype=torch.float64), "sqrt").item() - formula) < 1e-9
        x = 1 / math.sqrt(beta)
        erfi = 2 / math.sqrt(math.pi) * sum(x ** (2 * k + 1) / (math.factorial(k) * (2 * k + 1)) for k in range(150))
        formula = math.log(math.sqrt(math.pi * beta) / 2 * erfi)
        assert abs(qrpo.log_partition(torch.tensor([beta], dtype=torch.float64), "square").item() - formula) < 1e-9


def test_quantiles_count_ties_and_leave_out_unknown_rewards():
    q = qrpo.quantile_rewards(torch.tensor([1.0, 0.0, 5.0]), torch.tensor(
        [[0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 7.0, math.nan]]))
    assert q.tolist() == [0.75, 0.0, 0.5]


def random_rewards(kind, n, generator):
    return torch.tensor({"continuous": [generator.gauss(0, 1) for _ in range(n)],
                         "ties": [float(generator.randrange(4)) for _ in range(n)],
                         "pass or fail": [float(generator.random() < 0.4) for _ in range(n)],
                         "all equal": [0.5] * n}[kind]).double()


@pytest.mark.parametrize("kind", ("continuous", "ties", "pass or fail", "all equal"))
@pytest.mark.parametrize("transform", (*qrpo.TRANSFORMS, lambda t: t ** 3 - t / 2))
def test_exact_targets_average_to_one_over_the_pool(transform, kind):
    generator = random.Random(0)
    for n in (1, 2, 3, 8, 50):
        for beta in (3e-4, 0.03, 0.1, 1.0, 5.0):
            pool = random_rewards(kind, n, generator)
            b = torch.tensor([beta]).double()
            reward = qrpo.transformed_rewards(b, pool, pool.expand(n, n), transform, "exact", torch.ones(n, dtype=torch.bool), 0.7)
            target = reward / b - qrpo.log_partition(b, transform, 0.7)
            assert abs(target.exp().mean().item() - 1) < 1e-5, (n, beta)
            if kind == "all equal":
                assert target.abs().max() < 1e-6  # no signal, no change


@pytest.mark.parametrize("kind", ("continuous", "ties", "pass or fail", "all equal"))
def test_exact_targets_average_to_one_over_fresh_completions(kind):
    """A fresh completion and its n references are n + 1 equals, of which any may be the fresh one: the mean over that
    choice is the expectation, given their rewards.
    """
    generator = random.Random(1)
    for n in (1, 4, 16):
        for beta in (0.01, 0.1, 1.0):
            everything, b = random_rewards(kind, n + 1, generator), torch.tensor([beta]).double()
            others = torch.stack([everything[torch.arange(n + 1) != k] for k in range(n + 1)])  # (n+1, n)
            target = qrpo.target_log_ratios(b, everything, others, quantile="exact")
            assert abs(target.exp().mean().item() - 1) < 1e-5
            loss = qrpo.qrpo_loss(b, target - 7, torch.full((n + 1,), -7.0).double(), everything, others, quantile="exact")
            assert loss.max() < 1e-12  # a target is where the loss is 0


def test_published_targets_do_not_average_to_one_with_ties():
    beta, n = torch.tensor([0.1]), 10
    for passes in (0, 4, 10):  # all equal: log-ratio log(1/beta), up to the term that small beta forgets; p: about p/beta
        pool = torch.tensor([1.0] * passes + [0.0] * (n - passes))
        reward = qrpo.transformed_rewards(beta, pool, pool.expand(n, n))
        mean = (reward / beta - qrpo.log_partition(beta)).exp().mean().item()
        expected = 1 / 0.1 if passes in (0, n) else 0.4 / 0.1
        assert abs(mean - expected) < 0.05 * expected


def train_categorical(beta, quantile, rewards, ref_rewards, steps=1500):
    """Log-ratios of a softmax policy over equally likely outcomes, trained with qrpo_loss to convergence."""
    k = len(rewards)
    logits = torch.zeros(k, requires_grad=True, dtype=torch.float64)
    ref_logps = torch.full((k,), -math.log(k), dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logps = torch.log_softmax(logits, 0)
        loss = qrpo.qrpo_loss(torch.tensor([beta]).double(), logps, ref_logps, rewards, ref_rewards, quantile=quantile,
                              among_refs=torch.ones(k, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.log_softmax(logits, 0).detach() - ref_logps


@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_trained_categorical_policy_reaches_the_closed_form_optimum(beta):
    k, a = 1000, 1 / beta
    rewards = torch.arange(k).double()
    log_ratio = train_categorical(beta, "paper", rewards, rewards.expand(k, k))
    pi, q = log_ratio.exp() / k, (torch.arange(k) + 0.5) / k
    mean_q, kl = (pi * q).sum().item(), (pi * log_ratio).sum().item()
    log_Z = qrpo.log_partition(torch.tensor([beta]).double()).item()
    assert abs(mean_q - (1 / (1 - math.exp(-a)) - beta)) < 1e-2
    assert abs(kl - (a * mean_q - log_Z)) < 1e-2
    assert abs(mean_q - beta * kl - beta * log_Z) < 1e-2  # V = beta log Z
    assert abs((log_ratio > 0).double().mean().item() - (1 - beta * log_Z)) < 1e-2  # reference mass that rises: 1 - V


def test_exact_quantile_reaches_the_true_optimum_of_a_pass_fail_reward_and_the_published_one_does_not():
    beta, k, p = 0.2, 100, 0.39
    rewards = (torch.arange(k) < p * k).double()
    # best policy for the cells' soft-averaged reward: exp((R - V)/beta), flat within each tied group
    b = torch.tensor([beta]).double()
    reward = qrpo.transformed_rewards(b, rewards, rewards.expand(k, k), "identity", "exact", torch.ones(k, dtype=torch.bool))
    optimum = torch.log_softmax(reward / beta, 0) + math.log(k)
    exact = train_categorical(beta, "exact", rewards, rewards.expand(k, k))
    paper = train_categorical(beta, "paper", rewards, rewards.expand(k, k))
    assert (exact - optimum).abs().max() < 1e-2
    assert abs(exact[0].item() - 0.8) < 0.1 and abs(exact[-1].item() + 1.5) < 0.1
    assert (paper - optimum).abs().max() > 0.1


# ---- log-probabilities ----

def logp_case(pad):
    torch.manual_seed(0)
    prompt_lens, lens, vocab, dim = torch.tensor([3, 1, 5, 2]), torch.tensor([7, 6, 6, 9]), 11, 8
    tokens = torch.randint(vocab, (4, 9))
    tokens[torch.arange(9) >= lens[:, None]] = pad
    return torch.randn(4, 9, dim, requires_grad=True), tokens, prompt_lens, lens, torch.nn.Linear(dim, vocab)


@pytest.mark.parametrize("chunk_size", (1, 4, 1000))
@pytest.mark.parametrize("pad", (0, 10))
def test_completion_logps_against_a_plain_log_softmax(chunk_size, pad):
    hidden, tokens, prompt_lens, lens, head = logp_case(pad)
    tokens[0, 6] = pad  # pad == eos: the completion's own end token counts
    ours = qrpo.completion_logps(hidden, tokens, prompt_lens, lens, head, chunk_size)
    logps = torch.log_softmax(head(hidden), -1)
    plain = torch.stack([sum(logps[i, t - 1, tokens[i, t]] for t in range(prompt_lens[i], lens[i])) for i in range(4)])
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.sum(), [hidden, head.weight], retain_graph=True),
                    torch.autograd.grad(plain.sum(), [hidden, head.weight])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = qrpo.completion_logps(hidden[order], tokens[order], prompt_lens[order], lens[order], head, chunk_size)
    torch.testing.assert_close(shuffled, ours[order], rtol=0, atol=1e-5)


def test_only_the_states_before_completion_tokens_are_supervised():
    hidden, tokens, prompt_lens, lens, head = logp_case(0)
    grad, = torch.autograd.grad(qrpo.completion_logps(hidden, tokens, prompt_lens, lens, head).sum(), hidden)
    supervised = grad.abs().sum(-1) > 0
    for i in range(4):  # the state at t predicts the token at t+1
        assert supervised[i].nonzero()[:, 0].tolist() == list(range(prompt_lens[i] - 1, lens[i] - 1))


def test_per_sample_beta_is_a_tensor_and_nothing_overflows():
    n = 6
    logps, ref_logps = torch.randn(n) * 100 - 1e4, torch.randn(n) * 100 - 1e4
    rewards, refs = torch.randn(n), torch.randn(n, 8)
    betas = torch.tensor([3e-4, 1e-3, 0.01, 0.1, 1, 10])
    for transform in qrpo.TRANSFORMS:
        for quantile in ("paper", "exact"):
            together = qrpo.qrpo_loss(betas, logps, ref_logps, rewards, refs, transform, quantile)
            assert together.isfinite().all()
            alone = torch.cat([qrpo.qrpo_loss(betas[i:i + 1], logps[i:i + 1], ref_logps[i:i + 1], rewards[i:i + 1],
                                              refs[i:i + 1], transform, quantile) for i in range(n)])
            torch.testing.assert_close(together, alone)


def test_a_name_that_is_not_known_is_refused():
    one = torch.ones(1)
    for wrong in {"norm": "MSE"}, {"quantile": "Exact"}, {"transform": "logs"}:
        with pytest.raises(ValueError, match="choose from"):
            qrpo.qrpo_loss(one, one, one, one, torch.ones(1, 3), **wrong)
    with pytest.raises(ValueError, match="2 reference rewards"):  # known ones
        qrpo.qrpo_loss(one, one, one, one, torch.tensor([[1, torch.nan, torch.nan]]), "normal-icdf")
