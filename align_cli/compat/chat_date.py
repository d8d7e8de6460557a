"""One date for every chat template that writes today's.

`strftime_now` is a global of the environment in which transformers compiles a template. Another global of that name is
put into the compiled template, which transformers caches by its text: every caller in this process, TRL included, sees
the same date, and the template that is saved with a run stays as it was.

Private name: `transformers.utils.chat_template_utils._compile_jinja_template` (tests/compat/test_chat_date.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

WRITES_DATE = "strftime_now"
"""What a template that writes today's date calls."""


def fix(templates: Iterable[str], date: str) -> None:
    """Make the templates write `date` (YYYY-MM-DD) wherever they ask for today's, in this process."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    day = datetime.fromisoformat(date)
    for text in templates:
        if WRITES_DATE in text:
            _compile_jinja_template(text).environment.globals[WRITES_DATE] = day.strftime
