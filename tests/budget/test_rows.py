"""Rows are counted as the model's own tokenizer writes them, and what can't be taken is refused by its place."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from espalier.budget.rows import count
from espalier.dataset import CARD
from espalier.errors import DataError, ModelError

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def written(tmp_path):
    """A file of rows."""

    def written(rows, suffix=".jsonl"):
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=6)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(texts, st.sampled_from([".jsonl", ".parquet"]), st.integers(1, 40), st.booleans())
def test_texts_and_pairs_count_as_the_tokenizer_counts_them(folder, written, texts, suffix, length, pairs):
    rows = [{"prompt": text, "completion": text[::-1]} if pairs else {"text": text} for text in texts]
    own = AutoTokenizer.from_pretrained(folder)
    joined = ["".join(row.values()) for row in rows]
    lengths = [len(own.encode(text, add_special_tokens=False)) + 1 for text in joined]
    counted = count(written(rows, suffix), folder, length)
    assert counted.rows == len(rows)
    assert counted.tokens == sum(min(each, length) for each in lengths)
    assert counted.cut == sum(each > length for each in lengths)


def test_messages_count_as_the_chat_template_writes_them(folder, written):
    rows = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat " * n}]}
            for n in range(1, 5)]  # fmt: skip
    own = AutoTokenizer.from_pretrained(folder)
    expected = [
        len(own.encode("user: the cat\nassistant: " + "sat " * n + "\n", add_special_tokens=False)) for n in range(1, 5)
    ]
    assert count(written(rows), folder, 1000).tokens == sum(expected)


@pytest.mark.parametrize(
    "content, said",
    [
        ("", r"rows\.jsonl: found no rows.*rows= and tokens="),
        ("\n\n", "no rows"),
        ('{"text": "a"}\n{"text": 3}\n', r"rows\.jsonl:2: .* no string"),
        ('{"text": "a"}\n{"tex', r"rows\.jsonl:2: .* can't be read"),
        ("[1]\n", r"rows\.jsonl:1: .*not a JSON object"),
        ('{"question": "a"}\n', r"rows\.jsonl:1: found the columns question"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "preferences"),
        ('{"messages": "a"}\n', r"rows\.jsonl:1: messages"),
    ],
)
def test_rows_that_cannot_be_taken_are_refused_by_their_place(folder, tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        count(path, folder, 10)


def test_files_of_another_kind_are_refused(folder, tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    for name, found in (("rows.csv", ".csv"), ("nothing.jsonl", "no such file"), ("", "folder")):
        with pytest.raises(DataError, match=found):
            count(tmp_path / name, folder, 10)


def test_a_model_without_a_tokenizer_or_template_is_refused(folder, written, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json.*rows= and tokens="):
        count(written([{"text": "a"}]), tmp_path, 10)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="chat template"):
        count(written([{"messages": []}]), tmp_path, 10)


def test_a_dataset_folder_is_read_at_its_train_split(folder, tmp_path):
    from espalier import files
    from espalier.dataset import Dataset

    path = tmp_path / "dataset"
    with files.whole_folder(path) as inside:
        for split, texts in (("train", ["the", "cat"]), ("validation", ["sat"])):
            table = pyarrow.Table.from_pylist([{"text": text} for text in texts])
            pyarrow.parquet.write_table(table, inside / f"{split}.parquet")
        Dataset(path, "text", {"train": 2, "validation": 1}, {"train": 6, "validation": 3}).save_card(inside)
    assert (path / CARD).exists()
    assert count(path, folder, 10).rows == 2


def test_a_parquet_file_that_breaks_off_is_refused_with_what_could_be_read(folder, tmp_path):
    path = tmp_path / "rows.parquet"
    plain = {"use_dictionary": False, "write_page_checksum": True}
    table = pyarrow.Table.from_pylist([{"text": f"row {number}"} for number in range(20)])
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="none", **plain)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"row 15", b"row 16"))
    with pytest.raises(DataError, match=r"damaged Parquet .* 10 rows could be read"):
        count(path, folder, 64)
    path.write_bytes(content[:40])
    with pytest.raises(DataError, match=r"damaged Parquet .* 0 rows could be read"):
        count(path, folder, 64)


def test_a_line_that_is_too_long_is_refused_by_its_number(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * (17 * 2**20) + '"}\n')
    with pytest.raises(DataError, match="longer than 16 MiB") as refused:
        count(path, folder, 64)
    assert refused.value.where == f"{path}:2"
