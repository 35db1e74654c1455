"""Kill every stage at random moments, start it again until it is done, and compare with an undisturbed run.

    python tests/kills.py --times=30                # every stage, one process and two, SIGKILL and SIGTERM
    python tests/kills.py --times=5 --stages=train

Prints one line for each: how many kills hit a living process, how many starts it took, and whether the
results are the same: the rows of generation and scoring, the bytes of the trained weights, the steps and
losses of metrics.jsonl, the files of prepare.py, the results of evaluate.py. Exits with 1 if anything
differs.
"""
import argparse
import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
REWARD = """
import time

def slow(prompts, completions, **columns):
    time.sleep(0.03)
    return [len(set(text)) / 64 for text in completions]
"""
# WORK is the folder of the undisturbed runs.
STAGES = {  # name: (script, its flags, numbers of processes to try)
    "prepare": ("data/minicode/prepare.py", "--steps=30", (1,)),
    "generate": ("generate_refs.py", "--model=WORK/prepare/model --data=WORK/prepare/test.jsonl --num_refs=4 "
                 "--max_new_tokens=16 --batch_size=8", (1, 2)),
    "score": ("score.py", "--data=WORK/generate --reward=WORK/reward.py:slow", (1, 2)),
    "train": ("train.py", "--model=WORK/prepare/model --data=WORK/score --resume --batch_size=32 "
              "--learning_rate=1e-3 --save_every=3 --epochs=2", (1, 2)),
    "evaluate": ("evaluate.py", "--model=WORK/train --ref_model=WORK/prepare/model --data=WORK/samples.jsonl",
                 (1,)),
}


def command(stage, work, out, ranks):
    """The command line of a stage that reads from the folder `work` and writes `out`."""
    script, flags, _ = STAGES[stage]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / script), *flags.replace("WORK", str(work)).split(), f"--out={out}"]


def result(stage, out):
    """What must be the same."""
    if stage == "prepare":
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if stage == "evaluate":
        return json.loads((out / "results.json").read_text())
    if stage == "train":
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        return [weights, [(row["step"], row["loss"]) for row in log]]
    return sorted(line for part in out.glob("part-*.jsonl") for line in part.read_text().splitlines())


def undisturbed(work):
    """Run all stages in the folder `work`. Returns (stage, processes) -> seconds, and -> result. Training in
    two processes has a result of its own: sums over ranks round differently.
    """
    seconds, expected = {}, {}
    (work / "reward.py").write_text(REWARD)
    for stage, (_, _, processes) in STAGES.items():
        for ranks in processes if stage == "train" else (1,):
            out = work / (stage if ranks == 1 else f"{stage}{ranks}")
            started = time.time()
            subprocess.run(command(stage, work, out, ranks), check=True, env=ENVIRONMENT, capture_output=True)
            seconds[stage, ranks], expected[stage, ranks] = time.time() - started, result(stage, out)
        if stage == "score":  # the references once more, as if a policy had sampled them
            with open(work / "samples.jsonl", "w") as file:
                for line in expected["score", 1]:
                    row = json.loads(line)
                    row |= {"samples": row["ref_completions"], "sample_rewards": row["ref_rewards"]}
                    file.write(json.dumps(row) + "\n")
    return seconds, expected


def kill(process, signum):
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.terminate()  # torchrun passes it on
    process.wait()


def trial(arguments, moment, signum, kills_left):
    """Start a command until it is done, killing it at random moments as long as kills are left. Returns the
    number of kills, and how often each exit code occurred.
    """
    kills, codes = 0, collections.Counter()
    while 0 not in codes:
        process = subprocess.Popen(arguments, env=ENVIRONMENT, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment() if kills < kills_left else None)
        except subprocess.TimeoutExpired:
            kills += 1
            kill(process, signum)
        codes[process.returncode] += 1
    return kills, codes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="kills of each stage (default %(default)s)")
    parser.add_argument("--stages", default=",".join(STAGES), help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        seconds, expected = undisturbed(work)
        cases = [(stage, ranks, signum) for stage in args.stages.split(",") for ranks in STAGES[stage][2]
                 for signum in (signal.SIGKILL, signal.SIGTERM)]
        for stage, ranks, signum in cases:
            kills, trials, different, codes = 0, 0, 0, collections.Counter()
            while kills < args.times:
                out = work / f"{stage}-{ranks}-{signum.name}-{trials}"
                found = trial(command(stage, work, out, ranks),
                              lambda: rng.uniform(1, 1.2 * seconds[stage, 1]), signum, args.times - kills)
                kills, codes, trials = kills + found[0], codes + found[1], trials + 1
                different += result(stage, out) != expected.get((stage, ranks), expected[stage, 1])
            same = f"{different} DIFFER" if different else "the same as undisturbed"
            print(f"{stage:10} {ranks} process{'es' if ranks > 1 else '  '} {signum.name}: {kills} kills in "
                  f"{codes.total()} starts, exit codes {dict(codes)}, {trials} results, {same}", flush=True)
            failed |= different > 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
