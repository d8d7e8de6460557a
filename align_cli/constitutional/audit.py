"""report.html of an `align cai` run: every prompt's chain from first answer to label, and a summary.

A self-contained file, made from the run's JSONL files without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

from align_cli.recipe import constitution
from align_cli.recipe.constitution import Principle
from align_cli.recipe.constitutional import LOST
from align_cli.run.directory import write_atomically

FILE, CONSTITUTION = "report.html", "constitution.yaml"
SHOWN = 1000
"""Maximum number of chains on the page; the JSONL files have all of them."""
BINS = 10
Row = dict[str, Any]

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--good:#2e9e5b;--bad:#c8503c;--mark:#3b7dd8}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.2rem}small,.dim{opacity:.65}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}.card{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem}
.card b{display:block;font-size:1.25rem}.weak{border-left:4px solid var(--bad);padding:.3rem .8rem;margin:.3rem 0;
background:var(--soft)}.bar{display:inline-block;height:.7rem;background:var(--mark);border-radius:2px}
details{border:1px solid var(--line);border-radius:.5rem;margin:.4rem 0;padding:.4rem .8rem}
summary{cursor:pointer}.tag{font-size:.8rem;border:1px solid var(--line);border-radius:1rem;
padding:0 .5rem;margin:0 .3rem}.flag{color:var(--bad);border-color:var(--bad)}
.step{display:grid;grid-template-columns:15rem 1fr;gap:1rem;
border-top:1px solid var(--line);padding:.6rem 0}.text{white-space:pre-wrap;overflow-wrap:anywhere}
.request{font-size:.85rem;opacity:.7}ins{background:#2e9e5b33;text-decoration:none}del{background:#c8503c33}
.two{display:flex;flex-wrap:wrap;gap:3rem}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair>div{border:1px solid var(--line);border-radius:.5rem;
padding:.5rem .8rem}.chosen{border-color:var(--good)!important}input,select{font:inherit;padding:.2rem .4rem}
@media(max-width:45rem){.step,.pair{grid-template-columns:1fr}}
"""
SCRIPT = """
const words=document.getElementById('words'),pick=document.getElementById('pick'),left=document.getElementById('left');
function filter(){let n=0;for(const d of document.querySelectorAll('details.chain')){const on=(!pick.value||
d.dataset.marks.split(' ').includes(pick.value))&&d.textContent.toLowerCase().includes(words.value.toLowerCase());
d.hidden=!on;n+=on}left.textContent=n+' shown'}
words.oninput=pick.onchange=filter;
document.getElementById('open').onclick=()=>{for(const d of document.querySelectorAll('details.chain:not([hidden])'))
d.open=true};filter();
"""


def write(run: Path, record: dict[str, Any]) -> Path:
    """Write the page of a run. `record` has the manifest's `cai`, `constitution` and `usage`. Returns the path."""
    write_atomically(run / FILE, page(run, record))
    return run / FILE


