"""The sweeps of the paper (arXiv 2507.08068), and their miniature on minicode, as data.

A grid is a function that yields runs; a run is {"name", "folder", "command"}: a stable name that holds all that tells
it from the others, the folder it writes, and the shell command that makes it (run.sh). A run that stands in two grids
has one name, and is trained once. The grids refs, mini_refs and stories_refs make the reference data of the others. To
see one:

    python paper/sweep.py list chat
"""
from itertools import product
from shlex import quote

LEARNING_RATES = "1e-7", "3e-7", "1e-6"
MODELS = {"llama": "allenai/Llama-3.1-Tulu-3-8B-SFT", "mistral": "mistralai/Mistral-7B-Instruct-v0.2"}
STEPS = {"magpie": 160, "ultrafeedback": 100, "leetcode": 40}  # between checkpoints
LARGE = "--max_length=2048 --gradient_checkpointing --shard"
DATA = {"magpie": "data/magpie_air", "ultrafeedback": "data/ultrafeedback", "leetcode": "data/leetcode"}
BETAS = {"qrpo": ("3e-4", "1e-3", "3e-3"), "dpo": ("1e-2", "3e-2", "1e-1"), "rebel": ("1e-6", "1e-4", "1e-2"),
         "simpo": ("2", "2.5", "10")}
CODE_BETAS = BETAS | {"qrpo": ("3e-3", "1e-2", "3e-2"), "rebel": ("1e-4", "1e-2", "1")}
REGIMES = {"offline": "--train_on=chosen_rejected", "offpolicy2best": "--train_on=best_worst --num_candidates=6",
           "offpolicy2random": "--train_on=random_pairs --num_candidates=2",
           "offpolicy10random": "--train_on=random_pairs --num_candidates=20"}


def run(name, out, arguments, **env):
    """One run of run.sh with the folder of its references, OUT, and its own in it, OUT/NAME."""
    settings = "".join(f"{key}={quote(str(value))} " for key, value in {"OUT": out, "RUN": name, **env}.items())
    return {"name": name, "folder": f"{out}/{name}", "command": f"{settings}bash run.sh {arguments}"}


# ---- at full scale: everything of one model, data set and start shares the references in one OUT ----

def start(model, data, sft):
    """(what the names begin with, OUT, the environment): from the hub's model, or from it fine-tuned on `chosen`."""
    name = f"{model}-{data}-{sft}"
    path = MODELS[model] if sft == "nosft" else f"out/paper/{model}-{data}-nosft/{model}-{data}-sft"
    reward = "tests" if data == "leetcode" else "model:RLHFlow/ArmoRM-Llama3-8B-v0.1"
    return name, f"out/paper/{name}", {
        "MODEL": path, "DATA": DATA[data], "REWARD": reward, "SEED": 27,
        "GENERATE": "--num_refs=50 --max_new_tokens=2048", "SCORE": "" if reward == "tests" else "--trust_remote_code",
        "EVALUATE": f"--num_refs=3 --top_p=0.9 --temperature={0.6 if model == 'llama' else 0.7}"}


def full(model, data, sft, regime, loss, n, beta, lr):
    """128 pairs a step: for QRPO, which is pointwise, 256 completions. n: reference rewards; of QRPO alone."""
    name, out, env = start(model, data, sft)
    flags = (f"--loss={loss} --beta={beta} --learning_rate={lr} --batch_size={256 if loss == 'qrpo' else 128} "
             f"{REGIMES[regime]} {LARGE} --save_every={STEPS[data]} --eval_every={STEPS[data]}")
    if loss == "qrpo":
        loss, flags = f"qrpo-n{n}", f"{flags} --num_ref_rewards={n}"
    return run(f"{name}-{regime}-{loss}-beta{beta}-lr{lr}", out, f"train {flags}", **env)


def chat():
    for data, model, sft, regime in product(("magpie", "ultrafeedback"), MODELS, ("sft", "nosft"),
                                            ("offline", "offpolicy2best", "offpolicy2random")):
        losses = [("qrpo", n) for n in ((1, 3) if data == "magpie" else (3,))] + [
            (loss, 0) for loss in ("dpo", "rebel", "simpo")]
        for (loss, n), lr in product(losses, LEARNING_RATES):
            for beta in BETAS[loss]:
                yield full(model, data, sft, regime, loss, n, beta, lr)


def scaling():
    for regime, n, beta, lr in product(("offline", "offpolicy2random"), (1, 3, 10, 25, 50), ("3e-3", "1e-2", "1e-1"),
                                       LEARNING_RATES):
        yield full("llama", "magpie", "sft", regime, "qrpo", n, beta, lr)


def code():
    for sft, loss, lr in product(("sft", "nosft"), CODE_BETAS, LEARNING_RATES):
        for beta in CODE_BETAS[loss]:
            yield full("llama", "leetcode", sft, "offpolicy10random", loss, 20, beta, lr)


STARTS = [*product(MODELS, ("magpie", "ultrafeedback")), ("llama", "leetcode")]


