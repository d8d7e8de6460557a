"""One date for every chat template that writes today's.

`strftime_now` is a global of the environment in which transformers compiles a template. Another global of that name is
put into the compiled template, which transformers caches by its text: every caller in this process, TRL included, sees
the same date, and the template that is saved with a run stays as it was.

Private name: `transformers.utils.chat_template_utils._compile_jinja_template` (tests/compat/test_chat_date.py).
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

WRITES_DATE = "strftime_now"
"""What a template that writes today's date calls."""


_day: datetime | None = None


def use(day: str | None) -> None:
    """From here on, templates that are fixed write this date (YYYY-MM-DD); None leaves them today's."""
    global _day
    _day = datetime.fromisoformat(day) if day else None


def fix(template: str | dict[str, str] | None) -> None:
    """Make a template, or each of a tokenizer's named ones, write the date in use wherever it asks for today's."""
    for text in template.values() if isinstance(template, dict) else [template]:
        if _day is not None and text and WRITES_DATE in text:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(text).environment.globals[WRITES_DATE] = _day.strftime


def today() -> str:
    """This machine's date."""
    return date.today().isoformat()


def writes_date(template: Any) -> bool:
    """Whether a template, or one of the named ones, asks for today's date."""
    return WRITES_DATE in str(template)
