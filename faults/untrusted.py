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
NONE = "none is among so small a share"


def hostile_files(setting: Setting) -> list[Row]:
    """Each is opened in a child under an audit hook: what ran, what left its folder, and what the refusal says."""
    hostile.warm()
    chosen = setting.some(ARTEFACTS, share=5)  # all of them with a fifth of everything
    told = [(artefact, hostile.tried(artefact)) for artefact in chosen]
    rows = [_row(what, fault, [pair for pair in told if pair[0].fault == fault]) for fault, what in WHAT.items()]
    clean = [(artefact, came) for artefact, came in told if artefact.fault == "clean"]
    blamed = [artefact.name for artefact, came in clean if came.ended != "opened"]
    tried = f"clean twins: {len(clean)} artefacts"
    of = sum(artefact.fault == "clean" for artefact in ARTEFACTS)
    why = "; ".join(blamed[:3]) if clean else NONE
    clean_row = Row("G5", tried, f"{len(blamed)} blamed", "0", not blamed, why, trials=len(clean), of=of)
    return [*rows, clean_row, _memory()]


def _memory() -> Row:
    """What a line far beyond the longest row takes, more than a clean file of rows does."""
    artefacts = [hostile.named(name) for name in ("a line of 200 MB", "clean rows")]
    long, clean = (hostile.tried(artefact) for artefact in artefacts)
    read = [long.ended, clean.ended] == [artefact.error or "opened" for artefact in artefacts]
    more, most = (long.peak_bytes - clean.peak_bytes) / 2**20, 2 * MAX_ROW_BYTES / 2**20
    return Row(
        "F23",
        f"memory to read a line of 200 MB, where a row may have {MAX_ROW_BYTES // 2**20} MiB",
        "the line put aside" if read else "not read as it should be",
        "at most twice the longest row",
        read and more <= most,
        "a row of just less than the longest takes more, as it's decoded, hashed and written",
        trials=1,
        of=1,
        took=f"{more:.1f} MiB more than a clean file takes",
    )


def _row(what: str, fault: str, told: Sequence[tuple[Artefact, Told]]) -> Row:
    acted = [artefact.name for artefact, came in told if came.seen]
    astray = [artefact.name for artefact, came in told if came.ended != (artefact.error or "opened")]
    mute = [artefact.name for artefact, came in told if artefact.error and not all(came.lines.values())]
    figure = f"{len(acted)} executions or escapes; {len(astray)} not refused as they should; {len(mute)} without a mend"
    wrong = [*acted, *astray, *mute]
    of = sum(artefact.fault == fault for artefact in ARTEFACTS)
    why = "; ".join(wrong[:3]) if told else NONE
    tried = f"{fault}, {what}: {len(told)} artefacts"
    return Row("G5", tried, figure, "0; 0; 0", not wrong, why, trials=len(told), of=of)
