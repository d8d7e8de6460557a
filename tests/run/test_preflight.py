"""The plan: steps, memory, what must run before, and every problem from the recipe's keys to the rows."""

import json
from pathlib import Path

import pytest

from align_cli import driver
from align_cli.errors import AlignError
from align_cli.run import preflight

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4000000]}}).encode()


def write(file, text):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER


def model(name, weights=WEIGHTS):
    write(f"models/{name}/config.json", '{"architectures": ["LlamaForCausalLM"]}')
    write(f"models/{name}/chat_template.jinja", "x")
    Path(f"models/{name}/model.safetensors").write_bytes(weights)


@pytest.fixture
def project(here):
    model("x")
    for stage in ("sft", "dpo"):
        write(f"recipes/{stage}/t.yaml", f"name: t\nmodel: {{ path: models/x }}\ndata: {{ train: {stage}.jsonl }}\n")
    write(
        "dpo.jsonl", "".join(json.dumps({"prompt": f"{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(21))
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write("sft.jsonl", (json.dumps({"messages": talk}) + "\n") * 20)
    return here


def plan(*words, stage="dpo", starting=False):
    return preflight.load(stage, ["recipe=t", *words], starting=starting)


def refused(*words, **kwargs):
    with pytest.raises(AlignError) as caught:
        plan(*words, **kwargs)
    return list(caught.value.lines)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["data.batch_size=4"], 18),  # 21 rows are 6 steps, three epochs by default
        (["data.batch_size=4", "trainer.num_train_epochs=1"], 6),
        (["data.batch_size=4", "trainer.num_train_epochs=0.5"], 3),
        (["data.batch_size=4", "trainer.num_train_epochs=1", "data.eval=0.5"], 3),
        (["data.batch_size=4", "trainer.max_steps=7"], 7),
        (["data.batch_size=4", "trainer.num_train_epochs=1", "data.train={path: dpo.jsonl, weight: 2}"], 11),
        (["data.batch_size=4", "trainer.num_train_epochs=1", "launch.num_gpus=2"], 6),
        (["data.batch_size=7", "trainer.num_train_epochs=1", "data.train=[dpo.jsonl,dpo.jsonl]"], 6),
        # 21 - 21 · 0.2 = 16.8 rows: 17, of which 4 steps would leave one over
        (["data.batch_size=4", "trainer.num_train_epochs=1", "data.eval=0.2"], 5),
        (["data.batch_size=4", "trainer.dataloader_drop_last=true"], 15),
    ],
)
def test_steps(project, words, steps):
    assert plan(*words).steps() == steps


def test_steps_of_packed_rows_are_not_known(project):
    assert plan("data.batch_size=4", stage="sft").steps() == 15
    assert plan("data.batch_size=4", "method.packing=true", stage="sft").steps() is None
    assert plan("method.packing=true", "trainer.max_steps=7", stage="sft").steps() == 7


@pytest.mark.parametrize(
    ("stage", "method", "steps"),
    [
        # as the trainers counted them: 30 prompts are 3 rollouts of 8 episodes, or 7 of 4 prompts, with 4 updates each
        ("ppo", "{ epochs: 2, minibatches: 2 }", 12),
        ("rloo", "{ epochs: 2, minibatches: 2, k: 2 }", 28),
    ],
)
def test_steps_of_whole_rollouts(project, stage, method, steps):
    model("rm")
    write("models/rm/config.json", '{"architectures": ["LlamaForSequenceClassification"]}')
    write("prompts.jsonl", "".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(30)))
    text = "name: t\nmodel: { path: models/x }\nreward: { path: models/rm }\n"
    text += f"data: {{ train: prompts.jsonl, batch_size: 8 }}\nmethod: {method}\n"
    write(f"recipes/{stage}/t.yaml", text + "trainer: { num_train_epochs: 1, per_device_train_batch_size: 2 }\n")
    assert plan(stage=stage).steps() == steps


def test_steps_that_hang_on_what_is_drawn_are_about_right(project):
    assert not plan().roughly() and not plan("data.train={path: dpo.jsonl, weight: 2}").roughly()
    assert plan("data.eval=0.2").roughly() and plan("data.train={path: dpo.jsonl, weight: 1.5}").roughly()
    assert not plan("data.eval=0.2", "trainer.max_steps=7").roughly()


