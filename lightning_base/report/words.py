"""The fixed texts of the report: what headings mean, what stands above tables, footnotes, captions."""

from pathlib import Path

import yaml

TEMPLATES = Path(__file__).with_name("templates")
WORDS: dict[str, dict[str, str]] = yaml.safe_load((TEMPLATES / "words.yaml").read_text(encoding="utf-8"))
