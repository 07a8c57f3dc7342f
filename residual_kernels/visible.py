"""How is text of others (names of files and classes) shown?

What would steer a terminal or break a page is escaped.
"""

import re

# control characters but for line end and tab, marks that turn the reading direction, and halves of characters
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """The text with \\x1b in place of an escape character, and so on."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
