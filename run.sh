#!/usr/bin/env bash
# The whole pipeline in one command: prepare, generate, score, train, evaluate. What is done already is reused.
#
#   bash run.sh                        a tiny model learns to write better one-line Python functions; no GPU, no download
#   RUN=low_beta bash run.sh --beta=0.05    flags go to train.py
#   bash run.sh refs                   only the reference data; with EVALUATE, the model's own evaluation, too
#   bash run.sh train                  only training and evaluation, on references that are there
#   bash run.sh test                   set up and run the tests; SLOW=1 also the slow ones
#   bash run.sh lint                   set up and run the linter
#   sbatch --gpus=8 run.sh             the same on SLURM
#
# Set in the environment:
#   OUT=out            folder of everything that is written
#   RUN=qrpo           folder of the training run, $OUT/$RUN: another name, another run on the same references
#   MODEL= DATA=       a Hugging Face model, and a folder with train.jsonl and test.jsonl (default: the minicode example)
#   REWARD=tests       or FILE.py:NAME, or model:PATH
#   SEED=0             of sampling and training
#   ROUNDS=1           2: samples of the trained policy are rewarded and trained on, too, in $OUT/${RUN}_round2 (QRPO)
#   ONLINE=            flags of online.py, such as "--steps=200": QRPO on fresh samples, in $OUT/${RUN}_online
#   NPROC=             processes of every stage, on each node (default: one a GPU, or one)
#   MASTER_ADDR=       on several nodes: the address by which they reach the first (default: its host name)
#   GENERATE= SCORE=   more flags for generate_refs.py and score.py
#   SECOND=            a reward to evaluate by, besides the one trained on; as REWARD
#   EVALUATE=          flags of generate_refs.py after those where it samples the policy, as --temperature=0.6
#   PYTHON=            an interpreter with the requirements installed (default: a virtual environment made in .venv)
set -euo pipefail
trap 'exit $(($? ? $? : 143))' TERM  # when the stage in hand has saved, with its exit code
[ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$(dirname "${BASH_SOURCE[0]}")/train.py" ] && cd "$SLURM_SUBMIT_DIR" \
    || cd "$(dirname "${BASH_SOURCE[0]}")"  # SLURM runs a copy of this file from its spool folder
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}  # torchrun's 30 s are too short to save
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}  # a thread without work soon sleeps, and does not hold up other work

if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed.txt; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed" >&2; exit 2; }
        echo "installing requirements.txt into .venv"
        [ -x "$PYTHON" ] || python3 -m venv .venv
        "$PYTHON" -m pip install --quiet --requirement requirements.txt
        cp requirements.txt .venv/installed.txt
    fi
fi

STAGE=all
case "${1:-}" in
    test) shift; exec "$PYTHON" -m pytest "$@" ;;
    lint) exec "$PYTHON" -m ruff check . ;;
    refs | train) STAGE=$1; shift ;;
esac

OUT=${OUT:-out} RUN=${RUN:-qrpo} SEED=${SEED:-0} REWARD=${REWARD:-tests} ROUNDS=${ROUNDS:-1}
if [ -z "${MODEL:-}" ] && [ -z "${DATA:-}" ]; then
    [ "$STAGE" = train ] || "$PYTHON" data/minicode/prepare.py
    MODEL=data/minicode/model DATA=data/minicode
    GENERATE="--max_new_tokens=64 ${GENERATE:-}"
    set -- --beta=0.1 --learning_rate=3e-4 --epochs=2 --batch_size=64 "$@"
    if [ "$STAGE" = all ]; then
        set -- --loss=forward_kl --quantile=exact "$@"
        ONLINE=${ONLINE---learning_rate=3e-4 --max_new_tokens=64}
    fi
fi
: "${MODEL:?set MODEL as well as DATA}" "${DATA:?set DATA as well as MODEL}"

if [ -z "${NPROC:-}" ]; then
    NPROC=1
    ! command -v nvidia-smi >/dev/null || NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
NODES=${SLURM_JOB_NUM_NODES:-1}
launch() {  # run a script in one process, or under torchrun in NPROC, or in NPROC on each node of a SLURM job
    if [ "$NODES" -gt 1 ]; then  # SIGUSR1 (save and stop) is for train.py alone, not for what starts it
        srun --nodes="$NODES" --ntasks="$NODES" ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
            bash -c 'trap "" USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' launch \
            "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$NPROC" \
            --master_addr="${MASTER_ADDR:-$(hostname)}" --master_port="$((20000 + SLURM_JOB_ID % 10000))" "$@"
    elif [ "$NPROC" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    else
        "$PYTHON" "$@"
    fi
}
generate_and_score() {  # model, data, folder, flags: samples in folder/sampled, rewarded in folder/rewarded
    local model=$1 data=$2 folder=$3
    shift 3
    # shellcheck disable=SC2086  # the flags are words
    launch generate_refs.py --model="$model" --data="$data" --out="$folder/sampled" --seed="$SEED" ${GENERATE:-} "$@"
    # shellcheck disable=SC2086
    launch score.py --data="$folder/sampled" --out="$folder/rewarded" --reward="$REWARD" ${SCORE:-}
}
evaluate() {  # model, folder: samples of the model to the test prompts against those of the reference model
    # shellcheck disable=SC2086
    generate_and_score "$1" "$OUT/test/rewarded" "$2/test" --field=samples ${EVALUATE:-}
    local data=$2/test/rewarded
    if [ -n "${SECOND:-}" ]; then
        launch score.py --data="$data" --out="$2/test/second" --reward="$SECOND" --name=second
        data=$2/test/second
    fi
    "$PYTHON" evaluate.py --model="$1" --ref_model="$MODEL" --data="$data" --out="$2"
}

if [ "$STAGE" != train ]; then
    generate_and_score "$MODEL" "$DATA/train.jsonl" "$OUT/train"
    generate_and_score "$MODEL" "$DATA/test.jsonl" "$OUT/test"
fi
if [ "$STAGE" = refs ]; then
    if [ -n "${EVALUATE:-}" ]; then  # the reference model as trained ones are evaluated: not at temperature 1
        # shellcheck disable=SC2086
        generate_and_score "$MODEL" "$OUT/test/rewarded" "$OUT/base" --field=samples $EVALUATE
    fi
    exit 0
fi

run=$OUT/$RUN
launch train.py --model="$MODEL" --data="$OUT/train/rewarded" --eval_data="$OUT/test/rewarded" --out="$run" \
    --cache="$OUT/cache" --seed="$SEED" --resume "$@"
for step in "$run"/checkpoints/step_*; do  # those of --save_every
    [ ! -d "$step" ] || evaluate "$step" "$step"
done
evaluate "$run" "$run"
for ((round = 2; round <= ROUNDS; round++)); do  # the reference stays: quantiles and log-ratios are against $MODEL
    before=$run run=$OUT/${RUN}_round$round
    generate_and_score "$before" "$OUT/train/rewarded" "$before/train" --field=samples
    launch train.py --model="$before" --ref_model="$MODEL" --data="$before/train/rewarded" --out="$run" \
        --cache="$OUT/cache" --seed="$SEED" --resume "$@" --train_on=samples
    evaluate "$run" "$run"
done
if [ -n "${ONLINE:-}" ]; then
    before=$run run=$OUT/${RUN}_online
    # shellcheck disable=SC2086
    launch online.py --model="$before" --ref_model="$MODEL" --data="$OUT/train/rewarded" --out="$run" \
        --reward="$REWARD" --score="${SCORE:-}" --seed="$SEED" $ONLINE
    evaluate "$run" "$run"
fi
