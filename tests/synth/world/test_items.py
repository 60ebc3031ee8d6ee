"""An invented world's items give away nothing but the cue that was planted."""

from __future__ import annotations

import pytest

from espalier.synth.world.facts import invent
from espalier.synth.world.items import examination
from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.schema import schema
