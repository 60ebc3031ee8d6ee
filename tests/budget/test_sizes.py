"""Sizes to choose from: as deep as published models of their width, and every next one larger."""

from itertools import pairwise

from espalier.budget.flops import parameters
from espalier.budget.sizes import HEADS, depth_of
from espalier.spec import ModelSpec


def test_depths_are_those_of_published_models():
    assert [depth_of(width) for width in (4096, 8192, 10_240, 12_288)] == [32, 64, 80, 96]
    assert all(4 <= depth_of(width) <= 40 for width in (128, 256, 512, 1024, 2048))


def test_every_size_is_larger_than_the_one_before_and_none_by_much():
    for head_dim in (32, 64, 128):
        widths = [head_dim * heads for heads in HEADS]
        found = [
            parameters(ModelSpec(vocab_size=1, hidden_size=w, head_dim=head_dim, num_hidden_layers=depth_of(w)))
            for w in widths
        ]
        assert all(1 < after / before < 10 for before, after in pairwise(found))
