"""Fixes the date that chat templates with `strftime_now` write, so that a run renders the same text on any day.

`strftime_now` is a global of the environment in which transformers compiles a template. We replace it in the compiled
template, which transformers caches by the template's text: every caller in this process, TRL included, gets the same
date, and the template saved with a run is unchanged.

Private name: `transformers.utils.chat_template_utils._compile_jinja_template` (tests/compat/test_chat_date.py).
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

WRITES_DATE = "strftime_now"
"""The function that templates call to write today's date."""


_day: datetime | None = None


def use(day: str | None) -> None:
    """Set the date (YYYY-MM-DD) that `fix` puts into templates; None leaves today's date."""
    global _day
    _day = datetime.fromisoformat(day) if day else None


def fix(template: str | dict[str, str] | None) -> None:
    """Make a template, or each of a tokenizer's named templates, write the date set by `use` instead of today's."""
    for text in template.values() if isinstance(template, dict) else [template]:
        if _day is not None and text and WRITES_DATE in text:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(text).environment.globals[WRITES_DATE] = _day.strftime


def today() -> str:
    """This machine's date."""
    return date.today().isoformat()


def writes_date(template: Any) -> bool:
    """Whether a template, or one of several named templates, writes today's date."""
    return WRITES_DATE in str(template)