@pytest.mark.parametrize(("pairs", "steps"), [("all", 6), ("adjacent", 3)])
def test_steps_of_rankings_count_pairs(project, pairs, steps):
    rows = [{"prompt": f"{n}", "responses": list("abcd")} for n in range(8)]
    write("ranked.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ("data.train=ranked.jsonl", "data.batch_size=8", "trainer.num_train_epochs=1")
    assert plan(*words).steps() == 1
    assert plan(*words, f"method.pairs={pairs}").steps() == steps


def bytes_of(*words, **kwargs):
    return {part.name: part.bytes for part in plan(*words, **kwargs).memory}


def test_memory_follows_the_recipe(project, monkeypatch):
    monkeypatch.setattr(driver, "present", tuple)
    million = 1_000_000
    assert bytes_of() == {
        "weights": 4 * million,
        "gradients": 4 * million,
        "optimizer": 8 * million,
        "reference": 4 * million,
    }
    assert "reference" not in bytes_of("method.precompute_reference=true")
    assert "reference" not in bytes_of(stage="sft")
    lora = bytes_of("lora=r16", "model.dtype=bfloat16")
    assert lora["weights"] == 2 * million and "reference" not in lora and lora["optimizer"] < 2 * million
    sharded = bytes_of("zero=zero3", "launch.num_gpus=4")
    assert sharded["weights"] == million and sharded["reference"] == million


def test_the_size_of_a_model_that_is_still_to_be_made_is_its_parents(project):
    held = plan("model.path=${stage:sft}", "model.chat_template=chatml")
    assert held.todo == ["align sft recipe=t.yaml"] and held.size.parameters == 1_000_000
    assert held.tokenizer_path() == "models/x"


def test_a_chain_is_planned_over_its_recipes(project):
    write("recipes/sft/top.yaml", "name: top\nmodel: { path: models/x, parameters: 5e9 }\ndata: { train: sft.jsonl }\n")
    held = plan("model.path=${stage:sft,top}", "reference.path=${stage:sft,top}", "model.chat_template=chatml")
    assert held.size.parameters == 5e9 and set(held.todo) == {"align sft recipe=top.yaml"}


def test_what_is_to_be_made_is_refused_when_starting(project):
    line = "model.path: runs/t/sft does not exist. Run `align sft recipe=t.yaml` first."
    assert refused("model.path=${stage:sft}", starting=True) == [line]
    assert plan("model.path=${stage:sft}").todo


@pytest.mark.parametrize("path", ["./runs/t/sft", "runs/t/sft/", "runs//t/./sft", "{here}/runs/t/sft"])
def test_a_run_that_is_still_to_be_made_may_be_spelled_otherwise(project, path):
    held = plan(f"model.path={path.format(here=project)}", "reference.path=${stage:sft}")
    assert held.todo == ["align sft recipe=t.yaml"] and held.tokenizer_path() == "models/x"


@pytest.mark.parametrize("starting", [True, False])
def test_a_run_that_no_recipe_makes(project, starting):
    (line,) = refused("model.path=${stage:sft,tt}", starting=starting)
    assert line.startswith("model.path: runs/tt/sft does not exist, and no recipe makes it")
    assert "Did you mean 't'?" in line


def test_a_run_that_a_recipe_of_its_name_does_not_make(project):
    write("recipes/sft/b.yaml", "name: c\nmodel: { path: models/x }\ndata: { train: sft.jsonl }\n")
    (line,) = refused("model.path=${stage:sft,b}")
    assert "`align sft recipe=b.yaml` makes runs/c/sft; name that" in line
    # the group exists for every stage, but this is not an SFT recipe
    write("d.yaml", 'model: { path: "${stage:sft}" }\ndata: { train: dpo.jsonl }\n')
    (line,) = refused("model.path=${stage:sft,d}")
    assert "`align sft recipe=d.yaml` starts from it; write a recipe that makes it" in line


def test_what_the_upstream_run_needs_comes_before_it(project):
    write("recipes/sft/b.yaml", 'name: b\nmodel: { path: "${stage:sft,t}" }\ndata: { train: sft.jsonl }\n')
    assert plan("model.path=${stage:sft,b}").todo == ["align sft recipe=t.yaml", "align sft recipe=b.yaml"]
    write("recipes/sft/b.yaml", "name: b\nmodel: { path: models/none }\ndata: { train: sft.jsonl }\n")
    (line,) = refused("model.path=${stage:sft,b}")
    assert line.startswith("`align sft recipe=b.yaml`: model.path: models/none: no such directory")


def test_runs_that_name_each_other_end(project):
    for name, other in ("bc", "cb"):
        text = f'name: {name}\nmodel: {{ path: "${{stage:sft,{other}}}" }}\ndata: {{ train: sft.jsonl }}\n'
        write(f"recipes/sft/{name}.yaml", text)
    assert set(plan("model.path=${stage:sft,b}").todo) == {"align sft recipe=b.yaml", "align sft recipe=c.yaml"}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("word", ["eval_strategy=epoch", "eval_strategy=steps", "eval_on_start=true"])
def test_evaluating_on_nothing(project, stage, word):
    (line,) = refused(f"trainer.{word}", stage=stage, starting=True)
    assert line.startswith(f"trainer.{word.split('=')[0]}: there is nothing to evaluate on; set data.eval")
    assert plan(f"trainer.{word}", f"data.eval={stage}.jsonl", stage=stage)
    assert plan("trainer.eval_strategy=no", stage=stage)


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "logging_strategy"])
@pytest.mark.parametrize("bare", ["no", "yes"])
def test_a_bare_no_that_yaml_takes_for_a_boolean(project, key, bare):
    with Path("recipes/dpo/t.yaml").open("a") as file:
        file.write(f"trainer: {{ {key}: {bare} }}\n")
    (line,) = refused()
    assert line.startswith(f"trainer.{key}: is {'false' if bare == 'no' else 'true'}") and "write" in line


