"""A profile measures forced lengths, goes over its grid in rounds, and stops when the time is up."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.budget.inference import PROFILE, Query, RuntimeProfile
from espalier.infer import profile
from espalier.spec import ModelSpec

SPEC = ModelSpec(
    family="llama", vocab_size=50, hidden_size=32, num_hidden_layers=1, head_dim=16, max_position_embeddings=40
)


@pytest.fixture(scope="module")
def model():
    config = SPEC.to_config()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()


@pytest.fixture
def passes(model):
    """The lengths of the inputs of all passes, and of the caches that they found."""
    seen = []

    def note(_, arguments, named):
        cache = named["past_key_values"]
        seen.append((arguments[0].shape[1], cache.get_seq_length() if cache else 0))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def test_a_generation_reads_its_prompt_once_and_then_writes_every_token_it_is_told_to(model, passes):
    profile.generation_times(model, 7, [1, 3, 6], itertools.count().__next__)
    assert passes == [(7, 0), *((1, 7 + written) for written in range(5))]


def test_times_are_taken_when_each_length_is_reached(model, passes):
    """A clock that counts passes."""
    assert profile.generation_times(model, 4, [1, 2, 5], lambda: len(passes)) == [1, 2, 5]
    assert profile.generation_times(model, 4, [3], lambda: len(passes)) == [3]


def test_tokens_are_those_that_the_model_writes_without_a_cache(model):
    """The cache is used as it must be: the same prompt, read anew with all that was written, goes on the same way."""
    inputs = []
    handle = model.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    profile.generation_times(model, 5, [6], itertools.count().__next__)
    handle.remove()
    told = torch.cat(inputs, dim=1)
    with torch.inference_mode():
        greedy = model(told).logits.argmax(-1)
    assert greedy[0, 4:-1].tolist() == told[0, 5:].tolist()


@pytest.mark.parametrize("positions", [2, 10, 64, 100, 2048, 4096])
def test_a_grid_fits_into_the_positions_and_has_single_tokens(positions):
    fields = profile.ProfileRecipe.model_fields
    prompts, lengths = profile.grid(fields["prompts"].default, fields["generated"].default, positions)
    assert prompts[-1] + lengths[-1] <= positions
    assert (prompts[0], lengths[0]) == (1, 1)
    assert prompts == sorted(prompts) and lengths == sorted(lengths)
    assert 4 * prompts[-1] > positions or positions == 4096 or prompts[-1] == 1


def test_what_was_asked_for_is_measured_where_it_fits():
    assert profile.grid((8, 4, 900), (5, 2, 800), 1000) == ([1, 4, 8, 900], [1, 2, 5])


def test_every_cell_is_measured_in_every_round_after_a_warm_up(model, passes):
    found = profile.measure(model, [2, 6], [1, 3], repeats=3, clock=lambda: len(passes))
    assert {cell.query: cell.seconds for cell in found} == {
        Query(prompt, length): (length,) * 3 for prompt in (2, 6) for length in (1, 3)
    }
    assert [length for length, cached in passes if not cached] == [2, *(2, 6) * 3]


def test_no_prompt_is_begun_after_the_time_is_up_but_one_is_always_measured(model):
    found = profile.measure(model, [2, 6], [1, 3], repeats=3, seconds=0.0)
    assert [cell.query for cell in found] == [Query(2, 1), Query(2, 3)]
    assert all(len(cell.seconds) == 1 and cell.seconds[0] > 0 for cell in found)


def test_the_verb_writes_a_profile_that_prices_a_workload(espalier, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    done = espalier("budget", "profile", "model=model", "generated=[2,4]", "repeats=2", "--name=p")
    assert done.code == 0, done.err
    path = tmp_path / "runs" / "p" / PROFILE
    assert str(path.relative_to(tmp_path)) in done.out and "for each further one" in done.out
    made = RuntimeProfile.load(path)
    assert made.spec == SPEC and made.hardware.name == "a machine for tests"
    assert [prompt for prompt, _ in made.fits["minimum"].first] == [1, 16, 32]
    assert {len(cell.seconds) for cell in made.cells} == {2}
    (tmp_path / "asked.csv").write_text("prompt_tokens,completion_tokens\n16,4\n16,4\n200,1\n")
    done = espalier("budget", "queries", f"profile={path}", "tokens=asked.csv", "hardware=h100-80g", "--name=q")
    assert done.code == 0, done.err
    assert "1 of 3 prompts" in done.out and "ideal on 1 × NVIDIA H100" in done.out
