"""The mathematics: losses against the published code, closed forms against another way to compute them."""
import json
import math
import random
import textwrap

import numpy as np
import pytest
import torch

import qrpo
from conftest import MATERIAL, ROOT

BETAS = (3e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 5.0)


# ---- losses ----

def golden(*names):
    """The cases of the authors' code for these losses: (inputs, loss, beta (1,), its value (batch,))."""
    for case in json.loads((MATERIAL / "golden_losses.json").read_text()):
        inputs = {key: torch.tensor(value) for key, value in case["inputs"].items()}
        for loss in case["losses"]:
            if loss["loss"] in names:
                yield inputs, loss, torch.tensor([loss["beta"]]), torch.tensor(loss["value"])


def assert_near(ours, theirs, tolerance, case=None):
    assert ((ours - theirs).abs() / (theirs.abs() + 1e-3)).max() < tolerance, case


def published_forms():
    """The three lines that the README and qrpo.py's docstring show, as functions."""
    for text in (ROOT / "README.md").read_text(), qrpo.__doc__:
        start = text.index("def qrpo_loss(")
        end = text.index("# eq. 11", start)
        indent = " " * (start - text.rindex("\n", 0, start) - 1)
        names = {"torch": torch}
        exec(textwrap.dedent(indent + text[start:end]), names)
        yield names["qrpo_loss"]


def test_the_published_form_that_is_shown_is_qrpo_loss_with_its_defaults():
    torch.manual_seed(0)
    refs = torch.randint(4, (50, 5)).float()  # with ties
    for beta in torch.tensor([3e-4]), torch.tensor([0.1]), torch.tensor([5.0]), torch.rand(50) + 0.01:
        inputs = beta, torch.randn(50), torch.randn(50), torch.randint(4, (50,)).float(), refs
        for published in published_forms():
            torch.testing.assert_close(published(*inputs), qrpo.qrpo_loss(*inputs), rtol=1e-4, atol=1e-6)


def scaled_normal_loss(beta, logps, ref_logps, rewards, ref_rewards, norm, std):
    """The published code's scaled-normal-icdf, as the comment at qrpo.TRANSFORMS says. std: (batch,)."""
    loss = qrpo.qrpo_loss(beta / std, logps, ref_logps, rewards, ref_rewards, "normal-icdf", norm=norm)
    return loss * (std ** 2 if norm == "mse" else std)


def test_qrpo_loss_by_hand_and_quantiles_count_ties():
    beta, logps, ref_logps = torch.tensor([0.5]), torch.tensor([-3.0, -2.0]), torch.tensor([-4.0, -2.0])
    rewards = torch.tensor([1.0, 0.0])
    ref_rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    beta_log_Z = 0.5 * math.log(0.5 * (math.exp(2) - 1))
    expected = [(0.75 - beta_log_Z - 0.5 * 1) ** 2, (0.0 - beta_log_Z) ** 2]
    loss = qrpo.qrpo_loss(beta, logps, ref_logps, rewards, ref_rewards)
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-5), (torch.float32, 2e-5)))
def test_qrpo_matches_the_published_code(dtype, tolerance):
    for x, loss, beta, theirs in golden("qrpo"):
        x, beta = {name: value.to(dtype) for name, value in x.items()}, beta.to(dtype)  # theirs is in float32
        side = loss["side"]
        logps, rest = x[f"logps_{side}"], (x[f"ref_logps_{side}"], x[f"rewards_{side}"], x["ref_rewards"])
        # the term of beta log Z that the published identity omits
        dropped = beta * torch.log1p(-torch.exp(-1 / beta))
        if loss["transform"] == "scaled-normal-icdf":
            std = x["ref_rewards"].std(1) / loss["mean_std_ref_rewards"]
            assert_near(scaled_normal_loss(beta, logps, *rest, loss["norm"], std), theirs, tolerance, loss)
            continue
        settings = {"transform": loss["transform"], "norm": loss["norm"]}
        as_published = logps - dropped / beta if loss["transform"] == "identity" else logps
        assert_near(qrpo.qrpo_loss(beta, as_published, *rest, **settings), theirs, tolerance, loss)
        if loss["beta"] < 0.1:
            assert dropped.abs() < 1e-8  # so that as it stands it agrees as well
        elif loss["norm"] == "mse":
            assert_near(qrpo.qrpo_loss(beta, logps, *rest, **settings), theirs, 1e-3, loss)


