"""The sweeps of the paper (arXiv 2507.08068), and a miniature of them on the minicode dataset.

A grid is a function without arguments that yields runs. A run is a dictionary: `name`, which says how it
differs from the others; `folder`, where it writes; and `command`, a shell command, here paper/pipeline.sh. A
run that two grids share has the same name in both and is trained once. To list the runs of a grid:

    python paper/sweep.py list chat
"""
import os
from itertools import product
from shlex import quote


def run(name, out, arguments, **env):
    """A run of pipeline.sh with its reference data in OUT and everything of its own in OUT/NAME."""
    env = {"OUT": out, "RUN": name, **env}
    settings = " ".join(f"{key}={quote(str(value))}" for key, value in env.items())
    command = f"{settings} bash paper/pipeline.sh {arguments}"
    return {"name": name, "folder": f"{out}/{name}", "command": command}


# ---- full scale: refs and sft make reference data and models; chat, scaling and code compare methods ----

MODELS = {"llama": "allenai/Llama-3.1-Tulu-3-8B-SFT", "mistral": "mistralai/Mistral-7B-Instruct-v0.2"}
DATA = {"magpie": "data/magpie_air", "ultrafeedback": "data/ultrafeedback", "leetcode": "data/leetcode"}
REWARD_MODEL = "model:RLHFlow/ArmoRM-Llama3-8B-v0.1"
LARGE = "--max_length=2048 --gradient_checkpointing --shard"
STEPS = {"magpie": 160, "ultrafeedback": 100, "leetcode": 40}  # between checkpoints
REGIMES = {
    "offline": "--train_on=chosen_rejected",
    "offpolicy2best": "--train_on=best_worst --num_candidates=6",
    "offpolicy2random": "--train_on=random_pairs --num_candidates=2",
    "offpolicy10random": "--train_on=random_pairs --num_candidates=20",
}
LEARNING_RATES = "1e-7", "3e-7", "1e-6"
CHAT_BETAS = {
    "qrpo": ("3e-4", "1e-3", "3e-3"),
    "dpo": ("1e-2", "3e-2", "1e-1"),
    "rebel": ("1e-6", "1e-4", "1e-2"),
    "simpo": ("2", "2.5", "10"),
}
CODE_BETAS = CHAT_BETAS | {"qrpo": ("3e-3", "1e-2", "3e-2"), "rebel": ("1e-4", "1e-2", "1")}


def start(model, data, sft):
    """What the runs of one starting model and dataset share: prefix of their names, OUT, environment.

    sft: "nosft" is the model from the hub; "sft" is that model fine-tuned by the grid sft.
    """
    name = f"{model}-{data}-{sft}"
    path = MODELS[model]
    if sft == "sft":
        path = f"out/paper/{model}-{data}-nosft/{model}-{data}-sft"
    temperature = {"llama": 0.6, "mistral": 0.7}[model]
    env = {
        "MODEL": path,
        "DATA": DATA[data],
        "SEED": 27,
        "GENERATE": "--num_refs=50 --max_new_tokens=2048",
        "EVALUATE": f"--num_refs=3 --top_p=0.9 --temperature={temperature}",
    }
    if data != "leetcode":
        env |= {"REWARD": REWARD_MODEL, "SCORE": "--model_class=paper/armorm.py:ArmoRM"}
    return name, f"out/paper/{name}", env


def method(where, regime, loss, beta, lr):
    """A run that compares methods. where: (model, data, sft). loss: qrpo-nN is QRPO with N reference rewards.

    A step has 128 pairs; QRPO is pointwise, so its step has 256 completions.
    """
    name, out, env = start(*where)
    steps = STEPS[where[1]]
    kind, _, num_ref_rewards = loss.partition("-n")
    batch_size = 256 if kind == "qrpo" else 128
    flags = (f"--loss={kind} --beta={beta} --learning_rate={lr} --batch_size={batch_size} {REGIMES[regime]} "
             f"{LARGE} --save_every={steps} --eval_every={steps}")
    if num_ref_rewards:
        flags += f" --num_ref_rewards={num_ref_rewards}"
    return run(f"{name}-{regime}-{loss}-beta{beta}-lr{lr}", out, f"train {flags}", **env)


def chat():
    regimes = "offline", "offpolicy2best", "offpolicy2random"
    for data, model, sft in product(("magpie", "ultrafeedback"), MODELS, ("sft", "nosft")):
        losses = ["qrpo-n3", "dpo", "rebel", "simpo"]
        if data == "magpie":
            losses.append("qrpo-n1")
        for regime, loss, lr in product(regimes, losses, LEARNING_RATES):
            for beta in CHAT_BETAS[loss.partition("-")[0]]:
                yield method((model, data, sft), regime, loss, beta, lr)


