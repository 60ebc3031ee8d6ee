"""Hostile artefacts, opened by the readers that users' files come to (F20 to F23, goal G5)."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.untrusted import MAX_ROW_BYTES
from faults import hostile
from faults.hostile import ARTEFACTS, Artefact, Told
from faults.sheet import Row
from faults.small import Setting

WHAT = {
    "F20": "pickles, wherever a library might fall back to one",
    "F21": "configs, templates and indexes that ask for code or other files",
    "F22": "archives and links",
    "F23": "hostile rows",
}


def hostile_files(setting: Setting) -> list[Row]:
    """Each is opened in a child under an audit hook: what ran, what left its folder, and what the refusal says."""
    hostile.warm()
    chosen = setting.some(ARTEFACTS, share=4)  # all of them with a quarter of everything
    told = [(artefact, hostile.tried(artefact)) for artefact in chosen]
    rows = [_row(what, fault, [pair for pair in told if pair[0].fault == fault]) for fault, what in WHAT.items()]
    clean = [(artefact, came) for artefact, came in told if artefact.fault == "clean"]
    blamed = [artefact.name for artefact, came in clean if came.ended != "opened"]
    tried = f"clean twins: {len(clean)} artefacts"
    clean_row = Row("G5", tried, f"{len(blamed)} blamed", "0", not blamed, "; ".join(blamed[:3]))
    return [*rows, clean_row, _memory()]


def _memory() -> Row:
    """What a line far beyond the longest row takes, more than a clean file of rows does."""
    long, clean = (hostile.tried(hostile.named(name)).peak_bytes for name in ("a line of 200 MB", "clean rows"))
    more = (long - clean) / 2**20
    return Row(
        "F23",
        f"memory to read a line of 200 MB, where a row may have {MAX_ROW_BYTES // 2**20} MiB",
        f"{more:.1f} MiB more than a clean file takes",
        "at most twice the longest row",
        more <= 2 * MAX_ROW_BYTES / 2**20,
        "a row of just less than the longest takes more, as it's decoded, hashed and written",
    )


def _row(what: str, fault: str, told: Sequence[tuple[Artefact, Told]]) -> Row:
    acted = [artefact.name for artefact, came in told if came.seen]
    astray = [artefact.name for artefact, came in told if came.ended != (artefact.error or "opened")]
    mute = [artefact.name for artefact, came in told if artefact.error and not all(came.lines.values())]
    figure = f"{len(acted)} executions or escapes; {len(astray)} not refused as they should; {len(mute)} without a mend"
    wrong = [*acted, *astray, *mute]
    return Row("G5", f"{fault}, {what}: {len(told)} artefacts", figure, "0; 0; 0", not wrong, "; ".join(wrong[:3]))
