"""Labels of AI feedback: probabilities, clamping, both orders, and the way to the reward model's loss."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from align_cli.data.groups import read_groups
from align_cli.data.rankings import rm_rows
from align_cli.generation import choice
from align_cli.recipe.sections import Data
from align_cli.reward_model.losses import pair_targets, ranking_loss
from align_cli.reward_model.trainer import Objective
from align_cli.rewards import comparison


def test_the_golden_values():
    p = comparison.probability(-1.2, -0.7)
    assert p == pytest.approx(0.377541, abs=1e-6)
    assert comparison.clamped(p, [0.4, 0.6]) == 0.4 and comparison.clamped(0.99, [0.4, 0.6]) == 0.6
    assert comparison.clamped(p, None) == p
    # soft cross-entropy at a difference of 0.5 between the rewards
    for target, expected in ((p, 0.785306), (0.4, 0.774077), (0.6, 0.674077)):
        targets = pair_targets(torch.tensor([[0, 1]]), torch.tensor([target]))
        assert ranking_loss(torch.tensor([[0.5, 0.0]]), targets).item() == pytest.approx(expected, abs=1e-5)


def test_a_letter_that_is_hardly_possible_is_no_overflow():
    assert comparison.probability(0.0, -1e4) == 1.0 and comparison.probability(-1e4, 0.0) < 1e-300


@pytest.mark.parametrize("quality", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("liking", [-0.1, 0.0, 0.1])
def test_averaging_both_orders_removes_a_liking_for_a_letter(quality, liking):
    first, second = quality + liking, 1 - quality + liking
    assert comparison.label(first, second) == pytest.approx(quality)
    assert comparison.bias(first, second) == pytest.approx(liking)


class Judge:
    """Gives the letter of the answer with more of `word` in it, and `liking` nats more to (A)."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, word, liking):
        self.tokenizer, self.word, self.liking = tokenizer, word, liking

    def __call__(self, input_ids, attention_mask, position_ids, logits_to_keep):
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        for row, (ids, seen) in enumerate(zip(input_ids, attention_mask, strict=True)):
            a, b = self.tokenizer.decode(ids[seen.bool()]).split("(A) ")[1].split("(B) ")
            logits[row, 0, self.tokenizer.convert_tokens_to_ids("A")] = a.count(self.word) + self.liking
            logits[row, 0, self.tokenizer.convert_tokens_to_ids("B")] = b.count(self.word)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("liking", [0.0, 1.5, -3.0])
def test_swapping_the_answers_in_the_prompt_removes_a_judges_position_bias(liking):
    tok = tiny.tokenizer()

    def encode(text):
        return tok(text, add_special_tokens=False)["input_ids"]

    def judged(first, second):
        asked = []
        for pair in ((first, second), (second, first)):
            text = comparison.question([{"role": "user", "content": "hello"}], "Which is warmer?", *pair)
            asked.append(choice.letters(encode, f"{text}\n{choice.LEAD}"))
        found = choice.choose(Judge(tok, "red", liking), asked, tok.pad_token_id)
        return [comparison.probability(a, b) for a, b in found]

    alike = judged("red blue", "blue red and much longer than the other")
    assert comparison.label(*alike) == pytest.approx(0.5, abs=1e-6)
    assert comparison.bias(*alike) == pytest.approx(1 / (1 + math.exp(-liking)) - 0.5, abs=1e-6)
    warmer = judged("red red", "blue")
    assert comparison.label(*warmer) > 0.5 + 1e-3
    assert comparison.label(*warmer) == pytest.approx(1 - comparison.label(*judged("blue", "red red")), abs=1e-6)


def test_the_letter_is_found_whatever_the_tokenizer_joins():
    def in_threes(text):
        return [text[at : at + 3] for at in range(0, len(text), 3)]

    before, a, b = choice.letters(in_threes, "The answer is: (")
    assert before == ["The", " an", "swe", "r i", "s: "] and (a, b) == ("(A)", "(B)")


def test_soft_labels_reach_the_reward_models_loss_as_probabilities(tmp_path):
    row = {
        "row": 0,
        "kind": "red-team",
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": "yes",
        "rejected": "no",
    }
    row |= {"probability": 0.622459, "chosen_was": 1, "principle": "x", "orders": [{"p": 0.3}, {"p": 0.5}]}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(row) + "\n")
    (group,) = read_groups(Data(train=[{"path": str(tmp_path / "preferences.jsonl")}]), "preferences", 0).train
    assert group.probability == 0.622459 and group.responses[0][0]["content"] == "yes"
    from align_cli.data.chat import Tally

    rows = list(rm_rows(tiny.tokenizer(), [group], max_length=200, max_prompt_length=None, tally=Tally()))
    # the rewards differ by 0.5 against the label, whose golden loss is that of p = 0.377541 at +0.5
    loss = Objective("ranking", margin=None, center=0.0)(torch.tensor([[[-0.5], [0.0]]]), rows)
    assert loss.item() == pytest.approx(0.785306, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A)", "A"),
        ("B", "B"),
        ("The answer is (B), since it is kinder.", "B"),
        ("Option A.", "A"),
        ("A kind person would refuse.", None),
        ("Both (A) and (B) are fine.", None),
        ("", None),
    ],
)
def test_reading_a_choice(text, letter):
    assert choice.read_choice(text) == letter


def test_log_probabilities_of_a_chat_completion():
    def entry(token, logprob, **top):
        return {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()],
        }

    tokens = [entry("(", -0.01, **{"(": -0.01}), entry("B", -0.7, **{"B": -0.7, "A": -1.5, "(A": -2.0, "C": -9.0})]
    a, b = choice.read_log_probabilities(tokens)
    assert a == pytest.approx(math.log(math.exp(-1.5) + math.exp(-2.0))) and b == pytest.approx(-0.7)
    # A is not among the alternatives: at most as probable as the least of them
    assert choice.read_log_probabilities([entry("B", -0.1, **{"B": -0.1, "C": -6.0})]) == pytest.approx((-6.0, -0.1))
    assert choice.read_log_probabilities([entry("Hm", -0.1, **{"Hm": -0.1})]) is None
