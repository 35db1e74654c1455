"""One page that shows what training did: numbers, pictures, and the completions of every prompt before and
after it, with rewards and log-ratios. Click a heading to sort by it, and a prompt to see its completions.

Called by evaluate.py, which writes OUT/report.html. Everything is inside that file, and it asks the network
for nothing. Completions are untrusted: all text is escaped, and the page's Content-Security-Policy lets no
script run but its own.

    python evaluate.py --model=out/qrpo --ref_model=MODEL --data=out/qrpo/test/rewarded --out=out/qrpo
"""
import base64
import hashlib
from html import escape
from itertools import islice
from string import Template

import numpy as np

import rows

MODELS = {"reference": ("ref_completions", "ref_rewards"), "policy": ("samples", "sample_rewards")}
PROMPTS, COMPLETIONS = 1000, 8  # the most that a page shows: prompts, and completions of a model for each

SCRIPT = """
for (const button of document.querySelectorAll("#prompts button")) button.onclick = () => {
  const table = document.querySelector("#prompts"), heading = button.parentNode;
  const sign = heading.ariaSort === "descending" ? 1 : -1;  // first the largest on top, then the smallest
  const value = body => parseFloat(body.rows[0].cells[heading.cellIndex].dataset.value);
  const order = (a, b) => isNaN(a) - isNaN(b) || sign * (a - b);  // unknown ones stay at the end
  table.append(...[...table.tBodies].sort((a, b) => order(value(a), value(b))));
  for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
  heading.ariaSort = sign < 0 ? "descending" : "ascending";
};
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>$model</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-$digest'">
<style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ccc }
td, th { text-align: right } td:first-child, th:first-child { text-align: left; white-space: nowrap }
#prompts { width: 100% } td[colspan] { white-space: normal !important }
button { all: unset; cursor: pointer } button:focus-visible { outline: 2px solid } summary { cursor: pointer }
[aria-sort=descending]::after { content: " \\2193" } [aria-sort=ascending]::after { content: " \\2191" }
.models { display: grid; grid-template-columns: 1fr 1fr; gap: 2em } .models > * { min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .5em }
</style>
<h1>$model</h1>
<p>Compared with $ref_model on the held-out prompts of $data; means +- standard errors over prompts.
<table><tr><th><th>reference<th>policy<th>difference$numbers</table>
$pictures
<h2>Prompts and completions</h2>
<p>The first $prompts prompts at most, with the first $completions completions of each model. A log-ratio is
log policy - log reference model, in nats, of a completion or of their mean: above 0, it became likelier.
<table id="prompts"><thead><tr>$headings</thead>$lines</table>
<script>$script</script>
</html>
""")


def label(opinion):
    """What the name of a reward ends in: "_judge" is what `score.py --name=judge` added."""
    return opinion.replace("_", " by ", 1)


def write(args, numbers, pictures, means, completions):
    """Write OUT/report.html and return its name.

    numbers: the lines of a table, lists of text. pictures: names of PNG files in OUT. means: as of
    evaluate.read_means. completions: {model: those of known reward, as of evaluate.log_ratios}.
    """
    opinions = [opinion for model, opinion in means if model == "policy"]
    headings = ["row"]
    for opinion in opinions:
        headings += [f"{column}{label(opinion)}" for column in ("reference", "policy", "gain")]
    headings += ["log-ratio, policy's", "log-ratio, reference's"]
    images = []
    for name in pictures:
        data = base64.b64encode((args.out / name).read_bytes()).decode()
        images.append(f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}">')
    lines = []
    place = {name: i for i, name in enumerate(completions["policy"].ids)}  # of the rows in those arrays
    for position, row in enumerate(islice(rows.stream(args.data), PROMPTS)):
        at = place[str(row["id"])]
        ratios = {model: data.log_ratio[data.row == at] for model, data in completions.items()}
        values = []
        for opinion in opinions:
            reference, policy = (means[model, opinion][position, 0] for model in MODELS)
            values += [reference, policy, policy - reference]
        for model in ("policy", "reference"):
            values.append(ratios[model].sum() / (len(ratios[model]) or np.nan))  # NaN: unknown
        cells = "".join(f'<td data-value="{value}">{value:.4g}' for value in values)
        lines.append(f'<tbody><tr><td data-value="{position}">{escape(str(row["id"]))}{cells}'
                     f'<tr><td colspan="{len(headings)}">{details(row, opinions, ratios)}')
    page = PAGE.substitute(
        model=escape(args.model), ref_model=escape(args.ref_model), data=escape(args.data),
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(), script=SCRIPT,
        numbers="".join("\n<tr><td>" + "<td>".join(map(escape, line)) for line in numbers),
        pictures="".join(images), prompts=PROMPTS, completions=COMPLETIONS, lines="\n".join(lines),
        headings="".join(f"<th><button>{escape(heading)}</button>" for heading in headings))
    with rows.replacing(args.out / "report.html") as new:
        new.write_text(page, encoding="utf-8", errors="backslashreplace")
    return "report.html"


def details(row, opinions, ratios):
    """The prompt, which opens to show the completions of both models: rewards, log-ratio, length, text."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    parts = [f"<details><summary>{escape(prompt[:120])}</summary><pre>{escape(prompt)}</pre>"
             '<div class="models">']
    for model, (field, column) in MODELS.items():
        parts.append(f"<div><h3>{model}</h3>")
        known = iter(ratios[model])
        for k, completion in enumerate(row[field][:COMPLETIONS]):
            facts = []
            for opinion in opinions:
                reward = row[column + opinion][k]
                shown = "unknown" if reward is None else f"{reward:.4g}"
                facts.append(f"reward{label(opinion)} {shown}")
            if row[column][k] is not None:
                facts.append(f"log-ratio {next(known):.3f}")
            if "token_ids" in completion:  # not in references that came as texts
                facts.append(f"{len(completion['token_ids'])} tokens")
            parts.append(f"<p>{escape(', '.join(facts))}<pre>{escape(completion['text'])}</pre>")
        parts.append("</div>")
    return "".join(parts) + "</div></details>"