def scaling():
    """More reference rewards: figure 3."""
    regimes = "offline", "offpolicy2random"
    betas = "3e-3", "1e-2", "1e-1"
    for regime, n, beta, lr in product(regimes, (1, 3, 10, 25, 50), betas, LEARNING_RATES):
        yield method(("llama", "magpie", "sft"), regime, f"qrpo-n{n}", beta, lr)


def code():
    losses = "qrpo-n20", "dpo", "rebel", "simpo"
    for sft, loss, lr in product(("sft", "nosft"), losses, LEARNING_RATES):
        for beta in CODE_BETAS[loss.partition("-")[0]]:
            yield method(("llama", "leetcode", sft), "offpolicy10random", loss, beta, lr)


def starts(sft):
    """(model, data, sft) of all starting models."""
    for model, data in product(MODELS, ("magpie", "ultrafeedback")):
        yield model, data, sft
    yield "llama", "leetcode", sft


def reference_data(where):
    name, out, env = start(*where)
    return run(f"{name}-refs", out, "refs", **env)


def sft():
    """The fine-tuned models, and the reference data of the models from the hub that their evaluation needs.
    """
    for where in starts("nosft"):
        model, data, _ = where
        _, out, env = start(*where)
        regime = "--train_on=completion --epochs=3" if data == "leetcode" else "--train_on=chosen"
        flags = f"--loss=sft {regime} --learning_rate=5e-7 --batch_size=128 --max_grad_norm=10 {LARGE}"
        yield reference_data(where)
        yield run(f"{model}-{data}-sft", out, f"train {flags}", **env)


def refs():
    """All reference data: first --only='*nosft*', then the grid sft, then the rest."""
    for where in [*starts("nosft"), *starts("sft")]:
        yield reference_data(where)


# ---- the miniature: run.sh's default model and data, every method, three seeds ----

DEFAULT = "--beta=0.1 --learning_rate=3e-4 --epochs=2 --batch_size=64"  # run.sh's, for minicode

SEEDS = 0, 1, 2
MINI_REGIMES = {  # about 80 steps of 64 completions: 5120 references, or a pair for each of 320 prompts
    "refs": "--train_on=refs --epochs=1",
    "best_worst": "--train_on=best_worst --epochs=8",
    "random_pairs": "--train_on=random_pairs --num_candidates=2 --epochs=8",
    "offline": "--train_on=chosen_rejected --epochs=8",
}
MINI_BETAS = {"dpo": ("0.03", "0.1", "0.3"), "rebel": ("0.03", "0.1", "0.3"), "simpo": ("2", "5", "10")}


def mini():
    for seed in SEEDS:
        betas = "0.03", "0.1", "0.3"
        for settings in product(("paper", "exact"), betas, ("1e-4", "3e-4"), MINI_REGIMES):
            yield from mini_qrpo(seed, *settings)
        for lr in ("3e-5", "1e-4", "3e-4"):
            for loss, betas in MINI_BETAS.items():
                for beta in betas:
                    name = f"{loss}-best_worst-beta{beta}-lr{lr}"
                    flags = f"--loss={loss} --beta={beta} --learning_rate={lr} {MINI_REGIMES['best_worst']}"
                    yield mini_run(seed, name, flags, batch_size=32)  # 32 pairs are 64 completions
        for lr in ("1e-4", "3e-4", "1e-3"):
            # a quarter of the references are right, so 4 epochs
            flags = f"--loss=sft --learning_rate={lr} --train_on=refs --min_reward=1 --epochs=4"
            yield mini_run(seed, f"sft-correct-lr{lr}", flags)


def mini_qrpo(seed, quantile, beta, lr, regime):
    """QRPO with all 16 reference rewards, and at the better learning rate of each beta with fewer."""
    flags = f"--loss=qrpo --quantile={quantile} --beta={beta} --learning_rate={lr} {MINI_REGIMES[regime]}"
    yield mini_run(seed, f"qrpo-{quantile}-{regime}-beta{beta}-lr{lr}", flags)
    better_lr = "1e-4" if beta == "0.03" else "3e-4"
    if regime in ("refs", "offline") and lr == better_lr:
        for n in (1, 3, 8):
            name = f"qrpo-{quantile}-{regime}-n{n}-beta{beta}-lr{lr}"
            yield mini_run(seed, name, f"{flags} --num_ref_rewards={n}")