def sft():
    """The fine-tuned models that the other runs start from. nosft is 0 epochs: the model itself, so its references."""
    for model, data in STARTS:
        _, out, env = start(model, data, "nosft")
        flags = "--train_on=completion --epochs=3" if data == "leetcode" else "--train_on=chosen_rejected"
        yield refs_of(model, data, "nosft")
        yield run(f"{model}-{data}-sft", out, f"train --loss=sft {flags} --learning_rate=5e-7 --batch_size=128 "
                  f"--max_grad_norm=10 {LARGE}", **env)


def refs_of(*which):
    name, out, env = start(*which)
    return run(f"{name}-refs", out, "refs", **env)


def refs():
    """All reference data: first --only='*nosft*', then the grid sft, then the rest."""
    for sft, which in product(("nosft", "sft"), STARTS):
        yield refs_of(*which, sft)


# ---- the miniature: minicode (run.sh's default model and data), every method with three seeds ----

MINI_REGIMES = {  # train_on: (flags, epochs): 64 completions a step, and about 80 steps for every method
    "refs": ("--train_on=refs", 1),                                     # 5120 completions
    "best_worst": ("--train_on=best_worst", 8),                         # 640: one pair for each of 320 prompts
    "random_pairs": ("--train_on=random_pairs --num_candidates=2", 8),  # 640, of whatever reward
    "offline": ("--train_on=chosen_rejected", 8)}                       # 640, the dataset's: right ones and mistaken
MINI_PAIRS = {"dpo": ("0.03", "0.1", "0.3"), "rebel": ("0.03", "0.1", "0.3"), "simpo": ("2", "5", "10")}


def mini():
    for seed in (0, 1, 2):
        def one(name, flags, epochs, batch_size=64):
            return run(f"{name}-seed{seed}", f"out/mini/seed{seed}",
                       f"train {flags} --epochs={epochs} --batch_size={batch_size} --eval_every=20", SEED=seed,
                       EVALUATE="--num_refs=8")

        for quantile, beta, lr, regime in product(("paper", "exact"), ("0.03", "0.1", "0.3"), ("1e-4", "3e-4"),
                                                  MINI_REGIMES):
            regime_flags, epochs = MINI_REGIMES[regime]
            flags = f"--loss=qrpo --quantile={quantile} --beta={beta} --learning_rate={lr} {regime_flags}"
            yield one(f"qrpo-{quantile}-{regime}-beta{beta}-lr{lr}", flags, epochs)
            if regime in ("refs", "offline") and lr == ("1e-4" if beta == "0.03" else "3e-4"):
                for n in (1, 3, 8):  # fewer reference rewards; all 16 are the run above
                    yield one(f"qrpo-{quantile}-{regime}-n{n}-beta{beta}-lr{lr}", f"{flags} --num_ref_rewards={n}",
                              epochs)
        for lr in ("3e-5", "1e-4", "3e-4"):
            for loss, betas in MINI_PAIRS.items():
                regime_flags, epochs = MINI_REGIMES["best_worst"]
                for beta in betas:  # 32 pairs are 64 completions
                    yield one(f"{loss}-best_worst-beta{beta}-lr{lr}",
                              f"--loss={loss} --beta={beta} --learning_rate={lr} {regime_flags}", epochs, batch_size=32)
        for lr in ("1e-4", "3e-4", "1e-3"):  # a quarter of the references are right
            yield one(f"sft-correct-lr{lr}", f"--loss=sft --learning_rate={lr} --train_on=refs --min_reward=1", 4)


def mini_refs():
    for seed in (0, 1, 2):
        yield run(f"refs-seed{seed}", f"out/mini/seed{seed}", "refs", SEED=seed)


# ---- length (figure 4): stories260K, whose stories mostly end after 150 to 400 tokens, in data/stories/model ----

STORIES_BETAS = {"qrpo": ("0.03", "0.1"), "dpo": ("0.1", "0.3"), "rebel": ("1", "3"), "simpo": ("2", "10")}


def stories_run(name, seed, arguments):
    return run(f"{name}-seed{seed}", f"out/stories/seed{seed}", arguments, SEED=seed, MODEL="data/stories/model",
               DATA="data/stories", REWARD="data/stories/reward.py:happy",
               GENERATE="--num_refs=8 --max_new_tokens=400", EVALUATE="--num_refs=4")


def stories():
    """Every method on the same 320 pairs, best and worst of 8, for 40 steps of 64 completions."""
    for seed, lr, loss in product((0, 1, 2), ("3e-5", "1e-4"), STORIES_BETAS):
        for beta in STORIES_BETAS[loss]:
            yield stories_run(f"{loss}-beta{beta}-lr{lr}", seed, f"train --loss={loss} --beta={beta} "
                              f"--learning_rate={lr} --train_on=best_worst --epochs=4 "
                              f"--batch_size={64 if loss == 'qrpo' else 32}")


def stories_refs():
    for seed in (0, 1, 2):
        yield stories_run("stories-refs", seed, "refs")