def test_dpo_simpo_and_rebel_match_the_published_code():
    for x, loss, beta, theirs in golden("dpo", "simpo", "rebel"):
        logps = x["logps_chosen"], x["logps_rejected"]
        ref_logps = x["ref_logps_chosen"], x["ref_logps_rejected"]
        if loss["loss"] == "dpo":
            ours = qrpo.dpo_loss(beta, *logps, *ref_logps)
        elif loss["loss"] == "simpo":
            lens = x["lengths_chosen"], x["lengths_rejected"]
            ours = qrpo.simpo_loss(beta, loss["gamma_beta_ratio"], *logps, *lens)
        else:
            log_ratios = logps[0] - ref_logps[0], logps[1] - ref_logps[1]
            ours = qrpo.rebel_loss(beta, *log_ratios, x["rewards_chosen"], x["rewards_rejected"])
        assert_near(ours, theirs, 1e-5, loss)


def test_length_normalised_dpo_by_hand():
    log_ratios = torch.tensor([3.0]).requires_grad_(), torch.tensor([-2.0]).requires_grad_()
    loss = qrpo.dpo_norm_loss(0.5, *log_ratios, torch.tensor([6]), torch.tensor([4]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))  # 0.5 (3/6 + 2/4) = 0.5
    chosen, rejected = torch.autograd.grad(loss, log_ratios)
    slope = 0.5 / (1 + math.exp(0.5))
    assert (chosen.item(), rejected.item()) == pytest.approx((-slope / 6, slope / 4))


def test_each_completion_may_have_its_own_beta_and_nothing_overflows():
    n = 6
    logps, ref_logps = torch.randn(n) * 100 - 1e4, torch.randn(n) * 100 - 1e4
    rewards, refs = torch.randn(n), torch.randn(n, 8)
    betas = torch.tensor([3e-4, 1e-3, 0.01, 0.1, 1, 10])
    for transform in qrpo.TRANSFORMS:
        for quantile in qrpo.QUANTILES:
            together = qrpo.qrpo_loss(betas, logps, ref_logps, rewards, refs, transform, quantile)
            assert together.isfinite().all()
            alone = []
            for i in range(n):
                one = [values[i:i + 1] for values in (betas, logps, ref_logps, rewards, refs)]
                alone.append(qrpo.qrpo_loss(*one, transform, quantile))
            torch.testing.assert_close(together, torch.cat(alone))


def test_unknown_names_are_refused():
    one = torch.ones(1)
    for wrong in {"norm": "MSE"}, {"quantile": "Exact"}, {"transform": "logs"}:
        with pytest.raises(ValueError, match="choose from"):
            qrpo.qrpo_loss(one, one, one, one, torch.ones(1, 3), **wrong)


def test_an_integer_beta_is_the_float():
    for transform in qrpo.TRANSFORMS:
        whole, floating = (qrpo.log_partition(torch.tensor([beta]), transform) for beta in (1, 1.0))
        assert whole == floating, transform


def test_the_published_normal_quantile_needs_two_known_reference_rewards():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="2 reference rewards"):
        qrpo.qrpo_loss(one, one, one, one, torch.tensor([[1, torch.nan, torch.nan]]), "normal-icdf")


# ---- partition functions ----

def log_integral(f, beta, lo=0.0, hi=1.0):
    """log integral_lo^hi exp(f(t)/beta) dt by Gauss-Legendre on panels that shrink towards both ends."""
    x, w = np.polynomial.legendre.leggauss(40)
    small = [2.0 ** -k for k in range(45, 1, -1)]
    edges = lo + (hi - lo) * np.array([0.0, *small, 0.5, *(1 - x for x in reversed(small)), 1.0])
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    exponent = f(middle + half * x) / beta
    top = exponent.max()
    return top + math.log((np.exp(exponent - top) * w * half).sum())


