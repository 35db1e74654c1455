#!/usr/bin/env bash
# From prompts to a trained model and a table of what it gained. What is done already is reused.
#
#   bash run.sh                   a tiny model learns to write one-line Python functions; no GPU, no download
#   bash run.sh --beta=0.05       flags are train.py's; with RUN=NAME another run on the same references
#   MODEL=NAME_OR_FOLDER DATA=FOLDER REWARD=rewards.py:exact bash run.sh --learning_rate=1e-6
#   bash run.sh test              the tests, with pytest's flags; SLOW=1 also runs the slow ones
#   bash run.sh lint
#
# DATA holds train.jsonl and test.jsonl. GENERATE and SCORE are more flags of generate_refs.py and score.py.
set -euo pipefail
trap 'exit $(($? ? $? : 143))' TERM  # when the command in hand has saved, with its exit code
MODEL=${MODEL:-} DATA=${DATA:-} REWARD=${REWARD:-tests} OUT=${OUT:-out} RUN=${RUN:-qrpo}

# set up: .venv, or an interpreter of your own in PYTHON
code=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$code/train.py" ]; then  # SLURM runs a copy of this file
    code=$(scontrol show job "$SLURM_JOB_ID") && code=${code#*Command=} code=${code%%/run.sh*}
fi
PYTHON=${PYTHON:-$code/.venv/bin/python}
fail() { echo "error: $1" >&2; exit 2; }
[ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] || fail "needs one node: sbatch --nodes=1, or paper/pipeline.sh"
install() {
    if [ "$PYTHON" != "$code/.venv/bin/python" ] || cmp -s "$code/$1" "$code/.venv/$1"; then return; fi
    if ! "$PYTHON" -m pip --version &> /dev/null; then
        python3 -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 10)' 2> /dev/null ||
            fail "needs Python 3.10 or newer with venv; on Debian and Ubuntu: apt install python3-venv"
        python3 -m venv "$code/.venv"
    fi
    echo "installing $1 into .venv"
    "$PYTHON" -m pip install --quiet --requirement "$code/$1"
    cp "$code/$1" "$code/.venv/$1"
}
case ${1:-} in
    test) install requirements-dev.txt; cd "$code"; exec "$PYTHON" -m pytest "${@:2}" ;;
    lint) install requirements-dev.txt; cd "$code"; exec "$PYTHON" -m ruff check . ;;
    *) install requirements.txt ;;
esac
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}  # a thread without work soon sleeps
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # batches differ in shape
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600  # torchrun's 30 s are too short to save
run=("$PYTHON")  # one process, or on a GPU machine one for each GPU
if nvidia-smi &> /dev/null; then run+=(-m torch.distributed.run --standalone --nproc_per_node=gpu); fi

# prepare: minicode, if there are no model and data of your own
if [ -z "$MODEL$DATA" ]; then
    "$PYTHON" "$code/data/minicode/prepare.py"
    MODEL=$code/data/minicode/model DATA=$code/data/minicode GENERATE="--max_new_tokens=64 ${GENERATE:-}"
    set -- --beta=0.1 --learning_rate=3e-4 --epochs=2 --batch_size=64 "$@"
fi
[ "$MODEL" ] && [ "$DATA" ] || fail "set both MODEL and DATA, or neither"

# generate and score: completions of the model that training starts from
one_a_line() { sed 's/ *$//; s/ \+--/\n--/g' <<< "$1"; }  # flags, whose values may hold spaces
mapfile -t generate < <(one_a_line "--num_refs=16 ${GENERATE:-}")
mapfile -t score < <(one_a_line "--reward=$REWARD ${SCORE:-}")
for split in train test; do
    "${run[@]}" "$code/generate_refs.py" --model="$MODEL" --data="$DATA/$split.jsonl" \
        --out="$OUT/$split/sampled" "${generate[@]}"
    "${run[@]}" "$code/score.py" --data="$OUT/$split/sampled" --out="$OUT/$split/rewarded" "${score[@]}"
done

# train
"${run[@]}" "$code/train.py" --model="$MODEL" --data="$OUT/train/rewarded" --eval_data="$OUT/test/rewarded" \
    --out="$OUT/$RUN" --cache="$OUT/cache" --resume --loss=qrpo "$@"

# generate, score, evaluate: completions of the trained model for the test prompts
"${run[@]}" "$code/generate_refs.py" --model="$OUT/$RUN" --data="$OUT/test/rewarded" \
    --out="$OUT/$RUN/test/sampled" --field=samples "${generate[@]}"
"${run[@]}" "$code/score.py" --data="$OUT/$RUN/test/sampled" --out="$OUT/$RUN/test/rewarded" "${score[@]}"
"$PYTHON" "$code/evaluate.py" --model="$OUT/$RUN" --ref_model="$MODEL" --data="$OUT/$RUN/test/rewarded" \
    --out="$OUT/$RUN"