def test_the_best_checkpoint_needs_a_metric_and_evaluations(project):
    words = ["trainer.save_strategy=best", "data.eval=0.2"]
    assert len(refused(*words)) == 2
    (line,) = refused(*words, "trainer.eval_strategy=epoch")
    assert line.endswith("set trainer.metric_for_best_model=eval_loss")
    (line,) = refused(*words, "trainer.metric_for_best_model=eval_loss")
    assert line.endswith("set trainer.eval_strategy=epoch")
    assert plan(*words, "trainer.eval_strategy=epoch", "trainer.metric_for_best_model=eval_loss")


def test_an_unfinished_parent_is_refused_even_by_a_check(project):
    write("runs/t/sft/recipe.yaml", "name: t\n")
    (line,) = refused("model.path=${stage:sft}")
    assert line.endswith("is not finished; run `align sft recipe=runs/t/sft/recipe.yaml` first")


def test_an_unfinished_adapter_run_is_no_parent(project):
    write("runs/t/sft/recipe.yaml", "name: t\n")
    write("runs/t/sft/adapter_config.json", '{"base_model_name_or_path": "models/x"}')
    write("runs/t/sft/adapter_model.safetensors", "")
    write("runs/t/sft/chat_template.jinja", "x")
    assert "is not finished" in refused("model.path=${stage:sft}")[0]


@pytest.mark.parametrize("weights", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", b""])
def test_weights_that_are_none_are_named(project, weights):
    model("pointer", weights)
    (line,) = refused("model.path=models/pointer")
    assert line.startswith("model.path: models/pointer: model.safetensors is ") and line.count(";") == 1
    write("models/a/adapter_config.json", '{"base_model_name_or_path": "models/pointer"}')
    write("models/a/chat_template.jinja", "x")
    (line,) = refused("model.path=models/a")
    assert "an adapter whose base models/pointer model.safetensors is " in line


def test_a_reward_model_is_no_reference(project):
    write("models/rm/config.json", '{"architectures": ["LlamaForSequenceClassification"]}')
    Path("models/rm/model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER)
    (line,) = refused("reference.path=models/rm")
    assert line.startswith("reference.path: models/rm is a reward model")


def test_a_directory_with_a_near_name(project):
    (line,) = refused("model.path=models/xx", "model.chat_template=chatml")
    assert "or a hub id. Did you mean 'models/x'" in line


def test_streaming_must_know_when_to_stop(project):
    assert any("set trainer.max_steps" in line for line in refused("data.streaming=true"))
    assert plan("data.streaming=true", "trainer.max_steps=5").steps() == 5


def test_hosts_models_rows_and_keys_are_found_together(project):
    write("dpo.jsonl", '{"prompt": "a", "chosen": "b"\n')
    said = "\n".join(
        refused("method.beta=no", "model.path=models/none", "launch.hostfile=none", "trainer.lerning_rate=1")
    )
    for part in ("method.beta", "models/none: no such directory", "none: no such file", "dpo.jsonl:1", "lerning_rate"):
        assert part in said
