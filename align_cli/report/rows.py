"""What `align show` prints: rows as the model sees them, with trained tokens coloured and special tokens visible."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from align_cli.compat import chat_date
from align_cli.data import chat
from align_cli.data.groups import labelled, read_groups, stream_groups
from align_cli.model import kind, load
from align_cli.recipe.preferences import KtoRecipe
from align_cli.recipe.supervised import SftRecipe
from align_cli.run.plan import Plan

TRAINED, MASKED, SPECIAL, LOST = "bold green", "dim", "bold magenta", "yellow"


def show(plan: Plan, count: int, console: Console) -> None:
    """Print the first rows of the training data. Raises DataError or UpstreamError."""
    recipe, need = plan.recipe, plan.recipe.row_kind()
    contents = kind.look(recipe.model.path)
    path = recipe.model.path if contents.kind not in ("missing", "unfinished") else plan.tokenizer_path()
    chat_date.use(recipe.data.date)
    tokenizer = load.tokenizer(recipe.model, path)
    if recipe.data.streaming:
        groups = list(islice(stream_groups(recipe.data, need, recipe.seed, []), count))
    else:
        groups = read_groups(recipe.data, need, recipe.seed).train[:count]
    console.print(
        Text.assemble(("trained", TRAINED), " · ", ("seen, not trained", MASKED), " · ", ("special token", SPECIAL))
    )
    # ranked and labelled responses are the last turn only; demonstrations train on all assistant turns by default
    conversations = isinstance(recipe, SftRecipe)
    last_only = not conversations or recipe.method.train_on == "last-turn"
    notes: Counter[str] = Counter()
    for group in groups:
        console.rule(group.place, align="left", style="dim")
        if need == "prompts":
            try:
                ids = chat.prompt_ids(tokenizer, group.prompt, group.tools)
            except chat.Unrenderable as error:
                console.print(f"left out: {error}", style=LOST, highlight=False, markup=False)
                continue
            console.print(_coloured(tokenizer, chat.Turns(ids, [False] * len(ids))))
            console.print(f"{len(ids)} tokens of prompt", style="dim", highlight=False)
        kinds = dict(labelled(group, recipe.method.split)) if isinstance(recipe, KtoRecipe) else {}
        for index, response in enumerate(group.responses[:1] if conversations else group.responses):
            if kinds and index not in kinds:
                continue
            how = {"last_turn_only": last_only, "tools": group.tools, "notes": notes}
            try:
                turns = chat.conversation(tokenizer, group.prompt, response, **how)
            except chat.Unrenderable as error:
                console.print(f"left out: {error}", style=LOST, highlight=False, markup=False)
                continue
            kept = chat.Turns(turns.ids[: recipe.data.max_length], turns.trained[: recipe.data.max_length])
            if kinds:
                console.print("a good response" if kinds[index] else "a bad response", style="italic")
            elif not conversations:
                console.print(f"response {index + 1} of {len(group.responses)}, best first", style="italic")
            console.print(_coloured(tokenizer, kept))
            cut = len(turns.ids) - len(kept.ids)
            console.print(
                f"{len(kept.ids)} tokens, {sum(kept.trained)} trained{f', {cut} cut' if cut else ''}",
                style="dim",
                highlight=False,
            )
    for note in notes:
        console.print(f"warning: {note}", style=LOST, highlight=False, markup=False)


def _coloured(tokenizer: Any, turns: chat.Turns) -> Text:
    """The decoded tokens, coloured by whether they are trained; tokens of one colour are decoded together."""
    text = Text()
    specials = chat.end_tokens(tokenizer)
    run: list[int] = []

    def flush(trained: bool) -> None:
        if run:
            text.append(tokenizer.decode(run), style=TRAINED if trained else MASKED)
            run.clear()

    before = False
    for token, trained in zip(turns.ids, turns.trained, strict=True):
        if token in specials:
            flush(before)
            name = tokenizer.convert_ids_to_tokens(token)
            text.append(name, style=f"{SPECIAL} underline" if trained else SPECIAL)
        else:
            if trained != before:
                flush(before)
            run.append(token)
        before = trained
    flush(before)
    return text
