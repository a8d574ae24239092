"""docs/recipe.md says what the recipe's fields say."""

import runpy
from pathlib import Path

from mobilellm.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/recipe.md").read_text()


def test_the_page_is_what_the_fields_give() -> None:
    written = runpy.run_path(str(ROOT / "scripts/write_recipe_docs"))["page"]()
    assert written == PAGE, "run scripts/write_recipe_docs"


def test_every_setting_has_its_line() -> None:
    for section, values in Recipe().to_dict().items():
        part = PAGE.split(f"## [{section}]\n")[1].split("\n## ")[0]
        for key in values:
            assert f"| `{key}` |" in part, f"{section}.{key}"
