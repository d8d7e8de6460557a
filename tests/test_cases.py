"""Inputs as people report them, each in a folder of tests/cases, beside what they would expect (`expected.txt`)."""

import io
import json
import re
import shutil
from pathlib import Path

import project
import pytest
import tiny
from rich.console import Console

from align_cli.errors import AlignError
from align_cli.run import preflight

CASES = Path(__file__).parent / "cases"
SMOLLM = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
END = "<|im_end|>"
STYLED = re.compile(r"\x1b\[([\d;]*)m([^\x1b]*)")


@pytest.fixture
def case(request, here, monkeypatch):
    """The folder of the case that the test is named after, with the models its recipe names."""
    name = request.node.name.removeprefix("test_").split("[")[0]
    shutil.copytree(CASES / name, here, dirs_exist_ok=True)
    Path("models").mkdir()
    if "smollm2" in (here / "recipe.yaml").read_text():
        if not SMOLLM.is_dir():
            pytest.skip("`make model` puts the real model there")
        Path("models/smollm2-135m-instruct").symlink_to(SMOLLM)
    return here


def stage():
    return Path("stage.txt").read_text().split()[1]


def check(*settings):
    """The plan's notes; an AlignError's lines where it is refused."""
    try:
        return preflight.load(stage(), ["recipe=recipe.yaml", *settings], starting=False).notes
    except AlignError as error:
        return [f"REFUSED {line}" for line in error.lines]


def show(*settings):
    """(everything that is printed, the trained stretches of it)"""
    from align_cli.report import rows

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=10_000, soft_wrap=True)
    rows.show(preflight.load(stage(), ["recipe=recipe.yaml", *settings], starting=False, render=False), 5, console)
    trained, on = [], False
    body = out.getvalue().split("special token\x1b[0m", 1)[-1]
    for codes, text in STYLED.findall(body):
        if codes in ("1;32", "1;4;35"):  # green, and a special token underlined
            trained[len(trained) if not on else -1 :] = [(trained[-1] if on else "") + text]
            on = True
        elif on and codes == "0" and not text.strip():  # rich takes the colour off at the end of a line
            trained[-1] += text
        elif text:
            on = False
    return re.sub(r"\x1b\[[\d;]*m", "", body), [text.rstrip("\n") for text in trained]


def run(*settings):
    return project.align(stage(), "recipe=recipe.yaml", "name=t", *settings, cwd=Path.cwd())


