"""Whether the models of a recipe can take the text that it gives them. Imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from align_cli.data.prompts import as_messages, sample_prompts
from align_cli.errors import AlignError
from align_cli.model import context, kind
from align_cli.model.saved_tokenizer import SavedTokenizer
from align_cli.run.plan import Plan


def fit(plan: Plan) -> list[str]:
    """Lower the default of data.max_length in the plan's recipe to what its models can take, with a note. Returns the
    problems of a length that the recipe names itself."""
    recipe, lines = plan.recipe, []
    given = "max_length" in (plan.composed.tree.get("data") or {})
    for key, path in _models(plan):
        lengths, wanted = context.of(kind.config(path) or {}), recipe.data.max_length
        if lengths.window is not None and wanted > lengths.window:
            plan.notes.append(
                f"{key}: {path} attends to the last {lengths.window} tokens in some layers (sliding window)"
            )
        if lengths.limit is None or wanted <= lengths.limit:
            continue
        what = f"{path} has {context.described(lengths)}"
        if not lengths.hard:
            plan.notes.append(f"data.max_length: is {wanted}, but {what}: it was not trained on longer text")
        elif given:
            lines.append(
                f"data.max_length: is {wanted}, but {what} and fails beyond; set data.max_length={lengths.limit} or "
                f"less ({key})"
            )
        else:
            plan.notes.append(f"data.max_length: {lengths.limit} instead of {wanted}, since {what}")
            recipe = replace(recipe, data=replace(recipe.data, max_length=lengths.limit))
    plan.recipe = recipe
    return lines


def _models(plan: Plan) -> list[tuple[str, str]]:
    """(key, path) of all models that read rows; a run that does not exist yet is its own initial model."""
    recipe, models = plan.recipe, []
    with contextlib.suppress(AlignError):  # the check of the upstream run reports its problems
        models.append(("model.path", plan.tokenizer_path()))
    if (reference := recipe.reference_path()) is not None:
        models.append(("reference.path", reference))
    return models + recipe.reward_models()


def sample_problems(plan: Plan, tokenizer: SavedTokenizer) -> list[str]:
    """Whether the answers to the sample prompts fit into a model that fails beyond its positions."""
    samples, path = plan.recipe.samples, plan.tokenizer_path()
    lengths = context.of(kind.config(path) or {})
    if not lengths.hard or lengths.limit is None:
        return []
    prompts = [as_messages(row["prompt"]) for row in sample_prompts(samples, tokenizer)]
    longest = max((tokenizer.length(prompt, path) for prompt in prompts), default=0)
    room = lengths.limit - longest
    if samples.max_new_tokens <= room:
        return []
    remedy = f"set samples.max_new_tokens={room} or less" if room > 0 else "shorten it"
    return [
        f"samples: the longest prompt has {longest} tokens, and an answer {samples.max_new_tokens}, but {path} has "
        f"{context.described(lengths)} and fails beyond; {remedy}"
    ]
