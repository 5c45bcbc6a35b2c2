"""Results in a README, between the comments that mark their place."""

from __future__ import annotations

import re
from pathlib import Path


def fill(readme: Path, name: str, content: str) -> None:
    """Puts content between `<!-- name -->` and `<!-- end of name -->`, in place of what was there.

    Raises:
        ValueError: the README lacks these marks.
    """
    text = readme.read_text(encoding="utf-8")
    place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{readme} has no place <!-- {name} --> ... <!-- end of {name} -->")
    readme.write_text(place.sub(lambda _: f"\n{content}\n\n", text), encoding="utf-8")