def refused(*settings):
    """The lines of a run that is refused before it trains."""
    done = run(*settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not list(Path("runs").glob("*/*/metrics.jsonl"))
    return done.stderr.splitlines()


# -- files


def test_array_in_jsonl(case):
    assert "rows.jsonl (messages): 1 rows read, 1 used, 0 dropped" in check()
    (line,) = check("data.train=object.json")
    assert line.startswith("REFUSED object.json: ") and "single object" in line and "data" in line


def test_compressed_files(case):
    (line, *_) = check()
    assert line.startswith("rows.jsonl.gz (hh)") and "0 dropped" in line


def test_directory_and_glob(case):
    (line,) = check()
    assert re.fullmatch(r"data \(\w+\): [1-9]\d* rows read, [1-9]\d* used, 0 dropped", line)
    assert "used, 0 dropped" in check("data.train=data/*.jsonl")[0]


def test_lfs_pointer(case):
    assert check() == ["REFUSED rows.jsonl: is a git-lfs pointer; run `git lfs pull` there"]


def test_samples_file_shapes(case):
    tiny.model(case / "models/tiny")
    # a JSON array, a BOM and another column name are read as data files are
    for number, file in enumerate(("prompts.json", "prompts_bom.jsonl", "prompts_question.jsonl")):
        assert not any("REFUSED" in line for line in check(f"samples.prompts={file}")), file
        done = run(f"samples.prompts={file}", "samples.max_new_tokens=2", f"name=n{number}", "trainer.max_steps=1")
        assert done.returncode == 0, done.stderr
        (row,) = map(json.loads, Path(f"runs/n{number}/sft/samples.jsonl").read_text().splitlines())
        assert "Hi" in (row.get("prompt"), row.get("question")) and {"before", "after"} <= set(row)


# -- rows


def test_alpaca_preferences(case):
    text, trained = show()
    assert "Translate to French.\n\ngood morning" in text
    assert trained == [f"bonjour{END}", f"buenos dias{END}"]
    assert "used, 0 dropped" in check("data.train=rows.jsonl")[0]  # without the rename


def test_chosen_rejected_without_prompt(case):
    (line,) = check()
    assert line.startswith("REFUSED rows.jsonl: ") and "prompt" in line
    assert not re.search(r"(wants|needs?) chosen", line)


def test_conversation_opened_by_assistant(case):
    notes = check()
    assert "rows.jsonl (messages): 3 rows read, 3 used, 0 dropped" in notes
    Path("stage.txt").write_text("show sft")
    assert show()[1] == [f"Hello.{END}", f"Hello.{END}", f"Ten coins.{END}"]


def test_hh_prompt_outside_pairs(case):
    text, trained = show()
    assert "user\nName a colour." in text and "Human:" not in text and "Assistant:" not in text
    assert trained == [f"Blue.{END}", f"Loud.{END}"]


def test_images(case):
    (line,) = [line for line in check() if "image" in line]
    assert line.startswith("REFUSED rows.jsonl")


def test_label_as_number(case):
    assert "rows.jsonl (kto): 2 rows read, 2 used, 0 dropped" in check()
    Path("stage.txt").write_text("show kto")
    text, _ = show()
    assert text.index("a good response") < text.index("a bad response")


def test_lone_surrogate(case):
    text, trained = show()
    assert trained == [f"Whole.{END}"] and "left out: it holds half of a surrogate pair" in text
    notes = check("data.max_dropped=0.6")
    assert any("1 it holds half of a surrogate pair" in line and "rows.jsonl:1" in line for line in notes)
    (line,) = check()
    assert line.startswith("REFUSED rows.jsonl: 1 of 2 rows dropped") and "surrogate" in line


def test_messages_in_csv_cells(case):
    text, trained = show()
    assert trained == [f"Hello!{END}", f"What?{END}"] and "role" not in text


def test_messages_with_chosen_rejected(case):
    assert "1 rows read, 1 used, 0 dropped" in check()[0]
    Path("stage.txt").write_text("show dpo")
    text, trained = show()
    assert trained == [f"Hello!{END}", f"What?{END}"] and "system\nKind." in text


def test_numbers_in_csv(case):
    assert "2 rows read, 2 used, 0 dropped" in check()[0]


def test_system_column(case):
    text, trained = show()
    assert "system\nYou answer like a pirate." in text and trained[0] == f"Arr, under the palm!{END}"


def test_tool_calls_and_tools(case):
    text, trained = show()
    assert trained == [
        f'Let me look.<tool_call>{{"name": "weather", "arguments": {{"city": "Oslo"}}}}</tool_call>{END}',
        f"3 degrees.{END}",
    ]
    assert "Weather now" in text and "3 C" in text
    # the model's own template writes neither, and the row is refused for it
    (line,) = [line for line in check("model.chat_template=null") if "REFUSED" in line]
    assert "does not write" in line and "tool" in line


def test_turns_marked_untrained(case):
    text, trained = show()
    assert trained == [f"Right reply{END}"] * 2 and text.count("WRONG draft") == 2


def test_winner_by_index(case):
    notes = check()
    assert "1 rows read, 1 used" in notes[0] or "columns: { better: better_response_id }" in notes[0]
    recipe = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(
        recipe.replace("train: rows.jsonl", "train: { path: rows.jsonl, columns: { better: better_response_id } }")
    )
    assert check() == ["rows.jsonl (winner): 1 rows read, 1 used, 0 dropped"]
    Path("stage.txt").write_text("show dpo")
    assert show()[1] == [f"Warm the lid.{END}", f"Smash it.{END}"]


# -- templates


def test_no_generation_prompt(case):
    text, _ = show()
    assert "warning: the chat template has no generation prompt" in text and "<|im_start|>assistant" in text


def test_plain_prompt_ends_in_space(case):
    from align_cli.data import chat
    from align_cli.model import load
    from align_cli.recipe.sections import Model

    _, trained = show()
    assert trained == [f" Bravo answer one.{END}", f" Delta answer two.{END}"]
    tok = load.tokenizer(Model(path="models/smollm2-135m-instruct", chat_template="plain"))
    (row,) = map(json.loads, Path("rows.jsonl").read_text().splitlines())
    talk = row["messages"]
    turns = chat.conversation(tok, talk[:3], talk[3:])
    assert turns.ids[: turns.trained.index(True)] == chat.prompt_ids(tok, talk[:3])


def test_reasoning_in_own_field(case):
    assert show()[1] == [f"<think>\nTwo and two make four.\n</think>\n\n4{END}"]
    assert show("data.reasoning=drop")[1] == [f"<think>\n\n</think>\n\n4{END}"]


def test_reasoning_inside_answer(case):
    assert show()[1] == [f"<think>\nTwo and two.\n</think>\n\n4{END}"]
    assert show("data.reasoning=drop")[1] == [f"4{END}"]


def test_template_eos_after_everything(case):
    from align_cli.data import chat
    from align_cli.model import load
    from align_cli.recipe.sections import Model

    assert show()[1] == [f"Bravo answer one.{END}", f"Delta answer two.{END}"]
    tok = load.tokenizer(Model(path="models/smollm2-135m-instruct", chat_template="template.jinja"))
    assert tok.convert_tokens_to_ids(END) in chat.generation_ends(tok)


def test_template_last_turn_longer(case):
    text, trained = show()
    assert trained == [f"Bravo answer one.{END}", f"<think>\n\n</think>\n\nDelta answer two.{END}"]
    assert "Charlie question two?" in text


def test_template_refuses_row(case):
    (line,) = check()
    assert line.startswith("REFUSED rows.jsonl: 1 of 1 rows dropped") and "no system role here" in line
    assert "rows.jsonl:1" in line


def test_template_with_date(case, monkeypatch):
    assert "Today: 31 Jan 2026" in show("data.date=2026-01-31")[0]


def test_template_wants_system(case):
    tiny.model(case / "models/tiny")
    done = run()
    assert done.returncode == 0, done.stderr
    ends = json.loads(Path("runs/t/sft/generation_config.json").read_text())["eos_token_id"]
    assert ends == 2  # <|im_end|>
    # asked without a system turn, it is met before anything is trained
    shutil.rmtree("runs")
    (line,) = refused("samples.prompts=[Hi]")
    assert "samples.prompts" in line and "a system turn comes first" in line


def test_center_on_refused(case):
    tiny.model(case / "models/tiny")
    (line,) = refused()
    assert "demos.jsonl" in line and "no system role here" in line


def test_stop_tokens_lost(case):
    tiny.model(case / "models/phi", template=PHI, eos_token="<|endoftext|>", pad_token="<|im_start|>")
    settings = Path("models/phi/generation_config.json")
    settings.write_text(json.dumps({"eos_token_id": [0, 7], "pad_token_id": 1}))
    done = run()
    assert done.returncode == 0, done.stderr
    kept = json.loads(Path("runs/t/sft/generation_config.json").read_text())["eos_token_id"]
    assert kept == [0, 2, 7]  # EOS, the marker that closes a turn, and the model's own


def test_no_eos_token(case):
    tiny.model(case / "models/noeos", eos_token=None)
    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("runs/t/sft/generation_config.json").read_text())["eos_token_id"] == 2
    # without a special token at the end of a turn either, nothing could end an answer
    shutil.rmtree("runs")
    words = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    Path("words.jinja").write_text(words)
    (line,) = refused("model.chat_template=words.jinja")
    assert "no EOS token" in line and "eos_token" in line
    assert any("no EOS token" in line for line in check("model.chat_template=words.jinja"))


def test_new_tokens_under_lora(case):
    tiny.without_markers(case / "models/base")
    (line,) = refused()
    assert "<|im_start|> and <|im_end|>" in line and "lora=null" in line
    assert any("adds <|im_start|> and <|im_end|>" in line for line in check())
    assert run("model.chat_template=zephyr", "name=z").returncode == 0
    assert run("lora=null", "name=full").returncode == 0


PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_every_case_has_a_test():
    names = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {folder.name for folder in CASES.iterdir()} <= names
