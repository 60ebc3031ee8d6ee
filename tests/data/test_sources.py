"""Sources: what is read, in what order, and what becomes of everything that isn't text."""

import json
import os
import struct
import sys
import types
from pathlib import Path

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from espalier import recipe
from espalier.data import sources
from espalier.data.sources import Document, Quarantine, Source, local_files, read
from espalier.errors import DataError, RecipeError
from espalier.recipe import Recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


class Corpus(Recipe):
    source: Source


def texts(given_source: object, quarantine: Quarantine | None = None) -> list[str]:
    source = Source.model_validate(given_source)
    return [document.text for document in read(source, quarantine if quarantine is not None else Quarantine())]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("docs/a.md", {"path": "docs/a.md", "split": "train"}),
        ("stdlib", {"path": "stdlib", "licence": "PSF-2.0"}),
        ("hub:some/name", {"path": "hub:some/name", "split": "train"}),
        ("hub:some/name:test", {"path": "hub:some/name", "split": "test"}),
        ("{path: docs, pattern: '**/*.md'}", {"path": "docs", "pattern": "**/*.md"}),
    ],
)
def test_a_source_is_a_string_or_a_mapping_and_its_printed_form_reads_back(written, expected):
    corpus = recipe.parse(Corpus, f"source: {written}", [], where="test")
    assert corpus.source.model_dump(include=set(expected)) == expected
    assert recipe.parse(Corpus, recipe.dump(corpus), [], where="test") == corpus


@pytest.mark.parametrize(
    "written",
    [
        "hub:name",
        "hub:a/b/c",
        "{path: docs, pattern: /etc/*}",
        "{path: docs, pattern: '**.md'}",
        "{path: docs, pattern: ''}",
        "{path: docs, files: x}",
        "''",
    ],
)
def test_an_impossible_source_is_refused_with_its_line(written):
    with pytest.raises(RecipeError, match="test:1"):
        recipe.parse(Corpus, f"source: {written}", [], where="test")


def test_a_file_of_text_is_one_document_whatever_its_suffix(tmp_path):
    path = write(tmp_path / "notes.odd", "one\r\ntwo\n")
    assert list(read(Source(path=str(path)), Quarantine())) == [Document("one\r\ntwo\n", "notes.odd")]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert texts(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}')) == ["one"]


def test_a_folder_gives_its_known_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.md", "a/z.py", "a/b.txt", "c.JS", "x.bin", ".git/d.md", "a/.hidden.md", "node_modules/e.js"):
        write(tmp_path / "corpus" / name, name)
    assert texts(tmp_path / "corpus") == ["a/b.txt", "a/z.py", "b.md", "c.JS"]
    assert next(iter(local_files(Source(path=str(tmp_path / "corpus"))))) == "corpus/a/b.txt"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.md", ["a/b/c.md", "d.md"]),
        ("*.md", ["d.md"]),
        ("**/*.bin", ["x.bin"]),
        ("a/**/*", ["a/b/c.md", "a/e.txt"]),
    ],
)
def test_a_pattern_alone_says_which_files_of_a_folder_are_read(tmp_path, pattern, expected):
    for name in ("d.md", "a/b/c.md", "a/e.txt", "x.bin"):
        write(tmp_path / name, name)
    assert texts({"path": str(tmp_path), "pattern": pattern}) == expected


def test_a_loop_of_links_ends(tmp_path):
    write(tmp_path / "a" / "b.md", "text")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self.md").symlink_to(tmp_path / "self.md")
    assert texts(tmp_path) == ["text"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "b.md", "text")
    assert texts(tmp_path) == ["text"]


