"""Kill every stage at random moments, start it again until it is done, and compare with a run that nobody disturbed.

    python tests/kills.py --times=30                    # every stage, one process and two, SIGKILL and SIGTERM
    python tests/kills.py --times=5 --stages=train      # a part of it

Prints one line for each: how many kills hit a living process, how many starts it took, and whether the results are the
same: the rows of generation and scoring, the bytes of the trained weights, the steps and losses of metrics.jsonl, the
files of prepare.py, the results of evaluate.py. Ends with 1 where anything differs.
"""
import argparse
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
STAGES = "prepare", "generate", "score", "train", "evaluate"


def command(stage, work, out, ranks):
    """The command line of a stage that reads the undisturbed run's folder `work` and writes `out`."""
    script, flags = {
        "prepare": ("data/minicode/prepare.py", [f"--out={out}", "--steps=30"]),
        "generate": ("generate_refs.py", [f"--model={work}/prepare/model", f"--data={work}/prepare/test.jsonl",
                                          f"--out={out}", "--num_refs=4", "--max_new_tokens=16", "--batch_size=8"]),
        "score": ("score.py", [f"--data={work}/generate", f"--out={out}", f"--reward={work}/reward.py:slow"]),
        "train": ("train.py", [f"--model={work}/prepare/model", f"--data={work}/score", f"--out={out}", "--resume",
                               "--batch_size=32", "--learning_rate=1e-3", "--save_every=3", "--epochs=2"]),
        "evaluate": ("evaluate.py", [f"--model={work}/train", f"--ref_model={work}/prepare/model", f"--out={out}",
                                     f"--data={work}/samples.jsonl"])}[stage]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / script), *flags]


def result(stage, out):
    """What must be the same, as text."""
    if stage == "prepare":
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(out).rglob("*")) if p.is_file()}
    if stage == "evaluate":
        return json.loads((out / "results.json").read_text())
    if stage == "train":
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
                [(row["step"], row["loss"]) for row in log]]
    lines = [line for part in out.glob("part-*.jsonl") for line in part.read_text().splitlines()]
    return sorted(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="kills of each stage (default %(default)s)")
    parser.add_argument("--stages", default=",".join(STAGES), help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), False
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as folder:
        work, seconds, expected = Path(folder), {}, {}
        (work / "reward.py").write_text("import time\ndef slow(prompts, completions, **columns):\n    time.sleep(0.03)\n"
                                        "    return [len(set(text)) / 64 for text in completions]\n")
        for stage in STAGES:  # undisturbed, with one process; and with two where sums over ranks round otherwise
            for ranks in (1, 2) if stage == "train" else (1,):
                out = work / (stage if ranks == 1 else f"{stage}{ranks}")
                began = time.time()
                subprocess.run(command(stage, work, out, ranks), check=True, env=environment, capture_output=True)
                seconds[stage, ranks], expected[stage, ranks] = time.time() - began, result(stage, out)
            if stage == "score":  # the references once more, as if a policy had sampled them
                rows = [json.loads(line) for line in expected["score", 1]]
                (work / "samples.jsonl").write_text("".join(json.dumps(row | {
                    "samples": row["ref_completions"], "sample_rewards": row["ref_rewards"]}) + "\n" for row in rows))
        for stage in args.stages.split(","):
            for ranks in (1, 2) if stage in ("generate", "score", "train") else (1,):
                for signum in (signal.SIGKILL, signal.SIGTERM):
                    kills = starts = 0
                    trial, codes = 0, {}
                    while kills < args.times:
                        trial += 1
                        out, done = work / f"{stage}-{ranks}-{signum.name}-{trial}", False
                        while not done:
                            process = subprocess.Popen(command(stage, work, out, ranks), env=environment,
                                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                                       start_new_session=True)
                            starts += 1
                            try:  # after enough kills it is left alone
                                process.wait(rng.uniform(1, 1.2 * seconds[stage, 1])
                                             if kills < args.times else None)
                            except subprocess.TimeoutExpired:
                                kills += 1
                                if signum == signal.SIGKILL:
                                    os.killpg(process.pid, signal.SIGKILL)
                                else:
                                    process.terminate()  # torchrun hands it on
                                process.wait()
                            code = process.returncode
                            codes[code] = codes.get(code, 0) + 1
                            done = code == 0
                        right = result(stage, out) == expected.get((stage, ranks), expected[stage, 1])
                        failed |= not right
                        if not right:
                            print(f"{stage}: DIFFERS in trial {trial}")
                    print(f"{stage:10} {ranks} process{'es' if ranks > 1 else '  '} {signum.name}: {kills} kills in "
                          f"{starts} starts, exit codes {codes}, {trial} results, "
                          f"{'NOT ALL ' if failed else ''}the same as undisturbed", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
