"""A model's answers to the 805 prompts of AlpacaEval, as the JSON that AlpacaEval's judge takes.

Reads the prompts from the hub (tatsu-lab/alpaca_eval), or from a local file of its schema, a JSON list of
objects with `instruction`. Samples one answer to each with generate_refs.py. Writes OUT/alpaca_eval.json, a
list of {"instruction", "output", "generator", "dataset"}. A killed run continues.

    python paper/alpaca_eval.py --model=out/qrpo --out=out/qrpo/alpaca
    alpaca_eval --model_outputs=out/qrpo/alpaca/alpaca_eval.json
"""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import rows  # noqa: E402
import source  # noqa: E402

HUB = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


def main():
    parser = rows.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name of a chat model")
    add("--out", required=True, type=Path, help="folder for the answers")
    add("--source", help="local file with AlpacaEval's prompts, instead of a download")
    add("--generate", default="--max_new_tokens=2048", help="flags of generate_refs.py")
    args = parser.parse_args()
    prompts = []
    for at, row in source.read_file(Path(args.source or download())):
        source.check_columns(at, row, ("instruction",))
        chat = [{"role": "user", "content": row["instruction"]}]
        prompts.append({"prompt": chat, "dataset": row.get("dataset")})
    source.write(args.out / "prompts.jsonl", prompts)
    sampling = subprocess.run([
        sys.executable, ROOT / "generate_refs.py", f"--model={args.model}", "--field=samples", "--num_refs=1",
        f"--data={args.out}/prompts.jsonl", f"--out={args.out}/sampled", *args.generate.split()])
    if sampling.returncode:
        sys.exit(sampling.returncode)
    answers = []
    for row in rows.read(args.out / "sampled"):
        answers.append({"instruction": row["prompt"][0]["content"], "output": row["samples"][0]["text"],
                        "generator": args.model, "dataset": row["dataset"]})
    rows.write_json(args.out / "alpaca_eval.json", answers)
    print(f"{args.out / 'alpaca_eval.json'}: {len(answers)} answers")


def download():
    import huggingface_hub
    try:
        return huggingface_hub.hf_hub_download(*HUB, repo_type="dataset")
    except OSError as error:
        rows.fail(f"cannot download AlpacaEval's prompts ({error}); give --source")


if __name__ == "__main__":
    main()