def log_normal_integral(beta):
    """log E[exp(z / beta)] over the standard normal, on 12 standard deviations around the peak."""
    x, w = np.polynomial.legendre.leggauss(200)
    z = 12 * x + 1 / beta
    exponent = z / beta - z ** 2 / 2 - math.log(2 * math.pi) / 2
    return exponent.max() + math.log((np.exp(exponent - exponent.max()) * w).sum() * 12)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-9), (torch.float32, 3e-6)))
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("transform, f", (
    ("identity", lambda t: t), ("square", lambda t: t ** 2), ("sqrt", np.sqrt), ("log", np.log),
    (lambda t: t ** 3 - t, lambda t: t ** 3 - t), ("normal-icdf", None)))
def test_partition_functions_against_quadrature(transform, f, beta, dtype, tolerance):
    truth = log_integral(f, beta) if f else log_normal_integral(beta)
    ours = qrpo.log_partition(torch.tensor([beta], dtype=dtype), transform).item()
    assert abs(ours - truth) <= tolerance * (1 + abs(truth))


# ---- quantiles ----

def test_unknown_reference_rewards_do_not_count():
    ref_rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 7.0, math.nan]])
    rewards, one = torch.tensor([1.0, 0.0, 5.0]), torch.ones(3)
    quantiles = qrpo.paper_quantile(one, rewards, ref_rewards, qrpo.TRANSFORMS["identity"])
    assert quantiles.tolist() == [0.75, 0.0, 0.5]
    lo, hi = qrpo.quantile_cells(rewards, ref_rewards)
    torch.testing.assert_close(lo, torch.tensor([1 / 5, 0.0, 1 / 3]))
    torch.testing.assert_close(hi, torch.tensor([4 / 5, 1 / 5, 2 / 3]))


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
            itself = torch.ones(n, dtype=torch.bool)
            target = qrpo.target_log_ratios(b, pool, pool.expand(n, n), transform, "exact", itself)
            assert abs(target.exp().mean().item() - 1) < 1e-5, (n, beta)
            if kind == "all equal":
                assert target.abs().max() < 1e-6  # no signal, no change


@pytest.mark.parametrize("kind", ("continuous", "ties", "pass or fail", "all equal"))
def test_exact_targets_average_to_one_over_fresh_completions(kind):
    """Any of n + 1 equals, a fresh completion and its n references, may be the fresh one: the mean over that
    choice is the expectation, given their rewards.
    """
    generator = random.Random(1)
    for n in (1, 4, 16):
        for beta in (0.01, 0.1, 1.0):
            everything, b = random_rewards(kind, n + 1, generator), torch.tensor([beta]).double()
            others = torch.stack([everything[torch.arange(n + 1) != k] for k in range(n + 1)])  # (n+1, n)
            target = qrpo.target_log_ratios(b, everything, others, quantile="exact")
            assert abs(target.exp().mean().item() - 1) < 1e-5
            ref_logps = torch.full((n + 1,), -7.0).double()
            loss = qrpo.qrpo_loss(b, target - 7, ref_logps, everything, others, quantile="exact")
            assert loss.max() < 1e-12  # a target is where the loss is 0


def test_published_targets_do_not_average_to_one_with_ties():
    beta, n = torch.tensor([0.1]), 10
    for passes in (0, 4, 10):  # all equal: about 1/beta; pass rate p: about p/beta
        pool = torch.tensor([1.0] * passes + [0.0] * (n - passes))
        mean = qrpo.target_log_ratios(beta, pool, pool.expand(n, n)).exp().mean().item()
        expected = 1 / 0.1 if passes in (0, n) else 0.4 / 0.1
        assert abs(mean - expected) < 0.05 * expected


# ---- what training reaches ----

