"""The private name that fixes a template's date, and what it stands in for."""

from align_cli.compat import chat_date

TEMPLATE = (
    "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ strftime_now('%Y') }} {{ day() }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def rendered(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template([[{"role": "user", "content": "!"}]], chat_template=text)
    return text


def test_every_place_that_asks_for_the_date_gets_the_fixed_one():
    assert rendered(TEMPLATE) != "2020 02 Jan 2020!"
    chat_date.fix([TEMPLATE], "2020-01-02")
    assert rendered(TEMPLATE) == "2020 02 Jan 2020!"
    chat_date.fix([TEMPLATE], "2021-03-04")
    assert rendered(TEMPLATE) == "2021 04 Mar 2021!"


def test_a_template_without_a_date_is_left_alone():
    chat_date.fix(["{{ messages[0].content }}"], "2020-01-02")
    assert rendered("{{ messages[0].content }}") == "!"
