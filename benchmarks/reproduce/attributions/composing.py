"""One page of all parts, whenever each of them ran.

A part leaves its section and its record in a folder; report.md and report.json are composed of all that are there.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

_FOLDER = "sections"


def check(folder: pathlib.Path, model: str) -> None:
    """Makes sure that what is there can go on one page with what is yet to come.

    Raises:
        ValueError: if a section is of another model.
    """
    for path in sorted((folder / _FOLDER).glob("*.json")):
        if json.loads(path.read_text())["model"] != model:
            raise ValueError(f"{path} is of another model: choose another --output, or move it away")


def keep(folder: pathlib.Path, part: str, record: Mapping, section: str) -> None:
    """Saves what a part came to, in place of what it did before.

    Args:
        folder: of the report.
        part: its name.
        record: as plain JSON; `model` is the fingerprint, `claims` are statements with their verdicts.
        section: the same as Markdown, beginning with a title of the second level.
    """
    kept = folder / _FOLDER
    kept.mkdir(parents=True, exist_ok=True)
    (kept / f"{part}.md").write_text(section)
    (kept / f"{part}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def read(folder: pathlib.Path, part: str) -> dict | None:
    """The record of a part, or None if it has not run."""
    path = folder / _FOLDER / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def compose(folder: pathlib.Path, parts: Sequence[str], title: str, scope: str) -> dict[str, str]:
    """Writes report.md and report.json.

    Args:
        folder: of the report.
        parts: names, in the order of the page; those that have not run are left out.
        title: of the page.
        scope: what the results say and do not say.

    Returns:
        All statements with their verdicts.
    """
    records = {part: record for part in parts if (record := read(folder, part)) is not None}
    verdicts = {statement: verdict for record in records.values() for statement, verdict in record["claims"].items()}
    lines = [f"# {title}", ""]
    if verdicts:
        lines += ["| claim | verdict |", "|---|---|", *(f"| {one} | **{verdicts[one]}** |" for one in verdicts), ""]
    sections = [(folder / _FOLDER / f"{part}.md").read_text() for part in records]
    (folder / "report.md").write_text("\n".join([*lines, scope, "", *sections]))
    report = {"scope": scope} | records
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return verdicts