def train_categorical(beta, quantile, rewards, ref_rewards, steps=1500):
    """Log-ratios of a softmax policy over equally likely outcomes, trained with QRPO to convergence."""
    k = len(rewards)
    logits = torch.zeros(k, requires_grad=True, dtype=torch.float64)
    ref_logps = torch.full((k,), -math.log(k), dtype=torch.float64)
    b = torch.tensor([beta]).double()
    itself = torch.ones(k, dtype=torch.bool)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logps = torch.log_softmax(logits, 0)
        loss = qrpo.qrpo_loss(b, logps, ref_logps, rewards, ref_rewards, quantile=quantile, among_refs=itself)
        loss = loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.log_softmax(logits, 0).detach() - ref_logps


@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_trained_categorical_policy_reaches_the_closed_form_optimum(beta):
    k, a = 250, 1 / beta
    rewards = torch.arange(k).double()
    log_ratio = train_categorical(beta, "paper", rewards, rewards.expand(k, k))
    pi, q = log_ratio.exp() / k, (torch.arange(k) + 0.5) / k
    mean_q, kl = (pi * q).sum().item(), (pi * log_ratio).sum().item()
    log_Z = qrpo.log_partition(torch.tensor([beta]).double()).item()
    assert abs(mean_q - (1 / (1 - math.exp(-a)) - beta)) < 1e-2
    assert abs(kl - (a * mean_q - log_Z)) < 1e-2
    assert abs(mean_q - beta * kl - beta * log_Z) < 1e-2  # V = beta log Z
    rises = (log_ratio > 0).double().mean().item()  # reference mass that rises: 1 - V
    assert abs(rises - (1 - beta * log_Z)) < 1e-2


def test_exact_quantile_reaches_the_true_optimum_of_a_pass_fail_reward_and_the_published_one_does_not():
    beta, k, p = 0.2, 100, 0.39
    rewards = (torch.arange(k) < p * k).double()
    # best policy for the cells' soft-averaged reward: exp((R - V)/beta), flat within each tied group
    b = torch.tensor([beta]).double()
    itself = torch.ones(k, dtype=torch.bool)
    identity = qrpo.TRANSFORMS["identity"]
    weight = qrpo.exact_quantile(b.expand(k), rewards, rewards.expand(k, k), identity, itself)
    optimum = torch.log_softmax(weight, 0) + math.log(k)
    exact = train_categorical(beta, "exact", rewards, rewards.expand(k, k))
    paper = train_categorical(beta, "paper", rewards, rewards.expand(k, k))
    assert (exact - optimum).abs().max() < 1e-2
    assert abs(exact[0].item() - 0.8) < 0.1 and abs(exact[-1].item() + 1.5) < 0.1
    assert (paper - optimum).abs().max() > 0.1


# ---- log-probabilities ----

@pytest.mark.parametrize("pad", (0, 10))
def test_completion_logps_against_a_sum_over_the_tokens_of_each_completion(pad):
    torch.manual_seed(0)
    prompt_lens, lens = torch.tensor([3, 1, 5, 2]), torch.tensor([7, 6, 6, 9])
    tokens, logits = torch.randint(11, (4, 9)), torch.randn(4, 9, 11, requires_grad=True)
    tokens[torch.arange(9) >= lens[:, None]] = pad
    tokens[0, 6] = pad  # pad == eos: the completion's own end token counts
    ours = qrpo.completion_logps(logits, tokens, prompt_lens, lens)
    each = logits.log_softmax(-1)
    plain = [sum(each[i, t - 1, tokens[i, t]] for t in range(prompt_lens[i], lens[i])) for i in range(4)]
    torch.testing.assert_close(ours, torch.stack(plain))
    grad, = torch.autograd.grad(ours.sum(), logits)
    for i in range(4):  # the logits at t predict the token at t+1, and no others are supervised
        where = grad[i].abs().sum(-1).nonzero()[:, 0].tolist()
        assert where == list(range(prompt_lens[i] - 1, lens[i] - 1))
