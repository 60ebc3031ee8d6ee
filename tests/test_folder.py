"""Model folders: whatever is unsafe, broken or damaged is refused by its name; a bare Hugging Face folder opens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from espalier import files
from espalier.errors import ModelError
from espalier.folder import INDEX, MADE, WEIGHTS, ModelFolder
from espalier.spec import ModelSpec

SPEC = ModelSpec(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def bare(tmp_path):
    """A folder as another program would leave it: a config and weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SPEC.to_config()))
    save_file({"a": torch.ones(3)}, folder / WEIGHTS)
    return folder


def edit(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def refusal(folder) -> ModelError:
    with pytest.raises(ModelError) as refused:
        ModelFolder.open(folder)
    return refused.value


def test_a_bare_folder_opens(bare):
    folder = ModelFolder.open(str(bare))
    assert folder.spec == SPEC
    assert folder.weight_files() == [bare / WEIGHTS]
    assert folder.made is None and folder.tokenizer_fingerprint() is None
    assert list(folder.lineage()) == []


def test_what_transformers_saves_opens_and_the_same_path_opens_in_transformers(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SPEC.to_config(), bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "many", max_shard_size="1KB")
    assert ModelFolder.open(tmp_path / "one").spec == SPEC
    sharded = ModelFolder.open(tmp_path / "many")
    assert sharded.spec == SPEC
    assert sharded.weight_files() == sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(sharded.weight_files()) > 1


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_config_is_refused(tmp_path, there):
    path = tmp_path / "model"
    if there:
        path.mkdir()
    error = refusal(path)
    assert error.where == str(path)
    assert error.found == ("no config.json" if there else "no such folder")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[1]", b"3"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_refused_by_its_file(bare, name, content):
    (bare / name).write_bytes(content)
    assert refusal(bare).where == str(bare / name)


def test_a_config_that_asks_to_run_code_is_refused(bare):
    edit(bare, auto_map={"AutoModelForCausalLM": "code.Model"})
    error = refusal(bare)
    assert "auto_map" in error.where and "code" in error.found


def test_pickled_weights_are_refused_by_name(bare):
    (bare / WEIGHTS).rename(bare / "pytorch_model.bin")
    error = refusal(bare)
    assert "pytorch_model.bin" in error.found and "pickle" in error.found


def test_a_folder_without_weights_is_refused(bare):
    (bare / WEIGHTS).unlink()
    error = refusal(bare)
    assert error.where == str(bare / WEIGHTS)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE", "weights.bin", "gone.safetensors"]
)
def test_an_index_that_names_another_place_or_format_is_refused(bare, name):
    outside = bare.parent / "outside.safetensors"
    shutil.copy(bare / WEIGHTS, outside)
    shutil.copy(bare / WEIGHTS, bare / "weights.bin")
    (bare / "sub").mkdir()
    name = str(outside) if name == "ABSOLUTE" else name
    (bare / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": name}}))
    assert name in refusal(bare).where


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": [WEIGHTS]}, {"weight_map": {"a": 3}}, {"weight_map": None}]
)
def test_an_index_that_names_no_files_is_refused(bare, index):
    (bare / INDEX).write_text(json.dumps(index))
    assert refusal(bare).where == f"{bare / INDEX}: weight_map"


