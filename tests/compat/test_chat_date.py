"""The private name that fixes a template's date, and what it stands in for."""

import pytest

from align_cli.compat import chat_date

TEMPLATE = (
    "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ strftime_now('%Y') }} {{ day() }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def no_date():
    yield
    chat_date.use(None)


def rendered(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template([[{"role": "user", "content": "!"}]], chat_template=text)
    return text


def test_every_place_that_asks_for_the_date_gets_the_fixed_one():
    assert rendered(TEMPLATE) != "2020 02 Jan 2020!"
    chat_date.use("2020-01-02")
    chat_date.fix(TEMPLATE)
    assert rendered(TEMPLATE) == "2020 02 Jan 2020!"
    chat_date.use("2021-03-04")
    chat_date.fix({"default": TEMPLATE})
    assert rendered(TEMPLATE) == "2021 04 Mar 2021!"


def test_a_template_without_a_date_is_left_alone():
    chat_date.use("2020-01-02")
    chat_date.fix("{{ messages[0].content }}")
    assert rendered("{{ messages[0].content }}") == "!"
