"""What files of others may not ask for, wherever in a file they do, and what rows of theirs are."""

import json
import tracemalloc
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import untrusted
from espalier.errors import ModelError
from espalier.untrusted import CONFIGS, REFUSED, json_object, leads_outside, load_tokenizer, read_json, require_plain


def is_plain(key: str) -> bool:
    """Whether a key asks for nothing; hypothesis also tries the words of the module that it tests."""
    return key not in untrusted.REFUSED and not untrusted.KERNEL.fullmatch(key)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text().filter(is_plain), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("model")


def nested(key, value, depth):
    """The key, some mappings and lists down."""
    for level in range(depth):
        key, value = f"inner{level}", [{key: value}] if level % 2 else {key: value}
    return {"model_type": "granite", key: value}


@pytest.mark.parametrize("key", REFUSED)
@given(depth=st.integers(0, 200), name=st.sampled_from(CONFIGS))
def test_a_key_that_asks_for_more_is_refused_at_every_depth_and_by_its_place(place, key, depth, name):
    folder = place()
    (folder / name).write_text(json.dumps(nested(key, "x", depth)))
    with pytest.raises(ModelError) as refused:
        require_plain(folder)
    assert refused.value.where.startswith(f"{folder / name}: ") and refused.value.where.endswith(key)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("kernel", ["owner/name", "owner/name@main:f", {"": "owner/name"}, ["sdpa", "owner/name"]])
def test_code_from_the_hub_is_refused_and_what_transformers_has_is_not(tmp_path, key, kernel):
    (tmp_path / "config.json").write_text(json.dumps({key: kernel}))
    with pytest.raises(ModelError, match="fetched from the Hub"):
        require_plain(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: "eager"}))
    require_plain(tmp_path)


def test_a_class_that_transformers_has_is_named_where_code_was_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "auto_map": {}}))
    with pytest.raises(ModelError, match=r"Phi3ForCausalLM.*remove auto_map"):
        require_plain(tmp_path)


@given(VALUES)
def test_what_asks_for_nothing_is_taken(place, value):
    folder = place()
    (folder / "config.json").write_text(json.dumps({"value": value, "quantization_config": None}))
    require_plain(folder)


@pytest.mark.parametrize("name", ["/a", "../a", "a/../../b", "a/.."])
def test_a_name_that_leads_outside(name):
    assert leads_outside(name)
    assert not leads_outside(name.replace("..", "x").lstrip("/"))


@pytest.mark.parametrize("name", [untrusted.ADAPTER, "shard-00001-model-00002-of-00003.safetensors"])
def test_weights_that_transformers_would_take_unasked_are_refused_by_their_file(tmp_path, name):
    (tmp_path / "shard-of-another-kind.safetensors").touch()
    require_plain(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ModelError) as refused:
        require_plain(tmp_path)
    assert refused.value.where == str(tmp_path / name)


def test_a_tokenizer_is_not_loaded_from_a_folder_that_asks_for_more(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Own", None]}}))
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        read_json(path)
    assert refused.value.where == str(path) and refused.value.expected == "JSON"


@pytest.mark.parametrize("value", [[1], 3, None, "x"])
def test_json_that_is_no_object_is_refused_with_what_it_is(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match=f"found a {type(value).__name__}; expected a JSON object"):
        read_json(tmp_path / "config.json")


def test_a_file_is_not_read_at_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_JSON_BYTES", 20)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    (tmp_path / "config.json").write_text('{"a": 1}' + " " * 20)
    with pytest.raises(ModelError, match="larger"):
        read_json(tmp_path / "config.json")


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES))
def test_a_row_is_what_json_says_unless_a_key_comes_twice(row):
    line = json.dumps(row).encode()
    assert json_object(line) == row
    if row:
        first = json.dumps(row).removeprefix("{").removesuffix("}")
        with pytest.raises(ValueError, match="a key twice"):
            json_object(f"{{{first}, {first}}}".encode())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *((value, "not a JSON object") for value in (b"[1]", b"3", b"null", b'"x"')),
        *((value, "malformed JSON") for value in (b"", b"{", b"{'a': 1}", b"[" * 100_000)),
    ],
)
def test_why_a_line_is_no_row_is_said_in_few_words(line, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        json_object(line)


@given(st.binary())
def test_a_line_is_a_row_or_no_row(line):
    try:
        assert isinstance(json_object(line), dict)
    except ValueError as error:
        assert str(error)


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.integers(1, 40))
def test_lines_come_back_in_order_and_one_that_is_too_long_is_none(tmp_path_factory, held, most):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(b"".join(line + b"\n" for line in held))
    with mock.patch.object(untrusted, "PIECE", 7):
        assert list(untrusted.lines(path, most)) == [line + b"\n" if len(line) < most else None for line in held]


def test_of_a_line_that_is_too_long_little_is_held(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 5_000_000 + b"\nrest")
    tracemalloc.start()
    assert list(untrusted.lines(path, 1_000_000)) == [None, b"rest"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