def test_weights_that_the_index_leaves_out_are_refused(bare):
    shutil.copy(bare / WEIGHTS, bare / "part.safetensors")
    (bare / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    error = refusal(bare)
    assert error.where == f"{bare}/{WEIGHTS}" and INDEX in error.found
    (bare / WEIGHTS).unlink()
    assert ModelFolder.open(bare).weight_files() == [bare / "part.safetensors"]


def test_weights_may_be_links_as_in_the_hubs_cache(bare):
    blob = bare.parent / "blob"
    (bare / WEIGHTS).rename(blob)
    (bare / WEIGHTS).symlink_to(blob)
    assert ModelFolder.open(bare).weight_files() == [bare / WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_folder_that_differs_from_its_manifest_is_refused_by_the_file(bare, name):
    files.write_manifest(bare)
    ModelFolder.open(bare)
    content = (bare / name).read_bytes()
    (bare / name).write_bytes(content.replace(b"8", b"9", 1) if name == "config.json" else content[:-1] + b"\1")
    error = refusal(bare)
    assert name in error.found and error.where == str(bare)


def test_a_shape_that_a_spec_cannot_state_is_refused_with_the_file(bare):
    edit(bare, model_type="gpt2")
    with pytest.raises(ModelError) as refused:
        _ = ModelFolder.open(bare).spec
    assert refused.value.where == f"{bare / 'config.json'}: model_type"


def test_a_fingerprint_is_of_config_and_weights_alone(bare):
    first = ModelFolder(bare).fingerprint()
    (bare / "README.md").write_text("x")
    assert ModelFolder(bare).fingerprint() == first
    save_file({"a": torch.zeros(3)}, bare / WEIGHTS)
    second = ModelFolder(bare).fingerprint()
    edit(bare, rms_norm_eps=1e-5)
    assert len({first, second, ModelFolder(bare).fingerprint()}) == 3


def test_a_tokenizer_has_a_fingerprint_of_its_own(bare):
    (bare / "tokenizer.json").write_text("{}")
    assert ModelFolder(bare).tokenizer_fingerprint() == files.sha256(bare / "tokenizer.json")


def test_another_tokenizer_than_the_recorded_one_is_refused(bare):
    tokenizer = bare / "tokenizer.json"
    tokenizer.write_text("{}")
    (bare / MADE).write_text(json.dumps({"tokenizer": files.sha256(tokenizer)}))
    ModelFolder.open(bare)
    tokenizer.write_text("{ }")
    error = refusal(bare)
    assert error.where == str(tokenizer) and files.sha256(tokenizer)[:12] in error.found
    tokenizer.unlink()
    ModelFolder.open(bare)


def test_a_lineage_goes_back_as_far_as_it_is_recorded(bare):
    bottom = {"run": "bottom", "parents": [{"name": "hub", "made": None}]}
    middle = {"run": "middle", "parents": [{"name": "other", "made": None}, {"name": "bottom", "made": bottom}]}
    (bare / MADE).write_text(json.dumps({"run": "top", "parents": [{"name": "middle", "made": middle}]}))
    assert [made["run"] for made in ModelFolder(bare).lineage()] == ["top", "middle", "bottom"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("number", [8, -2, [0, 8], "0", 1.5])
def test_a_special_id_that_the_embedding_has_no_row_for_is_refused(bare, name, key, number):
    if name != "config.json":
        (bare / name).write_text(json.dumps({key: number}))
    else:
        edit(bare, **{key: number})
    refused = refusal(bare)
    assert refused.where == f"{bare / name}: {key}" and "8 rows" in refused.expected


def test_a_model_may_say_by_minus_one_that_nothing_fills_its_texts(bare):
    edit(bare, pad_token_id=-1)
    ModelFolder.open(bare)
    edit(bare, eos_token_id=-1)
    assert refusal(bare).where.endswith("eos_token_id")


@pytest.mark.parametrize("number", [None, 0, 7, [0, 7], []])
def test_special_ids_with_rows_of_their_own_are_taken(bare, number):
    edit(bare, bos_token_id=number, eos_token_id=number, pad_token_id=number)
    ModelFolder.open(bare)


def test_the_rows_of_a_model_that_also_sees_are_those_of_its_text(bare):
    config = SPEC.to_config()
    (bare / "config.json").write_text(json.dumps({"text_config": config, "eos_token_id": 8}))
    assert "8 rows" in refusal(bare).expected
    (bare / "config.json").write_text(json.dumps({"text_config": {}, "eos_token_id": 8}))
    ModelFolder.open(bare)


def with_ids(count: int, added: int = 0, kind: str = "BPE") -> dict:
    vocabulary = {f"t{number}": number for number in range(count)}
    return {
        "model": {"type": kind, "vocab": [[token, 0.0] for token in vocabulary] if kind == "Unigram" else vocabulary},
        "added_tokens": [{"id": count + number, "content": f"<{number}>"} for number in range(added)],
    }


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize(("count", "added", "taken"), [(8, 0, True), (3, 2, True), (9, 0, False), (7, 2, False)])
def test_a_tokenizer_may_have_fewer_ids_than_the_embedding_rows_and_never_more(bare, kind, count, added, taken):
    (bare / "tokenizer.json").write_text(json.dumps(with_ids(count, added, kind)))
    if taken:
        ModelFolder.open(bare)
        return
    refused = refusal(bare)
    assert refused.where.endswith("tokenizer.json") and "rows: 8 to 8 can't be used" in refused.found


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
def test_a_file_that_was_added_to_a_tokenizer_is_noticed_while_there_is_a_manifest(bare, name):
    files.write_manifest(bare)
    (bare / "notes.txt").write_text("no matter")
    ModelFolder.open(bare)
    (bare / name).write_text("{}")
    refused = refusal(bare)
    assert name in refused.found and "without manifest.json it is taken" in refused.mend
    (bare / files.MANIFEST).unlink()
    ModelFolder.open(bare)
