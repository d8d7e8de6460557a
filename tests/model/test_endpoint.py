"""A model behind an endpoint, against a real server that limits, fails, cuts off and refuses."""

import threading
import time
from collections import Counter

import api
import pytest

from align_cli.errors import AlignError
from align_cli.model.endpoint import Endpoint
from align_cli.recipe.generation import GeneratorSource

ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server():
    server = api.Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(server, monkeypatch):
    return made(server.address, monkeypatch)


def made(address, monkeypatch, key=api.KEY, **more):
    monkeypatch.setenv("THE_KEY", key)
    spent, waited = Counter(), []
    source = GeneratorSource(endpoint=address, model="m", key_env="THE_KEY", **{"retries": 3, "timeout": 0.5} | more)
    endpoint = Endpoint(source, "feedback", spent.update, waited.append)
    endpoint.spent, endpoint.waited = spent, waited
    return endpoint


def refusal(endpoint):
    with pytest.raises(AlignError) as caught:
        endpoint.complete(ASK)
    (line,) = caught.value.lines
    assert api.KEY not in line and "\n" not in line
    return line


def test_an_answer_and_what_it_used(endpoint):
    endpoint.probe()
    assert endpoint.complete(ASK)["message"]["content"] == "I can help you with 5 letters."
    assert endpoint.spent == {"requests": 1, "prompt_tokens": 10, "completion_tokens": 4} and not endpoint.waited
    priced = GeneratorSource(endpoint="http://x", model="m", price={"prompt": 1.0, "completion": 5.0})
    assert priced.cost({"prompt_tokens": 1_000_000, "completion_tokens": 200_000}) == 2.0
    assert endpoint.source.cost({}) is None


@pytest.mark.parametrize(
    ("trouble", "counted"),
    [("429", "rate_limit"), ("500", "server"), ("cut", "truncated"), ("junk", "truncated"), ("slow", "timeout")],
)
def test_what_may_go_better_is_sent_again_and_counted(server, endpoint, trouble, counted):
    server.trouble = [trouble, trouble]
    assert endpoint.complete(ASK)["message"]["content"]
    assert endpoint.spent[f"retries_{counted}"] == 2 and endpoint.spent["requests"] == 1
    first, second = endpoint.waited
    if trouble == "429":  # as long as the server asks for
        assert (first, second) == (0.0, 0.0)
    else:
        assert 0.75 <= first <= 1.25 and 1.5 <= second <= 2.5


def test_after_the_last_attempt_it_is_said_in_one_line(server, endpoint):
    server.trouble = ["429"] * 4
    assert "429" in (line := refusal(endpoint)) and "4 times" in line and "lower feedback.concurrency" in line
    server.trouble = ["500"] * 4
    assert "answered 500 (no luck with" in (line := refusal(endpoint)) and "the same command continues" in line


def test_a_wrong_key_is_not_tried_again(server, monkeypatch):
    endpoint = made(server.address, monkeypatch, key="sk-wrong-key")
    line = refusal(endpoint)
    assert "refused the key (401); set THE_KEY to a valid key" in line and "sk-wrong" not in line
    assert not endpoint.waited
    with pytest.raises(AlignError, match="refused the key"):
        endpoint.probe()


def test_nobody_there(server, monkeypatch):
    server.shutdown()
    server.server_close()
    endpoint = made(server.address, monkeypatch)
    with pytest.raises(AlignError, match=r"cannot be reached \(Connection refused\); start or repair the server"):
        endpoint.probe()
    assert "4 times" in refusal(endpoint) and endpoint.spent["retries_connection"] == 3


def test_a_key_that_is_not_set(monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    source = GeneratorSource(endpoint="http://x", model="m", key_env="THE_KEY")
    (line,) = source.environment_problems("feedback")
    assert line.startswith("feedback.key_env: THE_KEY is not set")
    # anything but a name may be the key itself
    pasted = GeneratorSource(endpoint="http://x", model="m", key_env="sk-1")
    assert pasted.environment_problems("feedback") == []


def test_what_a_content_filter_refuses_is_an_empty_answer(server, endpoint):
    server.trouble = ["filter"]
    assert endpoint.complete(ASK)["message"]["content"] == ""
    assert endpoint.spent["filtered"] == 1 and not endpoint.waited


def test_an_answer_without_text_is_empty(server, endpoint):
    server.trouble = ["thoughts"]
    assert not endpoint.complete(ASK)["message"]["content"]
    assert endpoint.spent == {"requests": 1, "prompt_tokens": 0, "completion_tokens": 0}


def test_a_web_page_is_called_that_and_not_asked_for_again(server, endpoint):
    server.trouble = ["html"]
    assert "answered with a web page, not with JSON; correct feedback in the recipe" in refusal(endpoint)
    assert not endpoint.waited


def test_a_body_is_unpacked_even_if_the_server_does_not_say_so(server, endpoint):
    server.trouble = ["gzip"]
    assert endpoint.complete(ASK)["message"]["content"] == "I can help you with 5 letters."


def test_a_proxy_is_not_asked_for_this_machines_own_server(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    endpoint = made(server.address, monkeypatch)
    assert endpoint.complete(ASK)["message"]["content"]


def test_a_long_wait_is_said_and_ends_with_a_signal(server, monkeypatch):
    from align_cli import signals
    from align_cli.errors import Interrupted

    said = []
    endpoint = made(server.address, monkeypatch)
    endpoint.pause, endpoint.say = signals.pause, said.append
    server.trouble = ["wait"]
    started = time.monotonic()
    threading.Timer(0.5, signals.note, [15]).start()
    try:
        with pytest.raises(Interrupted) as caught:
            endpoint.complete(ASK)
    finally:
        signals.note(None)
    assert caught.value.exit_code == 143 and time.monotonic() - started < 30
    assert said == [f"feedback: {server.address} answered 429 (come back in an hour); asking again in 60 seconds"]


@pytest.mark.parametrize("code", [400, 403, 404, 422])
def test_a_judge_whose_log_probabilities_are_refused_is_asked_without(server, monkeypatch, code):
    from align_cli.generation.generators import EndpointGenerator
    from align_cli.recipe.generation import Generation

    monkeypatch.setenv("THE_KEY", api.KEY)
    server.log_probabilities, server.refuses_log_probabilities = False, code
    source = GeneratorSource(endpoint=server.address, model="m", key_env="THE_KEY", retries=1, timeout=5)
    judge = EndpointGenerator(source, "feedback", Generation(), lambda used: None, print)
    question = "Options:\n(A) eee\n(B) xxx"
    assert judge.choose([question, question], [None, None]) == [(0.0, -1e4)] * 2
    assert not judge.log_probabilities