def mini_run(seed, name, flags, batch_size=64):
    arguments = f"train {DEFAULT} {flags} --batch_size={batch_size} --eval_every=20"
    return run(f"{name}-seed{seed}", f"out/mini/seed{seed}", arguments, SEED=seed, EVALUATE="--num_refs=8")


def mini_refs():
    for seed in SEEDS:
        yield run(f"refs-seed{seed}", f"out/mini/seed{seed}", "refs", SEED=seed)


# ---- the frontier: reward against KL, of every method over its beta or learning rate ----

FRONTIER = [  # name, flags beside DEFAULT
    ("forward_kl-beta0.1", "--loss=forward_kl --quantile=exact --beta=0.1"),
    ("qrpo-beta0.1", "--loss=qrpo --beta=0.1"),
    ("sft-lr3e-4", "--loss=sft --min_reward=1 --epochs=4"),
    ("dpo-beta0.3-lr1e-4", "--loss=dpo --beta=0.3 --learning_rate=1e-4"),
    ("qrpo-best", "--loss=qrpo --min_reward=1 --epochs=4"),  # on what sft imitates
    ("forward_kl-beta0.5", "--loss=forward_kl --quantile=exact --beta=0.5"),
    ("qrpo-beta0.5", "--loss=qrpo --beta=0.5"),
    ("sft-lr1e-3", "--loss=sft --min_reward=1 --epochs=4 --learning_rate=1e-3"),
    ("sft-lr1e-4", "--loss=sft --min_reward=1 --epochs=4 --learning_rate=1e-4"),
    ("dpo-beta0.1-lr1e-4", "--loss=dpo --beta=0.1 --learning_rate=1e-4"),
    ("dpo-beta0.3-lr3e-4", "--loss=dpo --beta=0.3"),
    ("rebel-beta0.1", "--loss=rebel --beta=0.1"),
    ("simpo-beta5", "--loss=simpo --beta=5 --learning_rate=1e-4"),
    ("forward_kl-beta0.2", "--loss=forward_kl --quantile=exact --beta=0.2"),
    ("qrpo-beta0.2", "--loss=qrpo --beta=0.2"),
    ("dpo_norm-beta5", "--loss=dpo_norm --beta=5 --learning_rate=1e-4"),
]
ONLINE = "qrpo-beta0.1", "forward_kl-beta0.1"  # continued on fresh samples
PAIRS = "dpo", "dpo_norm", "rebel", "simpo"
PAIR_FLAGS = " --train_on=best_worst --epochs=8 --batch_size=32"


def frontier():
    """Pairs, the best and the worst of a prompt's references, are passed over 8 times: 80 steps of 32 pairs.
    A quarter of the references are right, so SFT and qrpo-best make as many steps in 4 passes, the others
    160 in 2.
    """
    for seed, (name, flags) in product(SEEDS, FRONTIER):
        if name.partition("-")[0] in PAIRS:
            flags += PAIR_FLAGS
        env = {}
        if name in ONLINE:
            env["ONLINE"] = "--learning_rate=3e-4 --max_new_tokens=64"
        yield seed_run("frontier", seed, name, f"train {DEFAULT} {flags}", **env)


def frontier_refs():
    for seed in SEEDS:
        yield seed_run("frontier", seed, "refs", "refs")


def seed_run(grid, seed, name, arguments, **env):
    """Seeds have folders of their own, not names: online.py's record names the model that it starts from."""
    found = run(name, f"out/{grid}/seed{seed}", arguments, SEED=seed, **env)
    return found | {"name": f"{name}-seed{seed}"}


# ---- the same where right programs are rare: minicode's harder variant, see data/minicode/prepare.py ----

HARD = {name: flags for name, flags in FRONTIER if name in (
    "forward_kl-beta0.1", "qrpo-beta0.1", "sft-lr3e-4", "sft-lr1e-4", "dpo-beta0.3-lr1e-4",
    "qrpo-beta0.5", "forward_kl-beta0.5")}
HARD |= {  # most rewards tie here
    "qrpo-exact-beta0.1": "--loss=qrpo --quantile=exact",
    "qrpo-exact-beta0.1-lr1e-4": "--loss=qrpo --quantile=exact --learning_rate=1e-4",
    "forward_kl-beta0.1-lr1e-4": "--loss=forward_kl --quantile=exact --learning_rate=1e-4",
}
HARD_ENV = {"MODEL": "data/hardcode/model", "DATA": "data/hardcode", "GENERATE": "--max_new_tokens=80"}


