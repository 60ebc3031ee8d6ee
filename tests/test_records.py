"""Records: what was written is read, and no other text is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import records
from espalier.errors import RunError

values = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers(), max_size=3),
    min_size=1,
    max_size=4,
).filter(lambda value: records.SEAL not in value)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "record"


def damaged(content: bytes, data) -> bytes:
    """Other bytes: one bit flipped, a piece taken out, or some put in."""
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    kind = data.draw(st.sampled_from(["flip", "cut out", "cut off", "put in"]), label="kind")
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7), label="bit")
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    if kind == "put in":
        return content[:place] + data.draw(st.binary(min_size=1, max_size=9)) + content[place:]
    return content[:place] + (content[place + data.draw(st.integers(1, 99)) :] if kind == "cut out" else b"")


@given(value=values)
def test_a_record_is_json_that_reads_back(path, value):
    records.write(path, value)
    assert records.read(path, None) == value
    assert json.loads(path.read_text()) == value | {records.SEAL: records.last_seal(path)}


@given(value=values, data=st.data())
def test_a_record_of_other_bytes_is_refused(path, value, data):
    content = records.dump(value, path.name).encode()
    other = damaged(content, data)
    path.write_bytes(other)
    if other != content:
        with pytest.raises(RunError) as refused:
            records.read(path, None)
        assert refused.value.where == str(path)


@given(lines=st.lists(st.text("ab: \n#é"), max_size=4), data=st.data())
def test_signed_text_is_read_without_its_seal_and_only_as_it_was(path, lines, data):
    text = "".join(f"{line}\n" for line in lines)
    records.write_signed(path, text)
    content = path.read_bytes()
    assert records.read_signed(path) == text
    assert path.read_text().endswith(f"# seal: {records.last_seal(path)}\n")
    other = damaged(content, data)
    path.write_bytes(other)
    if other != content:
        with pytest.raises(RunError):
            records.read_signed(path)


@given(added=st.lists(values, max_size=4), replaced=st.integers(0, 4))
def test_lines_read_back_whether_appended_or_replaced(path, added, replaced):
    path.unlink(missing_ok=True)
    records.replace_lines(path, added[:replaced])
    for value in added[replaced:]:
        records.append(path, value)
    assert list(records.read_lines(path)) == added
    assert records.last_seal(path) == (json.loads(path.read_text().splitlines()[-1])[records.SEAL] if added else "")


@given(added=st.lists(values, min_size=1, max_size=4), data=st.data())
def test_of_other_lines_only_those_before_the_damage_are_read(path, added, data):
    records.replace_lines(path, added)
    content = path.read_bytes()
    end = records.last_seal(path)
    other = damaged(content, data)
    path.write_bytes(other)
    read = []
    try:
        read.extend(records.read_lines(path))
    except RunError as refused:
        assert refused.where == f"{path}:{len(read) + 1}"
    else:
        assert other == content or len(read) < len(added) or records.last_seal(path) != end, "or its end tells"
    assert read == added[: len(read)]


@given(added=st.lists(values, min_size=2, max_size=4, unique_by=json.dumps), data=st.data())
def test_no_line_may_be_lost_doubled_or_moved(path, added, data):
    records.replace_lines(path, added)
    lines = path.read_text().split("\n")[:-1]
    at = data.draw(st.integers(0, len(lines) - 2))
    for moved in (
        lines[:at] + lines[at + 1 :],
        [*lines[:at], lines[at], *lines[at:]],
        [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
    ):
        path.write_text("".join(f"{line}\n" for line in moved))
        with pytest.raises(RunError):
            list(records.read_lines(path))


@given(added=st.lists(values, max_size=3), torn=st.text('{"ab: 1', min_size=1), later=values)
def test_a_line_that_was_cut_short_is_left_out_and_the_next_follows_the_whole_ones(path, added, torn, later):
    records.replace_lines(path, added)
    with path.open("a") as file:
        file.write(torn)
    content = path.read_bytes()
    assert list(records.read_lines(path)) == added
    assert path.read_bytes() == content, "reading changes nothing"
    records.append(path, later)
    assert list(records.read_lines(path)) == [*added, later]


@given(value=values)
def test_a_record_under_another_name_is_refused(path, value):
    one, lines, text = (path.with_name(name) for name in ("one", "lines", "text"))
    records.write(one, value)
    records.replace_lines(lines, [value, value])
    records.write_signed(text, "a: 1\n")
    for written, read in ((one, records.read), (lines, records.read_lines), (text, records.read_signed)):
        path.write_bytes(written.read_bytes())
        with pytest.raises(RunError):
            list(read(path, None) if read is records.read else read(path))


def test_a_file_that_is_not_there_reads_as_nothing(tmp_path):
    assert records.read(tmp_path / "no.json", 7) == 7
    assert list(records.read_lines(tmp_path / "no.jsonl")) == []
