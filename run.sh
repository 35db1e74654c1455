#!/usr/bin/env bash
# The whole pipeline in one command: prepare, generate, score, train, evaluate. What is done already is reused.
#
#   bash run.sh                        a tiny model learns to write better one-line Python functions; no GPU, no download
#   bash run.sh --beta=0.05            flags go to train.py
#   bash run.sh test                   set up and run the tests
#
# Set in the environment:
#   OUT=out            folder of everything that is written
#   RUN=qrpo           folder of the training run, $OUT/$RUN: another name, another run on the same references
#   MODEL= DATA=       a Hugging Face model, and a folder with train.jsonl and test.jsonl (default: the minicode example)
#   REWARD=tests       or FILE.py:NAME, or model:PATH
#   SEED=0             of sampling and training
#   NPROC=             processes of every stage (default: one a GPU, or one)
#   GENERATE= SCORE=   more flags for generate_refs.py and score.py
#   PYTHON=            an interpreter with the requirements installed (default: a virtual environment made in .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # idle threads sleep: on a busy machine, spinning costs 20 times

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

if [ "${1:-}" = test ]; then
    shift
    exec "$PYTHON" -m pytest -q tests "$@"
fi

OUT=${OUT:-out} RUN=${RUN:-qrpo} SEED=${SEED:-0} REWARD=${REWARD:-tests}
if [ -z "${MODEL:-}" ] && [ -z "${DATA:-}" ]; then
    "$PYTHON" data/minicode/prepare.py
    MODEL=data/minicode/model DATA=data/minicode
    GENERATE="--max_new_tokens=64 ${GENERATE:-}"
    set -- --beta=0.1 --learning_rate=3e-4 --epochs=2 --batch_size=64 --micro_batch_size=32 "$@"
fi
: "${MODEL:?set MODEL as well as DATA}" "${DATA:?set DATA as well as MODEL}"

NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
launch() {  # run a script in one process, or in NPROC under torchrun
    if [ "$NPROC" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    else
        "$PYTHON" "$@"
    fi
}
generate_and_score() {  # model, prompts, folder: samples in folder/sampled, rewarded in folder/rewarded
    # shellcheck disable=SC2086  # the flags are words
    launch generate_refs.py --model="$1" --data="$2" --out="$3/sampled" --seed="$SEED" ${GENERATE:-}
    # shellcheck disable=SC2086
    launch score.py --data="$3/sampled" --out="$3/rewarded" --reward="$REWARD" ${SCORE:-}
}

generate_and_score "$MODEL" "$DATA/train.jsonl" "$OUT/train"
generate_and_score "$MODEL" "$DATA/test.jsonl" "$OUT/test"
launch train.py --model="$MODEL" --data="$OUT/train/rewarded" --eval_data="$OUT/test/rewarded" --out="$OUT/$RUN" \
    --seed="$SEED" --resume "$@"
generate_and_score "$OUT/$RUN" "$DATA/test.jsonl" "$OUT/$RUN/test"
"$PYTHON" evaluate.py --model="$OUT/$RUN" --ref_model="$MODEL" --data="$OUT/$RUN/test/rewarded" \
    --ref_data="$OUT/test/rewarded" --out="$OUT/$RUN"
