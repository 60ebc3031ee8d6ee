"""What a run reads, changed before it is taken up or opened: text, tokens, tokenizers, special ids (F9, F15, F16)."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from espalier import files
from espalier.data import origin
from espalier.data.prepare import DataRecipe, corpus
from espalier.folder import MADE, ModelFolder
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.pipeline import main
from espalier.run import FINAL
from espalier.spec import ModelSpec
from faults import calls
from faults.sheet import Row
from faults.small import NAME, RECIPE, Setting, ends_with, fresh, of_damage, silent

STOP = 12  # the step of the checkpoint after which the run is killed
SHARDS = "tokens/*/shard-*.bin"
# What a run reads, by what it is: below the place that has its sources, its caches and its folder.
READ = {
    "a source": "texts/*.txt",
    "the prepared dataset": "home/data/*/*",
    "packed tokens": f"home/{SHARDS}",
    "tokens.json": "home/tokens/*/tokens.json",
    "data.json": f"runs/{NAME}/{origin.RECORD}",
    "the run's tokenizer": f"runs/{NAME}/{origin.TOKENIZER}/*",
}
TIMES = 4  # places at which each kind of file is changed in each way
KINDS = ("flip", "cut", "reorder", "swap")


def changed_data(setting: Setting) -> list[Row]:
    """Change what a run reads, take the run up, and put it back."""
    place = _stopped(setting)
    return [
        _found(setting, place),
        _touched(setting, place),
        _by_consent(setting, place),
        _tokenizers(setting, place),
        _model_tokenizers(setting),
        _special_ids(setting),
    ]


def _stopped(setting: Setting) -> Path:
    """A place with sources, caches and a run that was killed at a checkpoint; `kept` beside it is as it was then."""
    place = setting.folder("place")
    shutil.copytree(setting.small.place / "corpus", place / "texts")
    shutil.copytree(setting.small.place / "home", place / "home")
    of_others = [path for folder in ("data", "tokens", "tokenizers") for path in (place / "home" / folder).glob("*")]
    os.environ["ESPALIER_HOME"] = str(place / "home")
    recipe = setting.small.recipe(data={**RECIPE["data"], "sources": [str(place / "texts")]})
    (place / "runs").mkdir()
    (place / "runs" / "recipe.yaml").write_text(json.dumps(recipe))
    whole = calls.watch(partial(_carry_out, place), place / "runs")
    assert whole.result == 0, whole.error
    shutil.rmtree(place / "runs" / NAME)
    in_place = next(
        n
        for n, call in enumerate(whole.calls, start=1)
        if call.name == "rename" and call.other.endswith(f"/checkpoint-{STOP}")
    )
    assert calls.watch(partial(_carry_out, place), place / "runs", at=in_place + 1).killed
    for path in of_others:
        shutil.rmtree(path)
    assert calls.forked(partial(_compared, place)).result is not None
    fresh(place, setting.place / "kept")
    return place


def _carry_out(place: Path, *overrides: str, accept_data: str = "") -> int:
    path = place / "runs" / "recipe.yaml"
    return main(path, list(overrides), runs=place / "runs", dry_run=False, tell=silent, accept_data=accept_data)


def _compared(place: Path, **changes: Any) -> list[str]:
    """What a run does before it trains: prepare its data and compare them with its record. What it said meanwhile."""
    told: list[str] = []
    stated = json.loads((place / "runs" / "recipe.yaml").read_text())["data"]
    recipe, folder = DataRecipe.model_validate(stated | changes), place / "runs" / NAME
    text = corpus(origin.with_own_tokenizer(recipe, folder), home=place / "home", tell=told.append)
    origin.require_same(folder, text, accept="", tell=told.append)
    return told


def _found(setting: Setting, place: Path) -> Row:
    """Every kind of file changed in every way: refused, or said to be damaged and made again to the same."""
    dice, kept = setting.dice("changed data"), setting.place / "kept"
    places = [(what, kind) for what in READ for kind in KINDS for _ in range(TIMES)]
    refused, again, missed = 0, 0, []
    for what, kind in setting.some(places, share=5):
        fresh(kept, place)
        path = dice.choice(_files(place, READ[what]))
        if not _change(path, kind, dice, [other for other in _files(place, READ[what]) if other != path]):
            continue
        end = setting.seen(calls.forked(partial(_compared, place)))
        if _is_refusal(end):
            refused += 1
        elif of_damage(end.result or []):
            again += 1
        else:
            missed.append(f"{what}, {path.name}, {kind}: {end.error or 'not found'}")
    tried = refused + again + len(missed)
    return Row(
        "F9",
        f"what a run reads, changed before it is taken up (flip, cut, reorder, swap; {', '.join(READ)}): {tried}",
        f"{refused + again} of {tried} found: {refused} refused, {again} made again and told; {len(missed)} missed",
        "100% found before use, 0 skipped in silence",
        not missed,
        "; ".join(missed[:3]),
        trials=tried,
        of=len(places),
    )


def _touched(setting: Setting, place: Path) -> Row:
    """All files with other times: nothing is said, and the run ends with the bits of a calm one."""
    alarms = []
    for what, pattern in READ.items():
        fresh(setting.place / "kept", place)
        for path in _files(place, pattern):
            os.utime(path, (1, 1))
        end = calls.forked(partial(_compared, place))
        if end.result is None or of_damage(end.result):
            alarms.append(f"{what}: {end.error or end.result}")
    for path in _files(place, "**/*"):
        os.utime(path, (2, 2))
    end = calls.forked(partial(_carry_out, place))
    same = end.result == 0 and ends_with(place / "runs" / NAME) == ends_with(setting.small.run)
    return Row(
        "F9",
        f"other times of the same files: {len(READ)} kinds, and all at once to the end of the run",
        f"{len(alarms)} alarms; {'the same' if same else 'other'} bits at the end",
        "0 alarms, the same bits",
        not alarms and same,
        "; ".join(alarms) or str(end.error or ""),
        trials=len(READ) + 1,
        of=len(READ) + 1,
    )


def _by_consent(setting: Setting, place: Path) -> Row:
    """Sources that were edited: refused with a hash, and with it taken, under the run's own tokenizer, to the end."""
    fresh(setting.place / "kept", place)
    for path in _files(place, READ["a source"])[:5]:
        path.write_text(path.read_text().replace("def", "lambda"))
    own = place / "runs" / NAME / origin.TOKENIZER / "tokenizer.json"
    before = files.sha256(own)
    refused = setting.seen(calls.forked(partial(_carry_out, place)))
    digest = refused.error["mend"].split()[-1].rstrip(".") if _is_refusal(refused) else ""
    other = calls.forked(partial(_carry_out, place, accept_data="0" * 12))
    end = calls.forked(partial(_carry_out, place, accept_data=digest))
    final = place / "runs" / NAME / FINAL / "tokenizer.json"
    kept = end.result == 0 and files.sha256(final) == files.sha256(own) == before
    reached = _is_refusal(refused) and _is_refusal(other) and kept
    ends = ["taken" if each.result == 0 else "refused" for each in (refused, other, end)]
    return Row(
        "F9",
        "edited sources: taken up without consent, with another's hash, with theirs",
        f"{', '.join(ends)}; the run's tokenizer {'kept' if kept else 'lost'}",
        "refused, refused, taken; kept",
        reached,
        "" if reached else f"{refused.error} {other.error} {end.error}",
        trials=3,
        of=3,
    )