def test_the_standard_library_is_read_in_order_and_without_its_tests():
    origins = list(local_files(Source(path="stdlib")))
    assert origins == sorted(origins)
    assert "stdlib/json/decoder.py" in origins
    assert not any(part in ("test", "tests", "idle_test", "site-packages") for o in origins for part in o.split("/"))


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=8), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
@example(["a\u2028b\x85c\x0cd"], False, "\n")
def test_every_text_comes_back_from_json_lines(temporary, written, ascii_only, newline):
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=ascii_only) for text in written]
    path = write(temporary() / "rows.jsonl", newline.join(lines))
    assert texts(path) == written


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=8))
@example(["\ufeffa"])
def test_every_text_comes_back_from_parquet(temporary, written):
    path = temporary() / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": written}), path)
    assert texts(path) == written


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary().map(lambda line: line.replace(b"\n", b"")), max_size=8))
def test_every_line_is_a_document_or_in_quarantine(temporary, lines):
    path = write(temporary() / "rows.jsonl", b'{"text": "first"}\n' + b"\n".join(lines))
    quarantine = Quarantine()
    kept = texts(path, quarantine)
    assert kept[0] == "first"
    assert len(kept) + quarantine.counts.total() == 1 + sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "byte 10: not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (b'{"text": ', "malformed JSON"),
        (b'{"text": ' + b"[" * 100_000, "malformed JSON"),
        (b'{"text": "a", "text": "b"}', "a key twice"),
        (b"[1]", "not a JSON object"),
        (b'{"text": null}', "no text"),
        (b'{"other": "x"}', "no text"),
        (b'{"text": "' + b"x" * 3000 + b'"}', sources.TOO_LONG),
    ],
)
def test_a_bad_row_is_named_with_its_reason_and_its_neighbours_stay(tmp_path, monkeypatch, line, reason):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 200_000 if b"[[" in line else 2000)
    path = write(tmp_path / "rows.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    quarantine = Quarantine()
    assert texts(path, quarantine) == ["a", "b"]
    assert [": ".join(entry) for entry in quarantine.first] == [
        f"rows.jsonl:2{' ' * ('byte' in reason) or ': '}{reason}"
    ]


def test_a_bad_file_of_a_folder_is_quarantined_and_its_neighbours_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    write(tmp_path / "a.md", b"\xff\xfe")
    write(tmp_path / "b.md", "x" * 2001)
    write(tmp_path / "c.md", "good")
    write(tmp_path / "d.parquet", b"PAR1 but not really PAR1")
    write(tmp_path / "e.arrow", b"nor is this Arrow")
    quarantine = Quarantine("quarantine")
    assert texts(tmp_path, quarantine) == ["good"]
    names = [Path(origin).name for origin, _ in quarantine.first]
    assert names == ["a.md byte 0", "b.md", "d.parquet", "e.arrow"]


def test_quarantine_counts_all_and_names_the_first_hundred():
    quarantine = Quarantine()
    for number in range(250):
        quarantine.add(str(number), "odd" if number % 2 else "even")
    assert quarantine.counts == {"odd": 125, "even": 125}
    assert [origin for origin, _ in quarantine.first] == [str(number) for number in range(100)]


def test_a_bad_text_in_parquet_is_quarantined_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    column = pyarrow.array([b"a", b"\xff", None, b"x" * 2001, b"b"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    quarantine = Quarantine()
    assert texts(tmp_path / "rows.parquet", quarantine) == ["a", "b"]
    assert quarantine.first == [
        ("rows.parquet:1 byte 0", "not UTF-8"),
        ("rows.parquet:2", "no text"),
        ("rows.parquet:3", sources.TOO_LONG),
    ]


def test_a_parquet_file_may_have_groups_without_a_row(tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with parquet.ParquetWriter(tmp_path / "some.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert [document.text for document in read(Source(path=str(tmp_path)), Quarantine())] == ["a", "b"]


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path):
    table = pyarrow.table({"text": [f"row {number}" for number in range(20)]})
    for name, opened in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file, opened(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    texts = [document.text for document in read(Source(path=str(tmp_path)), Quarantine())]
    assert texts == table["text"].to_pylist() * 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
def test_a_missing_column_is_refused_with_those_there_are(tmp_path, suffix):
    table = pyarrow.table({"texts": ["a"], "label": [1]})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif suffix == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(DataError, match=r"texts, label.*column: texts"):
        texts(path)
    assert texts({"path": str(path), "column": "texts"}) == ["a"]


def test_a_column_that_is_no_text_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": [1.5]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="column of double"):
        texts(tmp_path / "rows.parquet")


def test_rows_are_those_of_the_split_and_files_without_one_belong_to_train(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "my_test_rows", "more", "sft/part"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    assert texts({"path": str(tmp_path), "split": "train"}) == [
        "more",
        "sft/part",
        "train-00000-of-00002",
        "train-00001-of-00002",
    ]
    assert texts({"path": str(tmp_path), "split": "validation"}) == ["dev"]
    assert texts({"path": str(tmp_path), "split": "test"}) == ["my_test_rows"]
    assert texts({"path": str(tmp_path), "split": "sft"}) == ["sft/part"]
    with pytest.raises(DataError, match="no file of split 'other'"):
        texts({"path": str(tmp_path), "split": "other"})


def test_a_folder_that_datasets_saved_gives_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset.from_dict({"text": [split, "b", "c"]}) for split in ("train", "test")}
    parts["train"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one") == ["train", "b", "c"]
    assert texts(tmp_path / "two") == ["train", "b", "c"]
    assert texts({"path": str(tmp_path / "two"), "split": "test"}) == ["test", "b", "c"]


def test_a_missing_path_is_refused_with_the_nearest_name(tmp_path):
    write(tmp_path / "corpus.txt", "text")
    with pytest.raises(DataError, match=r"Did you mean .*corpus\.txt"):
        texts(tmp_path / "corpsu.txt")
    with pytest.raises(DataError, match="Did you mean stdlib"):
        texts("stdlb")
    with pytest.raises(DataError, match="hub:roneneldan/TinyStories"):
        texts("roneneldan/TinyStories")


def test_what_is_no_file_or_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="something that can't be read"):
        texts(tmp_path / "pipe")


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    write(tmp_path / "x.bin", "x")
    with pytest.raises(DataError, match="no file of text"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"no file that matches \*\.md"):
        texts({"path": str(tmp_path), "pattern": "*.md"})


class Builder:
    """A dataset of the Hub as `datasets` would prepare to stream it."""

    __module__ = "datasets.packaged_modules.json.json"

    def __init__(self, files=("hf://datasets/some/name@12ab/rows.jsonl",)):
        self.config = types.SimpleNamespace(data_files={"test": list(files)})

    def as_streaming_dataset(self, split):
        assert split == "test"
        return iter([{"body": "a"}, {"body": None}, {"body": "b"}])


@pytest.fixture
def hub(monkeypatch):
    """A Hub that gives this builder, or raises this error; what it was asked for."""
    asked = []

    def hub(given):
        def load_dataset_builder(*names):
            asked.append(names)
            if isinstance(given, Exception):
                raise given
            return given

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset_builder=load_dataset_builder))
        return asked

    return hub


def test_a_hub_dataset_is_streamed(hub):
    asked = hub(Builder())
    quarantine = Quarantine()
    source = Source(path="hub:some/name", split="test", subset="small", column="body")
    assert [document.origin for document in read(source, quarantine)] == ["hub:some/name:0", "hub:some/name:2"]
    assert asked == [("some/name", "small")]
    assert quarantine.first == [("hub:some/name:1", "no text")]
    with pytest.raises(DataError, match="the columns body"):
        texts("hub:some/name:test")


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "https://example.org/x.jsonl", "hf://datasets/some/name2@1/x.jsonl", "zip://x::/etc/x.zip"]
)
def test_a_hub_dataset_whose_card_names_files_elsewhere_is_refused(hub, file):
    hub(Builder(["hf://datasets/some/name@12ab/rows.jsonl", file]))
    with pytest.raises(DataError, match="found the file") as refused:
        texts("hub:some/name:test")
    assert file in refused.value.found


def test_a_hub_dataset_that_needs_a_reader_of_pickles_is_refused(hub, monkeypatch):
    monkeypatch.setattr(Builder, "__module__", "datasets.packaged_modules.pandas.pandas")
    hub(Builder())
    with pytest.raises(DataError, match="'pandas'"):
        texts("hub:some/name:test")


def test_a_hub_that_fails_is_a_data_error_in_its_own_words(hub):
    hub(ConnectionError("Couldn't reach it\nand more"))
    with pytest.raises(DataError, match="hub:some/name: found Couldn't reach it; expected"):
        texts("hub:some/name")


@pytest.mark.parametrize("name", ["corpus.tar", "corpus.tar.gz", "corpus.ZIP", "rows.jsonl.zst"])
def test_an_archive_is_never_passed_over_in_silence(tmp_path, name):
    write(tmp_path / "text" / name, "no matter")
    write(tmp_path / "text" / "a.md", "text")
    with pytest.raises(DataError, match=r"found an archive.*tar -xf"):
        texts(tmp_path / "text" / name)
    quarantine = Quarantine()
    assert texts(tmp_path / "text", quarantine) == ["text"]
    assert quarantine.first == [(f"text/{name}", sources.ARCHIVE)]


def test_a_long_text_that_every_row_repeats_is_decoded_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 4000)
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), ["x" * 1000])
    table = pyarrow.table({"text": column})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as one:
        one.write_table(table)
    sizes = []
    checked = sources._parts
    monkeypatch.setattr(sources, "_parts", lambda *given: (sizes.append(len(part)) or part for part in checked(*given)))
    for suffix in ("parquet", "arrow"):
        assert texts(tmp_path / f"rows.{suffix}") == ["x" * 1000] * 300
    assert sum(sizes) == 600 and max(sizes) <= 4


