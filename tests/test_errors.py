"""What becomes of the messages of other libraries."""

import pytest

from mobilellm.errors import MAX_LINE, first_line


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("one", "one"),
        ("one\ntwo", "one"),
        ("\n  one  \ntwo", "one"),
        ("", "ValueError"),
        ("\n \n", "ValueError"),
        ("x" * 1000, "x" * MAX_LINE),
    ],
)
def test_the_first_line_of_an_error(said: str, shown: str) -> None:
    assert first_line(ValueError(said)) == shown