def hard():
    for seed, name in product(SEEDS, HARD):
        flags = f"{DEFAULT} {HARD[name]}"
        env = dict(HARD_ENV)
        if name.partition("-")[0] in PAIRS:
            flags += PAIR_FLAGS
        if name in ONLINE:
            env["ONLINE"] = "--learning_rate=3e-4 --max_new_tokens=80"
        yield seed_run("hard", seed, name, f"train {flags}", **env)


def hard_refs():
    for seed in SEEDS:
        yield seed_run("hard", seed, "refs", "refs", **HARD_ENV)


# ---- length (figure 4): tests/data/stories260K; most stories end after 150 to 400 tokens ----

STORIES_BETAS = {"qrpo": ("0.03", "0.1"), "dpo": ("0.1", "0.3"), "rebel": ("1", "3"), "simpo": ("2", "10")}


def stories():
    """Every method on the same 320 pairs, the best and the worst of 8 references: 40 steps of 64 completions.
    """
    for seed, lr, loss in product(SEEDS, ("3e-5", "1e-4"), STORIES_BETAS):
        batch_size = 64 if loss == "qrpo" else 32
        for beta in STORIES_BETAS[loss]:
            flags = (f"--loss={loss} --beta={beta} --learning_rate={lr} --train_on=best_worst --epochs=4 "
                     f"--batch_size={batch_size}")
            yield stories_run(seed, f"{loss}-beta{beta}-lr{lr}", f"train {flags}")


def stories_refs():
    for seed in SEEDS:
        yield stories_run(seed, "stories-refs", "refs")


def stories_run(seed, name, arguments):
    env = {
        "SEED": seed,
        "MODEL": "tests/data/stories260K",
        "DATA": "data/stories",
        "REWARD": "data/stories/reward.py:happy",
        "GENERATE": "--num_refs=8 --max_new_tokens=400",
        "EVALUATE": "--num_refs=4",
    }
    return run(f"{name}-seed{seed}", f"out/stories/seed{seed}", arguments, **env)


# ---- a real chat model: SmolLM2-135M-Instruct on data/sentences, two rewards ----

SMOLLM2 = os.environ.get("SMOLLM2", "HuggingFaceTB/SmolLM2-135M-Instruct")  # a folder, where there is no hub
REAL = "--beta=0.1 --batch_size=32 --lora=16 --dtype=bfloat16 --micro_batch_tokens=2048"
# 32 steps of 32 completions: half of the references, or two passes over the pairs; or 3 over the good ones
REAL_LOSSES = {
    "qrpo": ("--num_candidates=4", ("1e-4", "3e-4")),
    "qrpo-beta0.5": ("--beta=0.5 --num_candidates=4", ("1e-4", "3e-4")),
    "qrpo-best": ("--min_reward=0.7 --epochs=3", ("1e-4", "3e-4")),  # on what sft imitates
    "qrpo-exact": ("--loss=qrpo --quantile=exact --num_candidates=4", ("3e-5", "1e-4")),
    "forward_kl": ("--loss=forward_kl --quantile=exact --num_candidates=4", ("1e-4", "3e-4")),
    "sft": ("--loss=sft --min_reward=0.7 --epochs=3", ("1e-4", "3e-4")),
    "dpo": ("--loss=dpo", ("3e-5", "1e-4")),
    "rebel": ("--loss=rebel", ("3e-5", "1e-4")),
    "simpo": ("--loss=simpo --beta=5", ("3e-5", "1e-4")),
}
REAL_PAIRS = " --train_on=best_worst --epochs=2 --batch_size=16"


def real():
    """Sentiment is smooth. Two_sentences has three levels, so there `paper` and `exact` differ most."""
    for reward, seed, loss in product(("sentiment", "two_sentences"), SEEDS, REAL_LOSSES):
        if (reward, loss) == ("sentiment", "qrpo-exact"):
            continue
        flags, learning_rates = REAL_LOSSES[loss]
        if loss in PAIRS:
            flags += REAL_PAIRS
        for lr in learning_rates:
            yield real_run(reward, seed, f"{loss}-lr{lr}", f"train {REAL} {flags} --learning_rate={lr}")


def real_refs():
    for reward, seed in product(("sentiment", "two_sentences"), SEEDS):
        yield real_run(reward, seed, "refs", "refs")


def real_run(reward, seed, name, arguments):
    env = {
        "MODEL": SMOLLM2,
        "DATA": "data/sentences",
        "REWARD": f"data/sentences/reward.py:{reward}",
        "GENERATE": "--num_refs=8 --max_new_tokens=48 --dtype=float32",
        "EVALUATE": "--num_refs=4",
    }
    return seed_run(f"real/{reward}", seed, f"{reward}-{name}", arguments, **env)