# Tokenizers: what is changed in tokenizer.json or beside it, and the first id that then stands for another token.


@dataclass(frozen=True)
class Change:
    name: str
    edit: Callable[[Path], None]
    first: int | None = None


def _in_json(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        told = json.loads((folder / "tokenizer.json").read_text())
        edit(told)
        (folder / "tokenizer.json").write_text(json.dumps(told))

    return edited


def _permute(told: dict[str, Any]) -> None:
    vocabulary = told["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[280]], vocabulary[by_id[290]] = 290, 280


def _add(told: dict[str, Any]) -> None:
    told["added_tokens"].append({**told["added_tokens"][0], "id": 300, "content": "<more>"})


def _end(folder: Path) -> None:
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": "a"}))


CHANGES = (
    Change("two ids exchanged", _in_json(_permute), 280),
    Change("other merges", _in_json(lambda told: told["model"]["merges"].reverse())),
    Change("a normaliser", _in_json(lambda told: told.update(normalizer={"type": "Lowercase"}))),
    Change("another pre-tokeniser", _in_json(lambda told: told["pre_tokenizer"].update(use_regex=False))),
    Change("an added token", _in_json(_add), 300),
    Change("another end of text", _end),
    Change("another chat template", lambda folder: _write(folder / "chat_template.jinja", "{{ messages }}")),
)


def _tokenizers(setting: Setting, place: Path) -> Row:
    """A run whose tokenizer is a folder of the user's, taken up after the folder was changed."""
    fresh(setting.place / "kept", place)
    stated = place / "stated"
    run = place / "runs" / NAME
    shutil.copytree(run / origin.TOKENIZER, stated)
    shutil.rmtree(run)
    run.mkdir()
    _compared(place, tokenizer=str(stated))
    (run / "checkpoint-1").mkdir()
    fresh(place, setting.place / "stated")
    wrong = []
    for change in CHANGES:
        fresh(setting.place / "stated", place)
        change.edit(stated)
        end = setting.seen(calls.forked(partial(_compared, place, tokenizer=str(stated))))
        found = (end.error or {}).get("found", "")
        named = change.first is None or f"first differing id {change.first})" in found
        if "another tokenizer than the run began with" not in found or not named:
            wrong.append(f"{change.name}: {end.error or 'taken'}")
    return _verdicts("F15", "a run's tokenizer changed before it is taken up", len(CHANGES), wrong, "100% refused")


def _model_tokenizers(setting: Setting) -> Row:
    """A model folder whose tokenizer was changed, with its manifest and as a copy without."""
    wrong, tried = [], 1
    unchanged = fresh(setting.small.run / FINAL, setting.place / "model")
    if (end := calls.forked(partial(_opened, unchanged))).result is None:
        wrong.append(f"unchanged: {end.error}")
    for change in CHANGES:
        for manifest in (True, False):
            folder = fresh(setting.small.run / FINAL, setting.place / "model")
            change.edit(folder)
            if not manifest:
                (folder / files.MANIFEST).unlink()
                if files.sha256(folder / "tokenizer.json") == json.loads((folder / MADE).read_text())["tokenizer"]:
                    continue  # the user's to change: nothing that the ids stand for is
            tried += 1
            end = setting.seen(calls.forked(partial(_opened, folder)))
            if not _is_refusal(end):
                wrong.append(f"{change.name}, {'with' if manifest else 'without'} its manifest: {end.error or 'taken'}")
    what = "a model folder opened as it is, and with its tokenizer changed"
    row = _verdicts("F15", what, tried, wrong, "the first taken, 100% of the others refused")
    why = "template and end of text of a folder without a manifest aren't on record; a run that has one takes them down"
    return Row(**{**asdict(row), "why": "; ".join([*wrong[:3], why])})


def _opened(folder: Path) -> int:
    """The rows of the model's embedding."""
    return int(build.load(ModelFolder.open(folder)).get_input_embeddings().weight.shape[0])


# Special ids: what a config says of a model of ROWS rows under a tokenizer of 300 ids, and whether that is right.
ROWS = 310
STATED: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("rows that no id has", {}, True),
    ("no id that fills", {"pad_token_id": None}, True),
    ("an id that fills among the spare rows", {"pad_token_id": ROWS - 1}, True),
    ("several ends", {"eos_token_id": [0, 299]}, True),
    *((f"{key} beyond the rows", {key: ROWS}, False) for key in ("bos_token_id", "eos_token_id", "pad_token_id")),
    ("an end below zero", {"eos_token_id": -1}, False),
    ("one of two ends beyond the rows", {"eos_token_id": [0, 10**6]}, False),
)


def _special_ids(setting: Setting) -> Row:
    """Model folders with tied and untied embeddings, right and wrong ids and numbers of rows."""
    vocabulary, wrong, tried = setting.small.run / FINAL, [], 0

    def expect(name: str, folder: Path, right: bool) -> None:
        nonlocal tried
        tried += 1
        end = setting.seen(calls.forked(partial(_opened, folder)))
        if not (end.result == ROWS if right else _is_refusal(end)):
            wrong.append(f"{name}: {end.error or end.result}")

    for tied in (True, False):
        spec = ModelSpec(
            vocab_size=ROWS,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=tied,
        )
        clean = setting.folder("clean")
        build.save(build.build(spec, Parametrization(), seed=1), clean, vocabulary)
        which = "tied" if tied else "untied"
        for name, stated, right in STATED:
            for file in ("config.json", "generation_config.json"):
                folder = fresh(clean, setting.place / "ids")
                told = json.loads((folder / file).read_text())
                _write(folder / file, json.dumps(told | stated))
                expect(f"{which}, {file}, {name}", folder, right)
        folder = fresh(clean, setting.place / "ids")
        _in_json(_add_many)(folder)
        expect(f"{which}, more ids than rows", folder, False)
        folder = fresh(clean, setting.place / "ids")
        told = json.loads((folder / "config.json").read_text())
        _write(folder / "config.json", json.dumps(told | {"tie_word_embeddings": not tied}))
        expect(f"{which}, said to be the other", folder, not tied)
    return _verdicts("F16", "model folders, tied and untied, with ids right and wrong", tried, wrong, "100% right")


def _add_many(told: dict[str, Any]) -> None:
    first = told["added_tokens"][0]
    told["added_tokens"] += [
        {**first, "id": number, "content": f"<{number}>", "special": False} for number in range(300, ROWS + 4)
    ]


def _is_refusal(end: calls.End) -> bool:
    """Whether work ended with an error that the product means; a traceback is none."""
    return "kind" in (end.error or {})


def _verdicts(goal: str, what: str, tried: int, wrong: list[str], wanted: str) -> Row:
    figure = f"{tried - len(wrong)} of {tried} right"
    return Row(goal, f"{what}: {tried}", figure, wanted, not wrong, "; ".join(wrong[:3]), trials=tried, of=tried)


def _files(place: Path, pattern: str) -> list[Path]:
    return sorted(path for path in place.glob(pattern) if path.is_file())


def _change(path: Path, kind: str, dice: random.Random, others: list[Path]) -> bool:
    """Change a file; whether it now has other bytes."""
    old = path.read_bytes()
    if kind == "flip" and old:
        where = dice.randrange(len(old))
        new = old[:where] + bytes([old[where] ^ 1 << dice.randrange(8)]) + old[where + 1 :]
    elif kind == "cut" and old:
        new = old[: dice.randrange(len(old))]
    elif kind == "reorder":
        where = len(old) // 2
        new = old[where:] + old[:where]
    else:
        new = dice.choice(others).read_bytes() if others else old
    _write(path, new)
    return new != old


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