def page(run: Path, record: dict[str, Any]) -> str:
    """The page as HTML."""
    counts, written = record["cai"], record["constitution"]
    principles = {one.id: one for one in constitution.load(str(run / CONSTITUTION)).principles}
    chains, pairs = _rows(run / "revisions.jsonl") or _rows(run / "answers.jsonl"), _rows(run / "pairs.jsonl")
    labels = {row["row"]: row for name in ("preferences", "left_out") for row in _rows(run / f"{name}.jsonl")}
    rows = {row["row"]: row for row in [*pairs, *chains]}
    parts = [
        f"<h1>{escape(str(run))}: record of every step</h1>",
        f"<p class=dim>{len(rows)} prompts, {written['principles']} principles of {escape(written['path'])} "
        f"(sha256 {written['sha256'][:12]}…){_usage(record.get('usage', {}))}</p>",
        *(f"<p class=weak>{escape(line)}</p>" for line in counts.get("warnings", [])),
        f"<div class=cards>{''.join(_cards(counts))}</div>",
        "<h2>Principles</h2>",
        _principles(counts.get("principles", {}), principles, labels.values()),
        *_labels([row for row in labels.values() if "orders" in row]),
        f"<h2>Chains</h2>{_filter(rows.values(), labels)}",
        *(_chain(rows[at], labels.get(at), principles) for at in sorted(rows)[:SHOWN]),
    ]
    if len(rows) > SHOWN:
        parts.append(f"<p class=dim>{len(rows) - SHOWN} more are in the run's JSONL files.</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(str(run))}</title><style>{STYLE}</style></head>'
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _usage(usage: dict[str, Any]) -> str:
    lines = []
    for who, used in usage.items():
        text = f"{who}: {used.get('prompt_tokens', 0):,} tokens read, {used.get('completion_tokens', 0):,} written"
        lines.append(text + (f", cost {used['cost']:g}" if "cost" in used else ""))
    return "".join(f"<br>{escape(text)}" for text in lines)


def _cards(counts: dict[str, Any]) -> Iterable[str]:
    def card(figure: str, text: str) -> str:
        return f"<div class=card><b>{escape(figure)}</b>{escape(text)}</div>"

    for kind in ("red-team", "harmless"):
        if prompts := counts.get(kind):
            before, after = (prompts[key] / prompts["rows"] for key in ("answers_refused", "revisions_refused"))
            yield card(f"{before:.0%} → {after:.0%}", f"of {prompts['rows']} {kind} prompts refused, before → revised")
    for part in ("critiques", "revisions"):
        if replies := counts.get(part):
            flags = ", ".join(f"{count} {flag}" for flag, count in replies.items() if flag != "rows") or "none weak"
            yield card(str(replies["rows"]), f"{part}: {flags}")
    if labels := counts.get("labels"):
        left_out = sum(labels["left_out"].values())
        yield card(str(labels["rows"]), f"preferences, {left_out} pairs left out")
        if "position_bias" in labels:
            yield card(f"{labels['confidence']:.2f}", "mean confidence |2p - 1|")
            yield card(f"{labels['position_bias']:+.2f}", "position bias: P(A) - ½ over both orders")
            yield card(f"{labels['orders_disagree']:.0%}", "of pairs: preference changes when the answers are swapped")


def _bar(share: float) -> str:
    return f"<span class=bar style='width:{max(share, 0) * 8:.2f}rem'></span>"


def _principles(drawn: dict[str, Any], principles: dict[str, Principle], labels: Iterable[Row]) -> str:
    confidences: dict[str, list[float]] = {}
    for row in labels:
        if "principle" in row:
            confidences.setdefault(row["principle"], []).append(2 * row.get("probability", 0.5) - 1)
    lines = []
    for name, one in principles.items():
        counts, values = drawn.get(name), confidences.get(name, [])
        changed = f"{counts['changed']:.0%} {_bar(counts['changed'])}" if counts else ""
        confidence = f"{sum(values) / len(values):.2f}" if values else ""
        request = escape(one.critique_request)
        lines.append(
            f"<tr><td><b>{escape(name)}</b> <small>{one.prompts}</small><div class=request>{request}</div></td>"
            f"<td class=n>{counts['drawn'] if counts else 0}</td><td>{changed}</td>"
            f"<td class=n>{len(values)}</td><td class=n>{confidence}</td></tr>"
        )
    return (
        "<table><thead><tr><th>principle<th class=n>drawn<th>words it changed<th class=n>judged by<th class=n>"
        f"confidence</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _labels(judged: Sequence[Row]) -> Iterable[str]:
    """Histograms of confidence and of position bias."""
    both = [row for row in judged if all("p" in order for order in row["orders"])]
    if not both:
        return
    sure = [2 * row["probability"] - 1 for row in both if "probability" in row]
    bias = [(row["orders"][0]["p"] + row["orders"][1]["p"]) / 2 for row in both]
    yield "<h2>Labels</h2>"
    shown = _histogram("confidence of the averaged label, |2p - 1|", sure)
    yield f"<div class=two>{shown}{_histogram('position: mean P(A) over both orders (½: unbiased)', bias)}</div>"


def _histogram(title: str, values: Sequence[float]) -> str:
    counts = [0] * BINS
    for value in values:
        counts[min(int(value * BINS), BINS - 1)] += 1
    most = max(counts) or 1
    lines = "".join(
        f"<tr><td class=n>{at / BINS:.1f} – {(at + 1) / BINS:.1f}<td class=n>{count}<td>{_bar(count / most)}"
        for at, count in enumerate(counts)
    )
    return f"<div><p>{escape(title)}</p><table style='width:auto'><tbody>{lines}</tbody></table></div>"


def _marks(row: Row, label: Row | None) -> list[str]:
    """Values for the page's filter."""
    steps = row.get("chain", [])
    flags = [step[key] for step in steps for key in ("critique_flag", "revision_flag") if step[key]]
    named = [step["principle"] for step in steps] + ([label["principle"]] if label and "principle" in label else [])
    return list(dict.fromkeys([row["kind"], *flags, *named, *(["left-out"] if label and "why" in label else [])]))


def _filter(rows: Iterable[Row], labels: dict[int, Row]) -> str:
    every = sorted({mark for row in rows for mark in _marks(row, labels.get(row["row"]))})
    options = "".join(f"<option>{escape(mark)}</option>" for mark in every)
    return (
        f"<p><input id=words placeholder='words'> <select id=pick><option value=''>all</option>{options}</select> "
        "<button id=open>open</button> <span id=left class=dim></span></p>"
    )


def _chain(row: Row, label: Row | None, principles: dict[str, Principle]) -> str:
    marks = _marks(row, label)
    flags = [mark for mark in marks if mark not in principles and mark != row["kind"]]
    tags = f"<span class=tag>{row['kind']}</span>" + "".join(f"<span class='tag flag'>{mark}</span>" for mark in flags)
    prompt = "\n\n".join(turn["content"] for turn in row["prompt"])
    parts = [f"<details class=chain data-marks='{escape(' '.join(marks))}'><summary>{row['row']}{tags}{escape(prompt)}"]
    parts.append("</summary>")
    before = row.get("answer")
    if before is not None:
        parts.append(f"<div class=step><div>first answer</div><div class=text>{escape(before) or _NOTHING}</div></div>")
    for number, step in enumerate(row.get("chain", []), 1):
        one = principles.get(step["principle"])
        requests = (one.critique_request, one.revision_request) if one else ("", "")
        for name, request in zip(("critique", "revision"), requests, strict=True):
            text, flag = step[name], step[f"{name}_flag"]
            shown = _changes(before, text) if name == "revision" and text else escape(text) or _NOTHING
            tag = f" <span class='tag flag'>{flag}</span>" if flag else ""
            parts.append(
                f"<div class=step><div>{name} {number} · <b>{escape(step['principle'])}</b>{tag}"
                f"<div class=request>{escape(request)}</div></div><div class=text>{shown}</div></div>"
            )
        before = before if step["revision_flag"] in LOST else step["revision"]
    if label is not None:
        parts.append(_label(label, principles))
    return "".join(parts) + "</details>"


_NOTHING = "<span class=dim>(nothing)</span>"


def _changes(before: str, after: str) -> str:
    """The words of `after` as HTML, with inserted and deleted words marked."""
    one, other = before.split(" "), after.split(" ")
    marked = []
    for what, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if what in ("delete", "replace"):
            marked.append(f"<del>{escape(' '.join(one[a:b]))}</del>")
        if what in ("insert", "replace"):
            marked.append(f"<ins>{escape(' '.join(other[c:d]))}</ins>")
        if what == "equal":
            marked.append(escape(" ".join(one[a:b])))
    return " ".join(marked)


def _label(label: Row, principles: dict[str, Principle]) -> str:
    one = principles.get(label.get("principle", ""))
    head = (
        f"<b>{escape(label['principle'])}</b><div class=request>{escape(one.comparison)}</div>" if one else "not judged"
    )
    orders = "; ".join(
        f"P(A) {order['p']:.3f} {'as sampled' if not at else 'swapped'}" if "p" in order else "no letter"
        for at, order in enumerate(label.get("orders", []))
    )
    thoughts = [order["reasoning"] for order in label.get("orders", []) if "reasoning" in order]
    reasons = "".join(f"<p class=text>{escape(text)}</p>" for text in thoughts)
    if "why" in label:
        verdict = f"<p>left out: {escape(label['why'])}</p>"
        answers = [(text, "") for text in label["answers"]]
    else:
        verdict = f"<p>p = {label['probability']:.3f} that the marked answer is the better one</p>"
        answers = [(label["chosen"], " class=chosen"), (label["rejected"], "")]
    boxes = "".join(f"<div{mark}><div class=text>{escape(text) or _NOTHING}</div></div>" for text, mark in answers)
    return (
        f"<div class=step><div>label · {head}<div class=request>{orders}</div></div>"
        f"<div>{verdict}<div class=pair>{boxes}</div>{reasons}</div></div>"
    )