def test_rows_that_are_far_too_long_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    parquet.write_table(pyarrow.table({"text": ["x" * 100_000]}), tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(DataError, match="1 rows of 1000"):
        texts(tmp_path / "rows.parquet")


def damaged_parquet(path: Path) -> Path:
    """Four groups of five rows, with the second group's bytes spoilt."""
    table = pyarrow.table({"text": [f"row {number}" for number in range(20)]})
    parquet.write_table(table, path, row_group_size=5, compression="zstd", use_dictionary=False)
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 12] = b"\xff" * 12
    return write(path, bytes(content))


def test_a_parquet_file_that_breaks_off_is_refused_with_what_is_lost(tmp_path):
    path = damaged_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"damaged Parquet \(.+\): 5 rows could be read of 20; 15 are lost") as refused:
        texts(path)
    assert refused.value.where == "rows.parquet" and "bad_files=quarantine" in refused.value.mend
    quarantine = Quarantine("quarantine")
    assert texts(path, quarantine) == [f"row {number}" for number in range(5)]
    assert quarantine.counts == {"damaged Parquet": 15} and "15 are lost" in quarantine.first[0][1]


def test_a_flipped_bit_that_parquet_has_a_checksum_of_is_found(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a" * 50, "b" * 50]})
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    write(path, path.read_bytes().replace(b"b" * 50, b"b" * 49 + b"c"))
    with pytest.raises(DataError, match=r"damaged Parquet .*2 are lost"):
        texts(path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl"])
def test_a_file_of_rows_that_cannot_be_read_is_no_bad_row(tmp_path, monkeypatch, name):
    write(tmp_path / "good.md", "good")
    write(tmp_path / name, b"nothing of the kind")
    if name == "rows.jsonl":
        monkeypatch.setattr(sources, "lines", broken_off)
    with pytest.raises(DataError, match=rf"{name}.*unknown number"):
        texts(tmp_path)
    quarantine = Quarantine("quarantine")
    assert texts(tmp_path, quarantine) == ["good", *(["a"] if name == "rows.jsonl" else [])]
    assert quarantine.counts.total() == 1


def broken_off(path, most):
    yield bytearray(b'{"text": "a"}\n')
    raise OSError(5, "Input/output error")


def test_the_policy_for_bad_files_reaches_the_reader_from_a_recipe(tmp_path):
    from espalier.data.prepare import DataRecipe, prepare

    (tmp_path / "texts").mkdir()
    damaged_parquet(tmp_path / "texts" / "rows.parquet")
    given = {"sources": str(tmp_path / "texts"), "held_out": 0.3, "bad_rows": 0.9}
    with pytest.raises(DataError, match="15 are lost"):
        prepare(DataRecipe.model_validate(given), home=tmp_path, tell=str)
    told: list[str] = []
    made = prepare(DataRecipe.model_validate(given | {"bad_files": "quarantine"}), home=tmp_path, tell=told.append)
    assert sum(made.rows.values()) == 5 and made.dropped == {"damaged Parquet": 15}
    assert any("15 of 20 rows quarantined" in line for line in told)


def test_a_text_that_lies_beyond_its_columns_bytes_is_not_read(tmp_path):
    table = pyarrow.table({"text": ["aa", "bb"]})
    path = tmp_path / "rows.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    ends = struct.pack("<3i", 0, 2, 4)
    assert texts(path) == ["aa", "bb"] and path.read_bytes().count(ends) == 1
    path.write_bytes(path.read_bytes().replace(ends, struct.pack("<3i", 0, 2, 9)))
    quarantine = Quarantine("quarantine")
    assert texts(path, quarantine) == [] and quarantine.counts == {"damaged Arrow": 1}
